"""Eviction: what a decision costs as the store grows, what lookups cost then, and what an idle evictor costs.

Decisions are those of the index and its policy, without the files: texts of 20 chunks, evicted one by one while as many
are added, so that the store keeps its size.
"""

from __future__ import annotations

import argparse
import os
import resource
import secrets
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kvfs.chunk import PartMeta
from kvfs.config import Amount, Config
from kvfs.identity import GroupKind, Manifest
from kvfs.index import Index
from kvfs.store import Store
from kvfs.upkeep.evict import Evictor
from kvfs.upkeep.leases import Leases
from kvfs.upkeep.policy import POLICIES

LENGTH = 20
DECISIONS = 40_000
MANIFEST = Manifest(
    weights="ee" * 32,
    config={"model_type": "bench"},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", (0,), 1, 64, 64),),
)
PART = MANIFEST.parts[0]
SIZE = 12288


class Result(NamedTuple):
    """One row: chunks, decisions a second, microseconds a key of a lookup of 500, bytes of memory a chunk, seconds to
    save a snapshot and to load it, share of a processor that the idle evictor takes."""

    policy: str
    chunks: int
    decisions: float
    lookup: float
    memory: float
    save: float
    load: float
    idle: float


def rss() -> int:
    """Bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def add_text(index: Index, length: int = LENGTH) -> list[bytes]:
    """Add the chunks of one text."""
    keys = [secrets.token_bytes(32) for _ in range(length)]
    for i, key in enumerate(keys):
        parent = keys[i - 1] if i else bytes(32)
        index.add(MANIFEST.ns, key, PART, SIZE, PartMeta(MANIFEST.ns, key, parent, 256, i * 256, PART))
    return keys


def measure(store: Store, policy: str, chunks: int) -> Result:
    """Fill an index, then evict from it, look things up in it, save it, load it, and leave it alone."""
    begun = rss()
    index = Index(store, POLICIES[policy])
    index.register(MANIFEST.ns)
    texts = [add_text(index) for _ in range(chunks // LENGTH)]
    memory = (rss() - begun) / chunks
    for n, keys in enumerate(texts):
        if n % 3 == 0:
            index.look(MANIFEST.ns, keys)
    del texts, keys
    spent = 0.0
    for _ in range(DECISIONS // LENGTH):
        start = time.perf_counter()
        for _ in range(LENGTH):
            victim = index.victim(MANIFEST.ns)
            assert victim is not None
            assert index.evict(MANIFEST.ns, victim.key)
        spent += time.perf_counter() - start
        add_text(index)
    long = add_text(index, 500)
    lookup = 1.0
    for _ in range(3):
        time.sleep(1.0)  # once a second a lookup moves all it finds
        start = time.perf_counter()
        index.look(MANIFEST.ns, long)
        lookup = min(lookup, (time.perf_counter() - start) / len(long))
    start = time.perf_counter()
    index.save()
    saved = time.perf_counter() - start
    start = time.perf_counter()
    assert Index(store, POLICIES[policy]).load()
    loaded = time.perf_counter() - start
    return Result(policy, chunks, DECISIONS / spent, lookup, memory, saved, loaded, idle(store, index))


def idle(store: Store, index: Index, seconds: float = 5.0) -> float:
    """The share of one processor that the evictor takes with nothing to do."""
    config = Config(ttl=86400.0, budget=Amount(1 << 60, 0.0))
    evictor = Evictor(store, index, Leases(), config, lambda *_: None, lambda *_: None)
    evictor.start()
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    evictor.close()
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--chunks", nargs="+", type=int, default=[10**4, 10**5, 10**6])
    options = parser.parse_args()
    print("| policy | chunks | decisions/s | µs each | µs a key looked up | bytes a chunk | save, s | load, s | idle |")
    print("|---|---|---|---|---|---|---|---|---|")
    for policy in options.policy:
        for chunks in options.chunks:
            if pid := os.fork():  # a process for each: memory is measured
                os.waitpid(pid, 0)
                continue
            with tempfile.TemporaryDirectory() as folder, Store.init(Path(folder) / "s") as store:
                store.register(MANIFEST)
                r = measure(store, policy, chunks)
            print(
                f"| {r.policy} | {r.chunks:,} | {r.decisions:,.0f} | {1e6 / r.decisions:.1f} | {1e6 * r.lookup:.2f} | "
                f"{r.memory:.0f} | {r.save:.2f} | {r.load:.2f} | {r.idle:.2%} |",
                flush=True,
            )
            os._exit(0)


if __name__ == "__main__":
    main()
