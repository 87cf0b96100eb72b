"""The mount beside the bare filesystem (``python -m bench.mount``): reading, mapping, opening; starting the daemon.

Each pair of figures is measured in turns on the same files, hot, and the medians are compared. It takes the right to
mount.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvfs import chunk
from kvfs.config import Config
from kvfs.daemon import keeper
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.names import part_path
from kvfs.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 15
"""Measurements of each kind; the median counts."""

SMALL_PARTS = 200
BLOCK = 1 << 20


def manifest(layers: int, head_dim: int) -> Manifest:
    """Make a namespace of one part a chunk: ``layers`` x 2 x 256 x ``head_dim`` x 2 bytes."""
    kind = GroupKind("full", tuple(range(layers)), 1, head_dim, head_dim)
    return Manifest(weights=f"{layers:064x}", config={}, model_dtype="bfloat16", kv_dtype="BF16", kinds=(kind,))


LARGE = manifest(256, 1024)
SMALL = manifest(2, 64)


def put(store: Store, namespace: Manifest, key: bytes) -> Path:
    """Store one chunk of random bytes; return its file."""
    part = namespace.parts[0]
    temp = store.reserve(namespace.ns)
    payload = np.random.default_rng([*key]).bytes(chunk.layout(namespace, part, 256).nbytes)
    chunk.write_part(temp.fd, namespace, chunk.PartMeta(namespace.ns, key, bytes(32), 256, 0, part), payload)
    os.close(temp.fd)
    store.publish(namespace.ns, temp.name, key, part)
    return Path(namespace.ns_hex) / part_path(key, part)


@contextlib.contextmanager
def mounted(store: Path, point: Path, transport: str = "kernel") -> Iterator[float]:
    """Mount a store; yields the seconds that took."""
    begun = time.perf_counter()
    keeper.mount(store, point, config=Config(), transport=transport)
    try:
        yield time.perf_counter() - begun
    finally:
        keeper.umount(point, lazy=True)


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def read(fd: int) -> None:
    """Read an open file whole, into one buffer."""
    buffer, at = bytearray(BLOCK), 0
    while count := os.preadv(fd, [buffer], at):
        at += count


def add_mapped(fd: int) -> None:
    """Map an open file and add up all its words."""
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        np.frombuffer(mapped, np.uint64).sum()


def copy_mapped(fd: int) -> None:
    """Map an open file and copy it."""
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        np.frombuffer(mapped, np.uint8).copy()


def open_close(path: Path) -> None:
    """Open a file and close it."""
    os.close(os.open(path, os.O_RDONLY))


def compare(work: Callable[[int], object], bare: Path, shown: Path) -> tuple[float, float]:
    """Medians in seconds of ``work`` on the bare file and on the mounted one, in turns."""
    fds = [os.open(path, os.O_RDONLY) for path in (bare, shown)]
    try:
        for fd in fds:
            work(fd)
        rounds = [[seconds(functools.partial(work, fd)) for fd in fds] for _ in range(ROUNDS)]
    finally:
        for fd in fds:
            os.close(fd)
    return statistics.median(times[0] for times in rounds), statistics.median(times[1] for times in rounds)


def transfers(store: Store, point: Path, transport: str) -> None:
    """Print the figures of reading and opening."""
    for namespace in (LARGE, SMALL):
        store.register(namespace)
    large = put(store, LARGE, os.urandom(32))
    small = [put(store, SMALL, os.urandom(32)) for _ in range(SMALL_PARTS)]
    size = (store.path / large).stat().st_size
    with mounted(store.path, point, transport):
        for work in (read, add_mapped, copy_mapped):
            bare, shown = compare(work, store.path / large, point / large)
            print(
                f"{transport} {work.__name__} {size >> 20} MiB: {size / shown / 1e9:.1f} GB/s, bare "
                f"{size / bare / 1e9:.1f} GB/s, ratio {bare / shown:.2f}"
            )
        for path in small:
            open_close(point / path)  # verified now; the next mount knows nothing else of it
    with mounted(store.path, point, transport):
        for path in small:
            os.stat(point / path)
        first = statistics.median(seconds(functools.partial(open_close, point / path)) for path in small)
        again = statistics.median(seconds(functools.partial(open_close, point / path)) for path in small)
        bare = statistics.median(seconds(functools.partial(open_close, store.path / path)) for path in small)
        figures = f"first {first * 1e6:.0f} us, again {again * 1e6:.0f} us, bare {bare * 1e6:.0f} us"
        print(f"{transport} open+close: {figures}")


def start(store: Store, point: Path, chunks: int) -> None:
    """Print how long the daemon of a large store takes to be ready, listing it and from a snapshot."""
    store.register(SMALL)
    part = PartId("full", 0)
    for _ in range(chunks):
        path = store.path / SMALL.ns_hex / part_path(os.urandom(32), part)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with mounted(store.path, point) as listing:
        pass
    with mounted(store.path, point) as snapshot:
        pass
    print(f"daemon ready with {chunks} chunks: {listing:.2f} s by listing, {snapshot:.2f} s from its snapshot")


def main() -> None:
    """Run the benchmark in a temporary store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, help="folder for the temporary stores, on the filesystem to measure")
    parser.add_argument("--chunks", type=int, default=100_000, help="size of the store for the start")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.store) as base:
        point = Path(base) / "mnt"
        point.mkdir()
        for transport in ("kernel", "libfuse"):
            with Store.init(Path(base) / transport) as store:
                transfers(store, point, transport)
        with Store.init(Path(base) / "many") as store:
            start(store, point, options.chunks)


if __name__ == "__main__":
    main()
