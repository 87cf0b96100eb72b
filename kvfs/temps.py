"""``tmp/`` of a namespace: files being written, each under a name of its own.  ``root`` is the namespace's folder."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import NamedTuple

from kvfs.errors import ChunkNotFound
from kvfs.files import beneath
from kvfs.names import is_temp

__all__ = ["TEMPS", "TEMP_GRACE", "Temp", "checked", "create", "discard", "listed", "reap"]

TEMPS = "tmp"
TEMP_GRACE = 60.0
"""Seconds after which a temp file nobody wrote to belongs to a dead writer."""


class Temp(NamedTuple):
    """A file being written: a descriptor open for reading and writing, and its name in ``<ns>/tmp``."""

    fd: int
    name: str


def checked(name: str) -> str:
    """The name, if it is one that `create` gives out; else ChunkNotFound."""
    if not is_temp(name):
        raise ChunkNotFound(f"temp {name!r}")
    return name


def create(root: int) -> Temp:
    """A new empty temp file.  OSError."""
    name = secrets.token_hex(16)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with beneath(root, TEMPS) as temps:
        return Temp(os.open(name, flags, 0o600, dir_fd=temps), name)


def listed(root: int) -> Iterator[tuple[str, os.stat_result]]:
    """Every temp file of a namespace with its status."""
    absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
    with absent, beneath(root, TEMPS) as fd:
        for name in filter(is_temp, os.listdir(fd)):
            with contextlib.suppress(FileNotFoundError):
                yield name, os.stat(name, dir_fd=fd, follow_symlinks=False)


def discard(root: int, name: str) -> None:
    """Remove a temp file; it may be gone already."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), beneath(root, TEMPS) as temps:
        os.unlink(checked(name), dir_fd=temps)


def reap(root: int, older_than: float) -> int:
    """Remove temp files not written to for ``older_than`` seconds, by the clock that stamps them: it may be that of a
    server.  Returns how many."""
    found = [(name, st.st_mtime) for name, st in listed(root)]
    if not found:
        return 0
    probe = create(root)
    try:
        now = os.fstat(probe.fd).st_mtime
    finally:
        os.close(probe.fd)
        discard(root, probe.name)
    old = [name for name, written in found if now - written > older_than]
    for name in old:
        discard(root, name)
    return len(old)
