"""A filesystem that can be made to hang: a folder shown through FUSE by a process that can be stopped.

Run as ``python -m tests.stoppable FOLDER MOUNTPOINT``; nothing is cached, so that every call reaches the process.
"""

# ruff: noqa: ARG002 - the arguments are FUSE's

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mfusepy


class Loopback(mfusepy.Operations):
    """What a reader of a store needs of a filesystem."""

    use_ns = True

    def __init__(self, root: str) -> None:
        self.root = root

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        st = os.lstat(self.root + path)
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
        return {name: getattr(st, name) for name in names} | {
            "st_mtime": st.st_mtime_ns,
            "st_ctime": st.st_ctime_ns,
            "st_atime": st.st_atime_ns,
        }

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self.root + path)]

    def open(self, path: str, flags: int) -> int:
        return os.open(self.root + path, flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0


def show(folder: Path, mountpoint: Path) -> subprocess.Popen[bytes]:
    """Start the process and wait until the mount is there."""
    command = [sys.executable, "-m", "tests.stoppable", os.fspath(folder), os.fspath(mountpoint)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 20
    while not os.path.ismount(mountpoint):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


if __name__ == "__main__":
    mfusepy.FUSE(
        Loopback(sys.argv[1]),
        sys.argv[2],
        foreground=True,
        entry_timeout=0,
        attr_timeout=0,
        negative_timeout=0,
        ro=True,
    )
