"""Parts that somebody copies into the mount: hidden while they are written, published when they are closed."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from kvfs import chunk
from kvfs.daemon.tree import Place, path_of

if TYPE_CHECKING:
    from kvfs.daemon.catalog import Catalog


def refusal(code: int) -> OSError:
    """The error of the filesystem for an errno."""
    return OSError(code, os.strerror(code))


class Incoming:
    """One file being copied in, until it is published or thrown away."""

    def __init__(self, catalog: Catalog, place: Place) -> None:
        manifest = catalog.store.manifest(place.ns)
        self._catalog, self.place = catalog, place
        self._most = chunk.MAX_HEADER + chunk.layout(manifest, place.part, manifest.chunk_tokens).nbytes
        temp = catalog.reserve(place.ns, self._most, place.key)
        self._fd, self._temp = temp.fd, temp.name
        self._written = False
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """Where it will be seen."""
        return path_of(self.place.ns, self.place.key, self.place.part)

    def stat(self) -> os.stat_result:
        """What has been written so far; EBADF once it has ended."""
        with self._lock:
            return os.fstat(self._open_fd())

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise refusal(errno.EBADF)
        return self._fd

    def write(self, data: memoryview, offset: int) -> int:
        """Write; the error of the disk is the caller's. EFBIG beyond what any part of the namespace can be."""
        if offset + len(data) > self._most:
            raise refusal(errno.EFBIG)
        with self._lock:
            self._written = True
            return os.pwrite(self._open_fd(), data, offset)

    def truncate(self, size: int) -> None:
        """Cut or extend; otherwise as `write`."""
        if size > self._most:
            raise refusal(errno.EFBIG)
        with self._lock:
            self._written = self._written or size > 0
            os.ftruncate(self._open_fd(), size)

    def flush(self) -> bool:
        """Publish what was written; True if that ended it. Raises ChunkCorrupt (EIO) for what is not the part that
        its name says.

        A flush is not always the end: a shell that moves the descriptor, or a process that starts another, closes a
        copy of it first. So a file that is empty or not as long as its header says stays open for more.
        """
        with self._lock:
            if not self._written or self._fd < 0:
                return False
            chunk.read_header(self._fd, self.place.name)
            os.close(self._fd)  # a file is published only when nobody can write to it
            self._fd = -1
            self._catalog.publish_file(self.place.ns, self._temp, self.place.key, self.place.part)
            return True

    def abandon(self) -> None:
        """Throw away what was not published."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self._catalog.discard(self.place.ns, self._temp)
