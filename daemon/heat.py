"""Which compacted chunks are used again, often enough to get their raw form back."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import Final

MAX_WARM: Final = 4096
"""Chunks whose uses are counted, and chunks that wait to be brought back."""

Chunk = tuple[bytes, bytes]
"""Namespace and key."""


class Heat:
    """Uses of chunks within ``window`` seconds; with ``hits`` of them a chunk is hot. Thread-safe."""

    def __init__(self, hits: int, window: float) -> None:
        self._hits, self._window = hits, window
        self._lock = threading.Lock()
        self._warm: OrderedDict[Chunk, list[int]] = OrderedDict()
        self._hot: deque[Chunk] = deque(maxlen=MAX_WARM)

    def used(self, ns: bytes, key: bytes) -> bool:
        """Somebody reads a chunk that has no raw form; True if it has become hot. Uses within one second are one: a
        chunk has several parts."""
        now = int(time.time())
        with self._lock:
            times = [at for at in self._warm.pop((ns, key), []) if now - at < self._window]
            if not times or times[-1] != now:
                times.append(now)
            if len(times) >= self._hits:
                self._hot.append((ns, key))
                return True
            self._warm[ns, key] = times
            if len(self._warm) > MAX_WARM:
                self._warm.popitem(last=False)
            return False

    def take(self) -> Chunk | None:
        """The next chunk to bring back, if there is one."""
        with self._lock:
            return self._hot.popleft() if self._hot else None
