"""What may be written: within the budgets, and worth it. Everything refused is counted, and its writer told why."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Final

from kvfs.errors import KvfsError, StoreFull

if TYPE_CHECKING:
    from kvfs.daemon.wear import Wear
    from kvfs.identity import PartId
    from kvfs.metrics import Metrics
    from kvfs.store import Temp
    from kvfs.upkeep.evict import Evictor
    from kvfs.verify import Admitted, Verifier

PROBE: Final = 1.0
"""Seconds between two tries whether the disk is full."""


class Admission:
    """Files being written, and those that might be. Thread-safe."""

    def __init__(self, verifier: Verifier, evictor: Evictor, wear: Wear, metrics: Metrics) -> None:
        self._verifier, self._evictor, self._wear, self._metrics = verifier, evictor, wear, metrics
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._pending: dict[str, int] = {}
        self._probed = 0.0

    @property
    def pending(self) -> int:
        """Bytes of files being written."""
        with self._lock:
            return sum(self._pending.values())

    @property
    def files(self) -> int:
        """Files being written."""
        return len(self._pending)

    def reserve(self, ns: bytes, nbytes: int, key: bytes | None) -> Temp:
        """A temp file for ``nbytes`` of the chunk ``key``; StoreFull with the reason, NamespaceNotFound,
        StoreReadOnly."""
        self._verifier.store.manifest(ns)
        with self._turn:  # what others are granted meanwhile counts
            reason = self._evictor.lacking(ns, nbytes, self.pending)
            if reason is None and not self._wear.admits(key, nbytes):
                reason = "writes"
            try:
                if reason is not None:
                    raise StoreFull(f"{nbytes} bytes in {self._verifier.store.path} ({reason})", reason)
                temp = self._verifier.reserve(ns, nbytes)
            except StoreFull as e:
                self._metrics.refused.labels(e.reason).inc()
                if reason is None:
                    self._evictor.press()
                raise
            with self._lock:
                self._pending[temp.name] = nbytes
        return temp

    def admit(self, ns: bytes, temp: str, key: bytes, part: PartId) -> Admitted:
        """Check a written temp file and publish it; raises as `Verifier.admit`. It counts as being written until `end`,
        so that its bytes are always in one account."""
        try:
            admitted = self._verifier.admit(ns, temp, key, part)
        except StoreFull:
            self._evictor.press()
            raise
        self._wear.wrote(admitted.size)
        return admitted

    def end(self, temp: str) -> int:
        """A file is not being written any more; returns the bytes that were reserved for it."""
        with self._lock:
            return self._pending.pop(temp, 0)

    def discard(self, ns: bytes, temp: str) -> None:
        """Remove a temp file whose writer has given up, perhaps as it met a full disk."""
        nbytes = self.end(temp)
        self._verifier.store.discard(ns, temp)
        if nbytes and time.monotonic() - self._probed > PROBE:
            self._probed = time.monotonic()
            self._probe(ns, nbytes)

    def _probe(self, ns: bytes, nbytes: int) -> None:
        """See whether so much can be written, as far as the filesystem can tell without writing it."""
        try:
            probe = self._verifier.store.reserve(ns)
            try:
                os.posix_fallocate(probe.fd, 0, nbytes)
            finally:
                os.close(probe.fd)
                self._verifier.store.discard(ns, probe.name)
        except (KvfsError, OSError):
            self._evictor.press()
