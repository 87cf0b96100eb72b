"""What a disk has had to write, and what is worth writing once its budget for a day is spent.

An SSD is built for so many writes of its whole capacity a day. Beyond the budget only what is offered a second time is
stored: most texts never come again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from array import array
from typing import TYPE_CHECKING, Final

from kvfs import files

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

HOURS: Final = 24
SLOTS: Final = 1 << 16
"""Keys that the doorkeeper remembers, 12 bytes each; a newer one takes the place of an older."""
AGAIN: Final = 10
"""Seconds after which a key counts as offered again: until then other parts of the chunk are offered for the first
time."""


class Doorkeeper:
    """A set of keys that were refused lately, in constant memory: as a Bloom filter, it may know a key it never saw."""

    def __init__(self) -> None:
        self._key, self._when = array("Q", bytes(8 * SLOTS)), array("I", bytes(4 * SLOTS))

    def knows(self, key: bytes, now: int) -> bool:
        """Whether a key was refused some time before ``now`` (seconds); from now on it has been."""
        mark = int.from_bytes(key[:8], "little") | 1
        slot = mark % (SLOTS - 1)
        if self._key[slot] == mark:
            return now - self._when[slot] >= AGAIN
        self._key[slot], self._when[slot] = mark, now
        return False


class Wear:
    """Bytes written to one filesystem in each of the last hours. Thread-safe. ``limit``: bytes in 24 hours, or None."""

    def __init__(self, path: Path, limit: int | None) -> None:
        self.limit = limit
        self._path = path
        self._doorkeeper = Doorkeeper()
        self._lock = threading.Lock()
        self._written = self._load()

    def wrote(self, nbytes: int) -> None:
        """Count what has been written."""
        hour = int(time.time() // 3600)
        with self._lock:
            self._written[hour] = self._written.get(hour, 0) + nbytes
            for old in [each for each in self._written if each <= hour - HOURS]:
                del self._written[old]

    def today(self) -> int:
        """Bytes written in the last 24 hours, by the hour."""
        since = int(time.time() // 3600) - HOURS
        with self._lock:
            return sum(nbytes for hour, nbytes in self._written.items() if hour > since)

    def admits(self, key: bytes | None, nbytes: int) -> bool:
        """Whether ``nbytes`` of the chunk ``key`` (None: not told) may be written: the budget allows it, or the chunk
        has been offered before."""
        if self.limit is None or self.today() + nbytes <= self.limit:
            return True
        with self._lock:
            return key is not None and self._doorkeeper.knows(key, int(time.time()))

    def save(self) -> None:
        """Write it for the next start; derived data, safe to delete at any time. OSError."""
        with self._lock:
            written = {str(hour): nbytes for hour, nbytes in self._written.items()}
        files.replace(self._path, json.dumps(written).encode())

    def _load(self) -> dict[int, int]:
        try:
            return {int(hour): int(nbytes) for hour, nbytes in json.loads(files.read_small(None, self._path)).items()}
        except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            return {}
