"""Time to the first token of a long prompt: computed, from the engine's own cache, from the store in a fresh engine.

Each peer gets two engines on one store. The first computes every prompt and repeats it at once (its own prefix cache).
The second, with services restarted too, loads each prompt twice: first with the page cache dropped, then hot, its own
prefix cache emptied before each. So whatever a peer keeps in memory of its own serves the hot column.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.engine import Answer, Engine, running
from bench.peers import PEERS, Peer
from bench.prompts import prompt, prompts
from models import build

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = {"cold": "computed", "own": "own prefix cache", "dropped": "store, page cache dropped", "hot": "store, hot"}


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    peer: str
    tokens: int
    column: str
    ttft: float
    cached: int
    same: bool
    """Whether the first token equals that of the computed prompt (bfloat16 ties may differ)."""


def drop_page_cache() -> bool:
    """Write everything back and drop the page cache; False without the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def stored_bytes(store: Path) -> int:
    """Return the bytes that a store's files take."""
    return sum(f.stat().st_blocks * 512 for f in store.rglob("*") if f.is_file()) if store.exists() else 0


async def settle(store: Path, quiet: float = 1.5, limit: float = 60.0) -> None:
    """Wait until nothing has been added to a store for ``quiet`` seconds; what is stored is written behind."""
    deadline, last, since = time.monotonic() + limit, -1, time.monotonic()
    while time.monotonic() < min(deadline, since + quiet):
        await asyncio.sleep(0.1)
        if (now := stored_bytes(store)) != last:
            last, since = now, time.monotonic()


async def measure(
    peer: Peer,
    model: Path,
    lengths: list[int],
    count: int,
    work: Path,
    samples: list[Sample],
    note: Callable[[str], None],
) -> int:
    """Measure one peer in the folder ``work``, adding to ``samples``. Return the bytes stored."""
    store, log = work / peer.name, work / f"{peer.name}.log"
    plan = [(length, i, ids) for length in lengths for i, ids in enumerate(prompts(model, length, count))]
    computed: dict[tuple[int, int], int] = {}

    async def take(engine: Engine, column: str, length: int, i: int, ids: list[int]) -> Answer:
        answer = await engine.generate(ids)
        first = computed.setdefault((length, i), answer.tokens[0])
        samples.append(Sample(peer.name, length, column, answer.ttft, answer.cached, answer.tokens[0] == first))
        note(f"{peer.name:<12} {length:>6} {column:<8} {answer.ttft:8.3f} s, {answer.cached} cached")
        return answer

    for column_set in ("first", "fresh"):
        if column_set == "fresh" and peer.connector(store) is None:
            break
        with peer.service(store, log):
            async with running(peer, store, model, log) as engine:
                await engine.generate(prompt(model, 600, f"warm-up of the {column_set} engine", -1))
                for length, i, ids in plan:
                    if column_set == "first":
                        await take(engine, "cold", length, i, ids)
                        await take(engine, "own", length, i, ids)
                        continue
                    if drop_page_cache():
                        await take(engine, "dropped", length, i, ids)
                        await engine.forget()
                    else:
                        await engine.generate(ids)
                        await engine.forget()
                    await take(engine, "hot", length, i, ids)
                    await engine.forget()
                await settle(store)
    return stored_bytes(store)


def table(samples: list[Sample], stored: dict[str, int]) -> str:
    """Return the medians as a Markdown table, in seconds."""
    rows = ["| connector | tokens | " + " | ".join(COLUMNS.values()) + " | tokens cached | stored MB |"]
    rows.append("|---|---|" + "---|" * (len(COLUMNS) + 2))
    for name, length in dict.fromkeys((s.peer, s.tokens) for s in samples):
        here = [s for s in samples if (s.peer, s.tokens) == (name, length)]
        cells = []
        for column in COLUMNS:
            taken = [s.ttft for s in here if s.column == column]
            cells.append(f"{statistics.median(taken):.3f}" if taken else "")
        loaded = [s.cached for s in here if s.column == "hot"]
        megabytes = f"{stored[name] / 1e6:.0f}" if name in stored else "its engine died"
        cells += [str(int(statistics.median(loaded))) if loaded else "", megabytes]
        rows.append(f"| {PEERS[name].title} | {length} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


async def compare(
    names: list[str], model: Path, lengths: list[int], count: int, note: Callable[[str], None]
) -> tuple[str, list[dict[str, object]]]:
    """Measure several peers, one after the other. Return the table and the samples."""
    samples: list[Sample] = []
    stored: dict[str, int] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="kvfs-bench-", ignore_cleanup_errors=True) as work:
            try:
                stored[name] = await measure(PEERS[name], model, lengths, count, Path(work), samples, note)
            except RuntimeError as e:  # its engine died; the others are measured all the same
                log = Path(work) / f"{name}.log"
                note("\n".join(log.read_text(errors="replace").splitlines()[-200:]) if log.exists() else "no log")
                note(f"{name}: {e}")
    return table(samples, stored), [asdict(s) for s in samples]


def main() -> None:
    """Measure the peers named on the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, metavar="PEER")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2000, 4000, 8000], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=3, help="distinct prompts of each length")
    parser.add_argument("--model", type=Path, default=build.Models.at(build.cache_dir()).gemma)
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        print(asyncio.run(compare(options.peers, options.model, options.lengths, options.texts, print))[0])


if __name__ == "__main__":
    main()
