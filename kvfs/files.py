"""Small files and folder descriptors: opened without following links, written whole or not at all."""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path

from kvfs.errors import KvfsError, StoreFull, StoreReadOnly

__all__ = [
    "DIR_MODE",
    "OPEN_DIR",
    "OPEN_FILE",
    "from_os_error",
    "lock",
    "make_dir",
    "read_small",
    "replace",
    "write_new",
]

DIR_MODE = 0o750
SMALL = 1 << 20
OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK, so that a planted FIFO cannot block the open."""


def from_os_error(e: OSError, what: Path) -> KvfsError:
    """The kvfs error for a failed write to a store."""
    if isinstance(e, KvfsError):
        return e
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(what)
    return StoreReadOnly(what, e.strerror or e)


def make_dir(name: str, dir_fd: int) -> None:
    """Make a folder unless it is there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, DIR_MODE, dir_fd=dir_fd)


def lock(dir_fd: int, name: str, owner: str) -> int:
    """Hold a lock file, with ``owner`` written into it, until the descriptor returned is closed.

    BlockingIOError with what its holder has written.
    """
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640, dir_fd=dir_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 4096, 0).decode(errors="replace").strip()
        os.close(fd)
        raise BlockingIOError(holder or "another process") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, owner.encode(), 0)
    return fd


def read_small(dir_fd: int, name: str) -> bytes:
    """A file of at most 1 MiB, whole.  OSError; ValueError if it is larger or not a regular file."""
    fd = os.open(name, OPEN_FILE, dir_fd=dir_fd)
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_size > SMALL:
            raise ValueError(f"{name} is not a small regular file")
        return os.read(fd, SMALL)
    finally:
        os.close(fd)


def write_new(dir_fd: int, name: str, data: bytes, temp_dir: str = ".") -> None:
    """Write a small file whole, or leave the one that is there."""
    temp = f"{temp_dir}/{secrets.token_hex(16)}"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640, dir_fd=dir_fd)
    try:
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        with contextlib.suppress(FileExistsError):
            os.link(temp, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
    finally:
        os.unlink(temp, dir_fd=dir_fd)


def replace(path: Path, data: bytes) -> None:
    """Put a derived file in place of its older version; a reader sees one or the other, whole."""
    temp = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
