"""Memory that transfers pass through: bounded in bytes, and used again, since fresh pages cost more than the copy."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kvfs.errors import DeadlineExceeded

__all__ = ["Bytes", "Staging", "pageable"]

Bytes = npt.NDArray[np.uint8]

WAIT = 1.0
"""Seconds that a transfer waits for memory that others pass through."""


def pageable(nbytes: int) -> Bytes:
    """Ordinary memory."""
    return np.empty(nbytes, dtype=np.uint8)


class Staging:
    """At most ``limit`` bytes in buffers made by ``allocate``; buffers of equal size are reused. Thread-safe."""

    def __init__(self, limit: int, allocate: Callable[[int], Bytes] = pageable) -> None:
        self.limit = limit
        self._allocate = allocate
        self._changed = threading.Condition()
        self._free: dict[int, list[Bytes]] = defaultdict(list)
        self._free_bytes = 0
        self.used = 0

    def take(self, nbytes: int, wait: float = 0.0) -> Bytes | None:
        """A buffer of exactly ``nbytes``; None if within ``wait`` seconds there is no room for it."""
        until = time.monotonic() + wait
        with self._changed:
            while self.used + nbytes > self.limit:
                left = until - time.monotonic()
                if left <= 0 or nbytes > self.limit:
                    return None
                self._changed.wait(left)
            self.used += nbytes
            if self._free[nbytes]:
                self._free_bytes -= nbytes
                return self._free[nbytes].pop()
            while self.used + self._free_bytes > self.limit:
                size = max(size for size, buffers in self._free.items() if buffers)
                self._free[size].pop()
                self._free_bytes -= size
        return self._allocate(nbytes)

    @contextlib.contextmanager
    def lend(self, nbytes: int) -> Iterator[Bytes]:
        """A buffer of exactly ``nbytes`` while this lasts. DeadlineExceeded if there is no room for it in time."""
        buffer = self.take(nbytes, WAIT)
        if buffer is None:
            raise DeadlineExceeded("waiting for memory to load through", WAIT)
        try:
            yield buffer
        finally:
            self.give(buffer)

    def give(self, buffer: Bytes) -> None:
        """Give a buffer back; nobody may touch it any more."""
        with self._changed:
            self.used -= buffer.nbytes
            self._free[buffer.nbytes].append(buffer)
            self._free_bytes += buffer.nbytes
            self._changed.notify_all()
