"""Many readers, one copy: what a second process costs that maps the same chunks through the mount."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

from kvfs.identity import GroupKind, Manifest
from tests import samples
from tests.mounted import mounted, needs_mount, place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MANIFEST = Manifest(
    weights="cd" * 32,
    config={},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", tuple(range(32)), 1, 128, 128),),
)
CHUNKS = 24
"""4 MiB each."""

READER = """
import mmap, os, sys
def uss():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(("Private_Clean", "Private_Dirty"))) * 1024
maps, total = [], 0
before = uss()
for name in sys.argv[1:]:
    fd = os.open(name, os.O_RDONLY)
    m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)
    total += sum(m[i] >= 0 for i in range(0, len(m), 4096)) * 4096
    maps.append(m)
print(uss() - before, total, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def reading(names: list[str]) -> Iterator[tuple[int, int]]:
    """A process that has mapped and touched the files: bytes of memory that only it has, and bytes touched."""
    command = ["timeout", "60", sys.executable, "-c", READER, *names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        unique, total = map(int, process.stdout.readline().split())
        yield unique, total
        process.stdin.close()


@needs_mount
def test_a_second_process_adds_under_one_percent(tmp_path: Path) -> None:
    """Unique memory (USS) of a process that touches every page, while another has them mapped."""
    keys = [bytes([i]) * 32 for i in range(CHUNKS)]
    with samples.new_store(tmp_path / "kv", MANIFEST) as store:
        for key in keys:
            samples.put(store, key, manifest=MANIFEST)
    point = tmp_path / "mnt"
    point.mkdir()
    with mounted(tmp_path / "kv", point):
        names = [str(place(point, key, MANIFEST.parts[0], MANIFEST)) for key in keys]
        with reading(names), reading(names) as told:
            unique, total = told
    assert total >= CHUNKS * 4 << 20
    assert unique < total / 100
