"""What compaction costs engines that are busy meanwhile: ``python -m bench.busy``.

Two engines on one mount, each on a core of its own, answer prompts that nobody has seen, two clients each, one request
after the other. Before every round chunks copied from what the engines have stored lie ready and are on the disk, more
than compaction can get through; in every other one the daemon compacts as much as it may. The p99 of the time to the
first token with and without that is compared over all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.engine import Engine, running
from bench.peers import PEERS, mountpoint
from bench.prompts import prompt
from bench.ttft import settle
from kvfs.chunk import open_part, write_part
from kvfs.client import MountClient
from kvfs.store import Store
from models import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OUT = Path(__file__).parent / "out" / "busy.json"
CLIENTS, TOKENS, REPLY = 2, 300, 8
"""Clients of an engine, and tokens of each prompt and reply."""
PILE = 4.0
"""GiB of raw chunks that lie ready."""
BOUND = 1.05
KVFS = Path(sys.executable).with_name("kvfs")


@dataclass(frozen=True)
class Round:
    """The times to the first token of one round; of compaction, how many bytes of coded parts it has made."""

    compacting: bool
    waits: list[float]
    compacted: int


def held(store: Store, coded: bool) -> int:
    """Return the bytes of all parts in one form."""
    sizes = 0
    for found in itertools.chain.from_iterable(map(store.scan, store.namespaces())):
        with contextlib.suppress(FileNotFoundError):  # it has changed its form meanwhile
            sizes += found.entry.stat().st_size if found.coded is coded else 0
    return sizes


def pile_up(store: Store, mount: Path, nbytes: int) -> None:
    """Store copies of one chunk under keys of their own, until the raw parts are so many bytes, and all are written."""
    [ns] = store.namespaces()
    manifest = store.manifest(ns)
    raw = (found.key for found in store.scan(ns) if not found.coded)
    key = next(key for key in raw if store.masks(ns, [key]) == [manifest.all_parts])
    parts = []
    for part in manifest.parts:
        with open_part(store.open_part(ns, key, part), manifest, key, part) as file:
            parts.append((file.header.meta, file.read()))
    with MountClient(mount) as client:
        for _ in range(max(0, nbytes - held(store, coded=False)) // sum(len(data) for _, data in parts) + 1):
            fresh = os.urandom(32)
            for meta, data in parts:
                with client.reserve(ns, len(data), timeout=10, key=fresh) as reservation:
                    write_part(reservation.fd, manifest, meta._replace(key=fresh), data)
                    client.publish(ns, reservation, fresh, meta.part, timeout=10)
    os.sync()


@contextlib.contextmanager
def compacting(mount: Path, log: Path) -> Iterator[None]:
    """Let the daemon compact all it can while this lasts."""
    with log.open("ab") as output:
        command = [KVFS, "compact", "--now", "--at", mount]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield
    finally:
        early = process.poll() is not None
        process.send_signal(signal.SIGINT)
        process.wait(30)
        if early:
            raise RuntimeError(f"compaction ended before its round; see {log}")


async def answers(engines: list[Engine], model: Path, seconds: float, numbers: Iterator[int]) -> list[float]:
    """Keep all engines busy for a while. Return the times to the first token."""
    until, waits = time.monotonic() + seconds, list[float]()

    async def client(engine: Engine) -> None:
        while time.monotonic() < until:
            number = next(numbers)
            answer = await engine.generate(prompt(model, TOKENS, f"Request {number}", number), REPLY)
            waits.append(answer.ttft)

    await asyncio.gather(*(client(engine) for engine in engines for _ in range(CLIENTS)))
    return waits


def p99(waits: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(waits, n=100, method="inclusive")[98]


async def measure(
    model: Path, rounds: int, seconds: float, pile: float, work: Path, note: Callable[[str], None]
) -> list[Round]:
    """Measure pairs of rounds, with and without compaction, in the folder ``work``."""
    peer, folder, log, numbers = PEERS["kvfs"], work / "kvfs", work / "kvfs.log", itertools.count()
    on_core = [dataclasses.replace(peer, environment={"VLLM_CPU_OMP_THREADS_BIND": str(core)}) for core in range(2)]
    found = []
    with peer.service(folder, log):
        async with running(on_core[0], folder, model, log) as one, running(on_core[1], folder, model, log) as two:
            await answers([one, two], model, seconds, numbers)
            await settle(folder)
            with Store.open(folder) as store:
                for number in range(2 * rounds):
                    on = number % 4 in {1, 2}  # off on on off: what drifts, drifts for both
                    pile_up(store, mountpoint(folder), int(pile * 2**30))
                    with compacting(mountpoint(folder), log) if on else contextlib.nullcontext():
                        before = held(store, coded=True)
                        waits = await answers([one, two], model, seconds, numbers)
                        made = held(store, coded=True) - before
                    found.append(Round(on, waits, made))
                    name = "compacting" if on else "quiet"
                    note(f"{name:<10} {len(waits)} requests, p99 {p99(waits):.3f} s, {made / 1e6:.0f} MB made")
    return found


def report(rounds: list[Round]) -> str:
    """Return a Markdown table with the verdict below it."""
    rows = ["| | requests | median TTFT, s | p99 TTFT, s | coded MB made |", "|---|---|---|---|---|"]
    tails = {}
    for on in (False, True):
        waits = [w for r in rounds if r.compacting is on for w in r.waits]
        tails[on], done = p99(waits), sum(r.compacted for r in rounds if r.compacting is on) / 1e6
        name = "compacting" if on else "without"
        rows.append(f"| {name} | {len(waits)} | {statistics.median(waits):.3f} | {tails[on]:.3f} | {done:.0f} |")
    ratio = tails[True] / tails[False]
    verdict = "holds" if ratio <= BOUND else "FAILS"
    return "\n".join([*rows, "", f"* {verdict}: p99 compacting / without, at most {BOUND}: {ratio:.3f}"])


async def compare(
    model: Path, rounds: int, seconds: float, pile: float, note: Callable[[str], None]
) -> tuple[str, list[dict[str, object]]]:
    """Measure. Return the table, and all rounds."""
    with tempfile.TemporaryDirectory(prefix="kvfs-bench-", ignore_cleanup_errors=True) as work:
        found = await measure(model, rounds, seconds, pile, Path(work), note)
    return report(found), [dataclasses.asdict(r) for r in found]


def main() -> int:
    """Measure, print, and say by the exit status whether the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=build.Models.at(build.cache_dir()).gemma)
    parser.add_argument("--rounds", type=int, default=6, help="pairs of rounds")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a round")
    parser.add_argument("--pile", type=float, default=PILE, metavar="GIB", help="raw chunks ready before each round")
    options = parser.parse_args()
    text, found = asyncio.run(compare(options.model, options.rounds, options.seconds, options.pile, print))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1))
    print(text)
    return int("FAILS" in text)


if __name__ == "__main__":
    sys.exit(main())
