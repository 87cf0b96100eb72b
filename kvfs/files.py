"""Small files and folder descriptors: opened without following links, written whole or not at all."""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from kvfs import _native
from kvfs.errors import ChunkCorrupt, ChunkNotFound, KvfsError, StoreFull, StoreReadOnly

__all__ = [
    "DIR_MODE",
    "OPEN_DIR",
    "OPEN_FILE",
    "SEALS",
    "beneath",
    "from_os_error",
    "from_read_error",
    "is_damage",
    "is_sealed",
    "lock",
    "make_dir",
    "names_in",
    "open_own",
    "read_sealed",
    "read_small",
    "replace",
    "write_new",
]

DIR_MODE = 0o750
SMALL = 1 << 20
MAX_SEALED = 4 << 30
OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK, so that a planted FIFO cannot block the open."""
_DAMAGED = frozenset({errno.EIO, errno.EREMOTEIO, errno.EBADMSG, errno.EUCLEAN})
_NOT_A_FILE = frozenset(
    {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM}
)

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""What a file in memory needs so that nobody can ever write or resize it again."""


def is_sealed(fd: int) -> bool:
    """Whether an open file lies in memory and has all `SEALS`."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # not a file that can be sealed
        return False


def from_os_error(e: OSError, what: Path) -> KvfsError:
    """The kvfs error for a failed write to a store."""
    if isinstance(e, KvfsError):
        return e
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(what)
    return StoreReadOnly(what, e.strerror or e)


def from_read_error(e: OSError, name: str) -> Exception:
    """What a failed open or read of the part ``name`` tells of it: ChunkNotFound (on a shared volume another host may
    remove it at any moment), ChunkCorrupt ``not-a-file`` or ``unreadable``; ``e`` itself if nothing, as when this
    process is out of descriptors or the volume is away."""
    if e.errno in (errno.ENOENT, errno.ESTALE):
        return ChunkNotFound(name)
    if isinstance(e, KvfsError) or not is_damage(e):
        return e
    return ChunkCorrupt(name, "not-a-file" if e.errno in _NOT_A_FILE else "unreadable", e.strerror)


def is_damage(e: OSError) -> bool:
    """Whether a failed open or read tells that the file is damaged, or none."""
    return e.errno in _NOT_A_FILE or e.errno in _DAMAGED


def make_dir(name: str, dir_fd: int) -> None:
    """Make a folder unless it is there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, DIR_MODE, dir_fd=dir_fd)


@contextlib.contextmanager
def beneath(dir_fd: int, folder: str) -> Iterator[int]:
    """A descriptor of a folder in another, for a while.  NotADirectoryError for a link, which might lead elsewhere."""
    fd = os.open(folder, OPEN_DIR, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def names_in(dir_fd: int) -> list[str]:
    """Names in an open folder, by a descriptor of their own: two who list by one at the same time share the place that
    they have come to, and each misses some.  None in a folder that was removed."""
    with contextlib.suppress(FileNotFoundError), beneath(dir_fd, ".") as own:
        return os.listdir(own)
    return []


def open_own(folder: Path, name: str, flags: int) -> int:
    """Open a file that this process writes and perhaps root with it, in a folder where others may write; it is made
    unless it is there.  OSError for a folder that is a link, and a file that has another name or is no regular one."""
    dir_fd = os.open(folder, OPEN_DIR)
    try:
        flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, 0o640, dir_fd=dir_fd)
    finally:
        os.close(dir_fd)
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_nlink != 1:
            raise OSError(errno.EPERM, f"somebody planted {name}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock(folder: Path, name: str, owner: str) -> int:
    """Hold a lock file, with ``owner`` written into it, until the descriptor returned is closed.

    BlockingIOError with what its holder has written; otherwise as `open_own`.
    """
    fd = open_own(folder, name, os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 4096, 0).decode(errors="replace").strip()
            raise BlockingIOError(holder or "another process") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, owner.encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_small(dir_fd: int | None, name: str | Path) -> bytes:
    """A file of at most 1 MiB, whole.  OSError; ValueError if it is larger or not a regular file."""
    fd = os.open(name, OPEN_FILE, dir_fd=dir_fd)
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_size > SMALL:
            raise ValueError(f"{name} is not a small regular file")
        return os.read(fd, st.st_size)
    finally:
        os.close(fd)


def read_sealed(path: Path, magic: bytes) -> bytes | None:
    """What a derived file holds behind ``magic`` and a checksum (u64, XXH3); None unless it is there and whole.

    Nothing is read of what is no regular file or begins otherwise, and never more than 4 GiB.
    """
    try:
        fd = os.open(path, OPEN_FILE)
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode) or st.st_size > MAX_SEALED or os.read(fd, len(magic)) != magic:
                return None
            with open(fd, "rb", buffering=0, closefd=False) as file:
                seal, body = file.read(8), file.readall()
        finally:
            os.close(fd)
    except OSError:
        return None
    return body if seal == struct.pack("<Q", _native.xxh3_64(body)) else None


def write_new(dir_fd: int, name: str, data: bytes, temp_dir_fd: int | None = None) -> None:
    """Write a small file whole, or leave the one that is there."""
    temp, temps = secrets.token_hex(16), dir_fd if temp_dir_fd is None else temp_dir_fd
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640, dir_fd=temps)
    try:
        with os.fdopen(fd, "wb") as file:  # which writes on where the disk took a piece
            file.write(data)
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):
            os.link(temp, name, src_dir_fd=temps, dst_dir_fd=dir_fd, follow_symlinks=False)
    finally:
        os.unlink(temp, dir_fd=temps)


def replace(path: Path, data: bytes) -> None:
    """Put a derived file in place of its older version; a reader sees one or the other, whole."""
    temp = f"{path.name}.{secrets.token_hex(8)}.tmp"
    folder = os.open(path.parent, OPEN_DIR)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(temp, flags, 0o640, dir_fd=folder), "wb") as f:
                f.write(data)
            os.replace(temp, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=folder)
            raise
    finally:
        os.close(folder)
