"""What a daemon takes that has nothing to do: processor time and memory of its processes over a store of any size.

The store is real, with small parts (8 KiB on disk each), and a snapshot as an earlier daemon would have left it. It is
made once and kept with ``--store``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kvfs import _native, chunk
from kvfs.config import Config
from kvfs.daemon import keeper
from kvfs.identity import GroupKind, Manifest
from kvfs.index import Index
from kvfs.names import leaf_name, part_name
from kvfs.store import Store

MANIFEST = Manifest(
    weights="1d" * 32,
    config={"model_type": "idle"},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", (0,), 1, 8, 8),),
    chunk_tokens=64,
)
PART = MANIFEST.parts[0]
LENGTH = 20
"""Chunks of a text."""
TICKS = os.sysconf("SC_CLK_TCK")


class Taken(NamedTuple):
    """Processor seconds of a process so far, and bytes of its memory."""

    seconds: float
    memory: int


def taken(pid: int) -> Taken:
    """What a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Taken((int(fields[11]) + int(fields[12])) / TICKS, pages * os.sysconf("SC_PAGE_SIZE"))


def fill(path: Path, chunks: int) -> None:
    """Make a store of so many chunks, and the snapshot of its index."""
    with Store.init(path) as store:
        ns = store.register(MANIFEST, {"name": "idle"})
        folder, index = path / ns.hex(), Index(store)
        for leaf in range(4096):
            (folder / f"{leaf:03x}").mkdir(mode=0o750, exist_ok=True)
        lay = chunk.layout(MANIFEST, PART, 64)
        data = bytes(lay.nbytes)
        sums = _native.sums(data, lay.bounds)
        parent = bytes(32)
        for n in range(chunks):
            key = hashlib.sha256(n.to_bytes(8, "little")).digest()
            at = n % LENGTH
            meta = chunk.PartMeta(ns, key, parent if at else bytes(32), 64, at * 64, PART)
            raw = chunk.encode_header(MANIFEST, meta, sums) + data
            fd = os.open(folder / leaf_name(key) / part_name(key, PART), os.O_WRONLY | os.O_CREAT, 0o440)
            os.write(fd, raw)
            os.close(fd)
            index.add(ns, key, PART, len(raw), meta)
            parent = key
        index.save()


def daemon_of(store: Path) -> dict[str, int]:
    """The pids of keeper, worker and the worker's process for coding."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                is_coder = (process / "comm").read_text() == "kvfs-coder\n"
            except OSError:  # gone meanwhile
                continue
            for name in ("keeper", "worker"):
                if f"kvfs.daemon.{name}".encode() in words and os.fsencode(store) in words:
                    found["coder" if is_coder else name] = int(process.name)
    return found


def measure(store: Path, settle: float, seconds: float) -> dict[str, tuple[float, int]]:
    """Mount, wait until the first listing is over, and watch: shares of a processor, and bytes of memory."""
    with tempfile.TemporaryDirectory() as folder:
        point = Path(folder) / "mnt"
        point.mkdir()
        begun = time.monotonic()
        keeper.mount(store, point, config=Config(), transport="kernel")
        print(f"answers after {time.monotonic() - begun:.2f} s", flush=True)
        try:
            pids = daemon_of(store.resolve())
            time.sleep(settle)
            before = {name: taken(pid) for name, pid in pids.items()}
            print(f"to settle: {before['worker'].seconds:.1f} s of a processor", flush=True)
            time.sleep(seconds)
            after = {name: taken(pid) for name, pid in pids.items()}
        finally:
            keeper.umount(point, lazy=True)
    return {name: ((after[name].seconds - before[name].seconds) / seconds, after[name].memory) for name in pids}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--settle", type=float, default=90.0, help="seconds before the watch begins")
    parser.add_argument("--seconds", type=float, default=300.0, help="of watching")
    parser.add_argument("--store", type=Path, help="made there if it is not there yet, and kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        if not store.exists():
            begun = time.monotonic()
            fill(store, options.chunks)
            print(f"{options.chunks:,} chunks made in {time.monotonic() - begun:.0f} s", flush=True)
        for name, (share, memory) in measure(store, options.settle, options.seconds).items():
            print(f"{name}: {share:.2%} of a processor, {memory / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
