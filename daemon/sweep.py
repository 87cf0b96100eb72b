"""Compaction on request: of everything cold, now; and what that would save."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvfs.codec import FORMS, Level
from kvfs.daemon.shown import stored_files
from kvfs.errors import ChunkCorrupt, ChunkNotFound, Unsupported

if TYPE_CHECKING:
    from kvfs.daemon.catalog import Catalog
    from kvfs.identity import PartId

AFTER: Final = 3600.0
"""Seconds without use after which a chunk is cold where the setting is off."""
SAMPLE: Final = 4
"""Chunks that are coded for an estimate."""


class Swept(NamedTuple):
    """What one sweep has done: chunks looked at, bytes of their files before and after, and whether none is left."""

    chunks: int
    before: int
    after: int
    done: bool


class Sweeper:
    """Sweeps of one store, in the thread of whoever asks for them."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog, self._compactor = catalog, catalog.compactor

    def sweep(self, ns: bytes | None, idle: float | None, seconds: float) -> Swept:
        """For about ``seconds``, compact chunks of a namespace, or of all (None), that were not used for ``idle``
        seconds (None: as configured) and that nobody holds. DaemonUnavailable, StoreFull."""
        catalog, until, idle = self._catalog, time.monotonic() + seconds, self._idle(idle)
        namespaces = catalog.index.namespaces() if ns is None else [ns]
        chunks = before = after = 0
        while time.monotonic() < until:
            cold = [
                each
                for each in self._compactor.cold(namespaces, time.time() - idle)
                if not self._compactor.is_held(*each)
            ]
            if not cold:
                return Swept(chunks, before, after, True)
            for each in cold:
                had = self._size(*each)
                self._compactor.compact(*each)
                chunks, before, after = chunks + 1, before + had, after + self._size(*each)
                if time.monotonic() > until:
                    break
        return Swept(chunks, before, after, False)

    def _idle(self, idle: float | None) -> float:
        after = self._catalog.config.compact_after
        return idle if idle is not None else AFTER if after is None else after

    def _size(self, ns: bytes, key: bytes) -> int:
        row = self._catalog.index.get(ns, key)
        return row.size if row else 0

    def plan(self, ns: bytes | None, idle: float | None, level: Level | None = None) -> list[dict[str, Any]]:
        """What a sweep would do, a row for each namespace: chunks, their bytes, the level, and what it is expected to
        save, judged by coding some of the parts."""
        catalog, rows = self._catalog, []
        for each in catalog.index.namespaces() if ns is None else [ns]:
            to = level or self._compactor.target(each)
            keys = catalog.index.cold(each, FORMS.index(to.form), time.time() - self._idle(idle), 1 << 62)
            size = sum(self._size(each, key) for key in keys)
            ratio = self._ratio(each, keys, to)
            rows.append(
                {"ns": each.hex(), "chunks": len(keys), "bytes": size, "level": to.name, "saving": int(size * ratio)}
            )
        return rows

    def _ratio(self, ns: bytes, keys: list[bytes], level: Level) -> float:
        """The share of their bytes that some of these chunks would save."""
        before = after = 0
        for key in keys[:: max(1, len(keys) // SAMPLE)][:SAMPLE]:
            for part in self._compactor.parts(ns, key):
                sizes = {form: st.st_size for form, st in stored_files(self._catalog.store, ns, key, part).items()}
                before += sum(sizes.values())
                after += sizes.get(True) or sizes.get(False, 0)
                if False in sizes and True not in sizes:
                    with contextlib.suppress(ChunkNotFound, ChunkCorrupt, Unsupported):
                        after += min(0, self._trial(ns, key, part, level) - sizes[False])
        return 1 - after / before if before else 0.0

    def _trial(self, ns: bytes, key: bytes, part: PartId, level: Level) -> int:
        """Bytes that a part would take."""
        out = os.memfd_create("kvfs-trial", os.MFD_CLOEXEC)
        try:
            return self._compactor.make_form(ns, key, part, level.name, out).size
        finally:
            os.close(out)
