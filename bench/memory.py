"""Memory as it is on a host that has run for a day: none is free, and what is asked for was somebody's before.

A virtual machine may give free memory back to its host. Then each page taken from there is a fault of the hypervisor,
and whatever writes files pays that for every page of them, ten times what the copy itself takes.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE


def available() -> int:
    """Return the bytes that the kernel could give to processes."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


@contextlib.contextmanager
def full(left: int) -> Iterator[None]:
    """Hold all available memory but ``left`` bytes while this lasts, and begin with those full of file pages."""
    with mmap.mmap(-1, max(PAGE, available() - left)) as held:
        for at in range(0, len(held), PAGE):
            held[at] = 1
        with tempfile.TemporaryFile() as sparse:
            sparse.truncate(left + left // 2)
            while sparse.read(1 << 22):
                pass
        yield
