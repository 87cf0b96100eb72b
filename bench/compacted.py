"""Time to the first token from compacted stores beside a raw one: ``python -m bench.compacted``.

One engine computes prompts of each length. Its store is copied and the copies are compacted, to each level. A fresh
engine for each store then loads every prompt: hot, and from a medium limited to 200 MB/s with the page cache dropped
(`bench.medium`). All engines are up at the same time and take turns, each prompt in all of them before the next; an
engine's own prefix cache is emptied before each request. The last lines say which of the bounds of docs/benchmarks.md
hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.engine import REST, Answer, Engine, running
from bench.medium import Medium, medium
from bench.peers import Peer, kvfs_connector
from bench.prompts import prompt, prompts
from bench.ttft import drop_page_cache, settle, stored_bytes
from models import build

if TYPE_CHECKING:
    from collections.abc import Callable

OUT = Path(__file__).parent / "out" / "compacted.json"
KVFS = Path(sys.executable).with_name("kvfs")
RATE = 200_000_000
"""Bytes a second of the slow medium."""
LEVELS = ["lossless", "medium"]
QUIET = {"kvfs.skip_write": True}
MAX_TOKENS = 8192
"""What the smaller of the models can read."""
HOT, SLOW = 1.3, 2.0
"""Hot, a prompt from a store compacted to medium may take so many times as long as from the raw one; from the slow
medium the raw one has to take so many times as long."""


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    model: str
    store: str
    tokens: int
    medium: str
    ttft: float
    cached: int


def lossy(name: str) -> Peer:
    """Return the engine of one store, without a daemon: the medium limits whoever reads."""
    return Peer(name, name, lambda store: kvfs_connector(store=str(store), fidelity="lossy", gate="always"))


def compacted_copy(store: Path, copy: Path, level: str) -> None:
    """Copy a store, and compact the lossy namespace in it."""
    shutil.copytree(store, copy)
    for ns in copy.glob("?" * 64):
        if json.loads((ns / "manifest.json").read_text())["identity"]["fidelity"] == "lossy":
            command = [KVFS, "compact", ns.name, "--level", level, "--now", "--at", copy]
            subprocess.run(command, check=True, stdout=sys.stderr)


async def stores(model: Path, work: Path, lengths: list[int], texts: int, levels: list[str]) -> list[str]:
    """Compute all prompts into the store ``raw``, and make a store of each level of it. Return their names."""
    log = work / "raw.log"
    async with running(lossy("raw"), work / "raw", model, log, max_model_len=MAX_TOKENS) as engine:
        await engine.generate(prompt(model, 600, "warm-up of the first engine", -1))
        for length in lengths:
            for ids in prompts(model, length, texts):
                await engine.generate(ids)
        await settle(work / "raw")
    for level in levels:
        compacted_copy(work / "raw", work / level, level)
    return ["raw", *levels]


async def measure(
    model: Path, lengths: list[int], texts: int, rounds: int, levels: list[str], note: Callable[[str], None]
) -> tuple[list[Sample], dict[str, int]]:
    """Measure one model. Return the samples, and the bytes of each store."""
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory(prefix="kvfs-bench-", ignore_cleanup_errors=True) as folder,
        medium(Path(folder)) as slow,
    ):
        work = Path(folder)
        names = await stores(model, work, lengths, texts, levels)
        async with contextlib.AsyncExitStack() as stack:
            engines: dict[str, Engine] = {}
            with slow.entered():
                for name in names:
                    log = work / f"{name}.log"
                    started = running(lossy(name), work / name, model, log, max_model_len=MAX_TOKENS)
                    engines[name] = await stack.enter_async_context(started)
                    await engines[name].generate(prompt(model, 600, "warm-up of the first engine", -1))
            for number in range(rounds):
                for length in lengths:
                    for ids in prompts(model, length, texts):
                        for name in names[number % len(names) :] + names[: number % len(names)]:
                            await asyncio.sleep(REST)
                            for way in ("hot", "slow"):
                                answer = await load(engines[name], ids, slow if way == "slow" else None)
                                samples.append(Sample(model.name, name, length, way, answer.ttft, answer.cached))
                                note(f"{name:<9} {length:>6} {way} {answer.ttft:7.3f} s, {answer.cached} cached")
        return samples, {name: stored_bytes(work / name) for name in names}


async def load(engine: Engine, ids: list[int], slow: Medium | None) -> Answer:
    """Let an engine load a prompt: from the page cache, or from a medium so slow."""
    if slow is None:
        await engine.generate(ids, **QUIET)
        await engine.forget()
        answer = await engine.generate(ids, **QUIET)
    else:
        if not drop_page_cache():
            raise PermissionError("the page cache cannot be dropped: run this as root")
        slow.limit(RATE)
        try:
            answer = await engine.generate(ids, **QUIET)
        finally:
            slow.limit(None)
    await engine.forget()
    return answer


def medians(samples: list[Sample]) -> dict[tuple[str, int, str], float]:
    """Return the median time by store, length and medium."""
    keys = dict.fromkeys((s.store, s.tokens, s.medium) for s in samples)
    return {k: statistics.median(s.ttft for s in samples if (s.store, s.tokens, s.medium) == k) for k in keys}


def table(samples: list[Sample], sizes: dict[str, int]) -> str:
    """Return the medians as a Markdown table: seconds, and in parentheses how that compares with the raw store."""
    found = medians(samples)
    rows = ["| store | size | tokens | hot, s | from 200 MB/s, s |", "|---|---|---|---|---|"]
    for store, tokens in dict.fromkeys((s.store, s.tokens) for s in samples):
        hot, slow = found[store, tokens, "hot"], found[store, tokens, "slow"]
        of_hot, of_slow = hot / found["raw", tokens, "hot"], found["raw", tokens, "slow"] / slow
        share = sizes[store] / sizes["raw"]
        rows.append(
            f"| {store} | {share:.0%} | {tokens} | {hot:.3f} ({of_hot:.2f}x) | {slow:.3f} ({of_slow:.2f}x faster) |"
        )
    return "\n".join(rows)


def bounds(samples: list[Sample]) -> list[tuple[str, float, float, bool]]:
    """What must hold of the level medium, as (claim, value, bound, whether it does)."""
    found, claims = medians(samples), []
    for tokens in dict.fromkeys(s.tokens for s in samples):
        hot = found["medium", tokens, "hot"] / found["raw", tokens, "hot"]
        slow = found["raw", tokens, "slow"] / found["medium", tokens, "slow"]
        claims.append((f"{tokens} tokens, hot: compacted / raw, at most", hot, HOT, hot <= HOT))
        claims.append((f"{tokens} tokens, slow medium: raw / compacted, at least", slow, SLOW, slow >= SLOW))
    return claims


async def compare(
    models: list[Path], lengths: list[int], texts: int, rounds: int, levels: list[str], note: Callable[[str], None]
) -> tuple[str, list[dict[str, object]]]:
    """Measure several models. Return tables with the bounds below them, and the samples."""
    report, everything = [], []
    for model in models:
        samples, sizes = await measure(model, lengths, texts, rounds, levels, note)
        everything += [asdict(s) for s in samples]
        report += [f"{model.name}:", "", table(samples, sizes), ""]
        for claim, value, bound, holds in bounds(samples):
            report.append(f"* {'holds' if holds else 'FAILS'}: {claim} {bound}: {value:.2f}")
        report.append("")
    return "\n".join(report), everything


def main() -> int:
    """Measure, print, and say by the exit status whether all bounds hold."""
    folders = build.Models.at(build.cache_dir())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[folders.smollm2, folders.gemma])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2000, 4000, 8000], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=2, help="distinct prompts of each length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    options = parser.parse_args()
    report, samples = asyncio.run(
        compare(options.models, options.lengths, options.texts, options.rounds, options.levels, print)
    )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(samples, indent=1))
    print(report)
    return int("FAILS" in report)


if __name__ == "__main__":
    sys.exit(main())
