"""Eight clients at a time: conversations that a fresh engine takes over, and the price of a connector that never hits.

*Conversations*: each client has a document and asks about it in several turns; every turn sends all that was said
before. The first engine of a peer answers the first turns, a fresh one on the same store takes over and is measured.

*Misses*: two engines, without a connector and with the peer's, answer rounds of prompts that neither has seen, in turn.
The loss compares the lower quartiles of the times that each took, since whatever else a machine does adds to them; and
the rounds are divided among several starts of both, since one process may be a tenth faster than the next.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.engine import REST, Answer, Engine, running
from bench.peers import PEERS, Peer
from bench.prompts import encode, prompt
from bench.ttft import settle
from models import build, texts

if TYPE_CHECKING:
    from collections.abc import Callable

CLIENTS = 8
DOCUMENT, QUESTION, REPLY = 1500, 60, 32
"""Tokens of a client's document, of each question and of each reply."""

TURNS = 3
"""Turns answered by the first engine, and again by the second."""

STARTS = 3
"""Of both engines, for the rounds of misses."""


@dataclass
class Conversation:
    """One client: what was said so far."""

    number: int
    model: Path
    history: list[int] = field(default_factory=list)
    turn: int = 0

    def __post_init__(self) -> None:
        self.history = prompt(self.model, DOCUMENT, f"Client {self.number}", self.number)

    async def ask(self, engine: Engine) -> Answer:
        """Send all that was said and the next question, and keep the reply."""
        start = 200 * self.turn
        question = f"\n\nQuestion {self.turn}: {texts.long_texts()[-1 - self.number][start : start + 600]}"
        self.history += encode(self.model, question)[:QUESTION]
        self.turn += 1
        answer = await engine.generate(self.history, REPLY)
        self.history = self.history + answer.tokens
        return answer


@dataclass(frozen=True)
class Load:
    """What a number of concurrent requests saw."""

    peer: str
    ttft_mean: float
    ttft_p99: float
    tokens_per_second: float
    """Tokens generated."""
    cached: float
    """Share of the prompts' tokens that was not computed."""


async def talk(engine: Engine, clients: list[Conversation]) -> tuple[list[Answer], float, int]:
    """Let each client have its turns. Return the answers, the seconds taken and the tokens sent."""
    sent = 0

    async def turns(client: Conversation) -> list[Answer]:
        nonlocal sent
        answers = []
        for _ in range(TURNS):
            answers.append(await client.ask(engine))
            sent += len(client.history) - REPLY
        return answers

    start = time.perf_counter()
    answers = [a for each in await asyncio.gather(*map(turns, clients)) for a in each]
    return answers, time.perf_counter() - start, sent


async def conversations(peer: Peer, model: Path, work: Path) -> Load:
    """Measure the second engine of a peer."""
    store, log = work / peer.name, work / f"{peer.name}.log"
    clients = [Conversation(i, model) for i in range(CLIENTS)]
    for _ in range(2):
        with peer.service(store, log):
            async with running(peer, store, model, log) as engine:
                await engine.generate(prompt(model, 600, "warm-up", -1))
                answers, seconds, sent = await talk(engine, clients)
                await settle(store)
    waits = sorted(a.ttft for a in answers)
    return Load(
        peer.name,
        statistics.fmean(waits),
        waits[min(len(waits) - 1, round(0.99 * len(waits)))],
        REPLY * len(answers) / seconds,
        sum(a.cached for a in answers) / sent,
    )


async def misses(peer: Peer, model: Path, work: Path, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Measure the loss of throughput at no hits, as a share. Return it and the seconds of each round, by engine."""
    taken: dict[str, list[float]] = {"none": [], peer.name: []}

    async def seconds(engine: Engine, number: int) -> float:
        # Both engines get the same prompts; the number makes them new to both.
        batch = [prompt(model, 1000, f"Round {number}, client {i}", i) for i in range(CLIENTS)]
        await asyncio.sleep(REST)
        start = time.perf_counter()
        answers = await asyncio.gather(*(engine.generate(ids, REPLY) for ids in batch))
        if any(a.cached for a in answers):
            raise RuntimeError("a prompt that nobody had seen was found in a cache")
        return time.perf_counter() - start

    for begin in range(STARTS):
        store, log = work / f"{peer.name}{begin}", work / f"{peer.name}.log"
        with peer.service(store, log):
            async with (
                running(PEERS["none"], work / "none", model, log) as bare,
                running(peer, store, model, log) as engine,
            ):
                engines = {"none": bare, peer.name: engine}
                for number in range(-1, -(-rounds // STARTS)):
                    for name in list(taken) if (number + begin) % 2 else reversed(taken):
                        found = await seconds(engines[name], number)
                        if number >= 0:  # the first round warms up
                            taken[name].append(found)
    bare, own = (statistics.quantiles(each, n=4, method="inclusive")[0] for each in taken.values())
    return 1 - bare / own, taken


async def compare(
    names: list[str], model: Path, rounds: int, note: Callable[[str], None]
) -> tuple[str, list[dict[str, object]]]:
    """Measure several peers. Return a Markdown table and the figures."""
    rows = [
        "| connector | mean TTFT, s | p99 TTFT, s | tokens/s | prompt tokens cached | loss at no hits |",
        "|---|---|---|---|---|---|",
    ]
    figures: list[dict[str, object]] = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="kvfs-bench-", ignore_cleanup_errors=True) as work:
            load = await conversations(PEERS[name], model, Path(work))
            note(f"{name}: {load}")
            loss, taken = (0.0, {}) if name == "none" else await misses(PEERS[name], model, Path(work), rounds)
            note(f"{name}: loss {loss:.1%}, seconds of rounds {taken}")
        figures.append(vars(load) | {"loss": loss, "rounds": taken})
        rows.append(
            f"| {PEERS[name].title} | {load.ttft_mean:.3f} | {load.ttft_p99:.3f} | {load.tokens_per_second:.1f} "
            f"| {load.cached:.0%} | {f'{loss:.1%}' if name != 'none' else ''} |"
        )
    return "\n".join(rows), figures


def main() -> None:
    """Measure the peers named on the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, metavar="PEER")
    parser.add_argument("--rounds", type=int, default=12, help="rounds without hits, each on both engines")
    parser.add_argument("--model", type=Path, default=build.Models.at(build.cache_dir()).gemma)
    options = parser.parse_args()
    print(asyncio.run(compare(options.peers, options.model, options.rounds, print))[0])


if __name__ == "__main__":
    main()
