"""Coded parts decoded once for all who read them: a bounded area of sealed files in memory.

Every reader gets a descriptor of its own, so the kernel knows whether a file is in use: by a lease, a passthrough open,
a map, in any process. What nobody uses goes when room is needed, the longest unused first.
"""

import errno
import fcntl
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from kvfs.coded import CodedFile, reopen
from kvfs.errors import StoreBusy

__all__ = ["Area"]

Source = tuple[int, int, int]
"""Device, inode and ctime of a coded file."""


class Decoded(NamedTuple):
    """A file of the raw form in memory, and its bytes."""

    fd: int
    size: int


class Area:
    """Decoded parts, together at most ``limit`` bytes, or one part where that is larger.  Thread-safe.

    ``release(source)`` is asked to let go of a decoded part that only its owner's own caches may be keeping open.
    """

    def __init__(self, limit: int, release: Callable[[Source], None] = lambda _: None) -> None:
        self._limit, self.release = limit, release
        self._lock = threading.Lock()
        self._files: OrderedDict[Source, Decoded] = OrderedDict()
        self._coming: dict[Source, Future[None]] = {}
        self.used = 0
        """Bytes of all files, those being decoded included."""
        self.decoded = 0
        """Bytes decoded so far."""

    def open(self, file: CodedFile) -> int:
        """A read-only descriptor of the raw form of a coded part, which the caller closes; ``file`` stays open.

        Of several who ask at once, one decodes.  StoreBusy while the area is full of parts in use; ChunkCorrupt as
        `CodedFile.decode`.
        """
        source = source_of(os.fstat(file.fd))
        while True:
            with self._lock:
                if (known := self._files.get(source)) is not None:
                    self._files.move_to_end(source)
                    return reopen(known.fd)
                coming = self._coming.get(source)
                if coming is None:
                    size = file.raw_size()
                    self._make_room(size)
                    self.used += size
                    mine = self._coming[source] = Future()
            if coming is None:
                return self._decode(file, source, size, mine)
            coming.result()

    def _decode(self, file: CodedFile, source: Source, size: int, mine: "Future[None]") -> int:
        try:
            fd = file.decode()
        except BaseException as e:
            with self._lock:
                self.used -= size
                del self._coming[source]
            mine.set_exception(e)
            raise
        with self._lock:
            self._files[source] = Decoded(fd, size)
            self.decoded += size
            del self._coming[source]
            fresh = reopen(fd)
        mine.set_result(None)
        return fresh

    def _make_room(self, size: int) -> None:
        for source, (fd, nbytes) in list(self._files.items()):
            if self.used + size <= self._limit:
                return
            if _in_use(fd):
                self.release(source)
            if not _in_use(fd):
                os.close(fd)
                del self._files[source]
                self.used -= nbytes
        if self.used and self.used + size > self._limit:
            raise StoreBusy(f"the memory for decoded parts ({self._limit} bytes)", f"{len(self._files)} open parts")

    def close(self) -> None:
        """Forget all files; descriptors handed out go on."""
        with self._lock:
            for fd, _ in self._files.values():
                os.close(fd)
            self._files.clear()
            self.used = 0


def source_of(st: os.stat_result) -> Source:
    """What names the file whose status is ``st``."""
    return st.st_dev, st.st_ino, st.st_ctime_ns


def _in_use(fd: int) -> bool:
    """Whether anything but ``fd`` has the file open: the kernel grants a write lease to its only opener.

    Where there are no leases on files in memory they count as unused: they go when their users end.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as e:
        return e.errno == errno.EAGAIN
    return False
