"""A medium of a stated speed: the block layer holds back what a group of processes reads from a disk.

Reads that the page cache answers are as fast as ever, so drop it before measuring. Control groups do it, version 1
(``blkio.throttle.read_bps_device``) or version 2 (``io.max``); it takes root, and a store on a block device of its own
kernel: not a network filesystem, an overlay or btrfs.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

V1, V2 = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")


def disk_of(path: Path) -> str:
    """Return ``major:minor`` of the whole disk that a path lies on. Raises FileNotFoundError where that is no disk."""
    device = os.stat(path).st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    disk = place.parent if (place / "partition").exists() else place
    return (disk / "dev").read_text().strip()


class Medium:
    """The disk of a path, as the processes of one control group see it. Make one with ``medium``."""

    def __init__(self, disk: str, group: Path) -> None:
        self._disk, self._group = disk, group

    def limit(self, rate: int | None) -> None:
        """Let the group read so many bytes a second from the disk; None: as many as it can."""
        if self._group.parent == V1:
            (self._group / "blkio.throttle.read_bps_device").write_text(f"{self._disk} {rate or 0}")
        else:
            (self._group / "io.max").write_text(f"{self._disk} rbps={rate or 'max'}")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in the group while this lasts; what is started meanwhile stays in it."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._group.parent / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def medium(path: Path) -> Iterator[Medium]:
    """Make the control group, and remove it once its processes have ended. Raises OSError where that cannot be."""
    disk = disk_of(path)
    group = (V1 if V1.exists() else V2) / f"kvfs-bench-{os.getpid()}"
    group.mkdir()
    try:
        yield Medium(disk, group)
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)
