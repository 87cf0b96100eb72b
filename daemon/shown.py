"""The files in the store behind a part that the mount shows, which is always the raw form."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from kvfs.errors import ChunkCorrupt
from kvfs.hydrate import Source, source_of
from kvfs.names import part_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.tree import Place
    from kvfs.identity import PartId
    from kvfs.store import Store

MAX_SIZES: Final = 1 << 16
"""Coded files whose raw sizes are remembered."""


def stored_files(store: Store, ns: bytes, key: bytes, part: PartId) -> dict[bool, os.stat_result]:
    """The files of a part, by form (True: coded)."""
    found = {}
    for coded in (False, True):
        with contextlib.suppress(FileNotFoundError):
            found[coded] = os.lstat(f"{store.path}/{ns.hex()}/{part_path(key, part, coded)}")  # often: no Path is made
    return found


class Shown:
    """What the mount says of parts. Thread-safe."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._sizes: OrderedDict[Source, int] = OrderedDict()
        self._lock = threading.Lock()

    def _lstat(self, place: Place, coded: bool) -> os.stat_result:
        return os.lstat(self._catalog.store.path / place.ns.hex() / part_path(place.key, place.part, coded))

    def exists(self, place: Place) -> bool:
        """Whether the part is there in either form."""
        for coded in (False, True):
            with contextlib.suppress(OSError):
                self._lstat(place, coded)
                return True
        return False

    def stat(self, place: Place, before_slow: Callable[[], None]) -> tuple[os.stat_result, int]:
        """The status of the file that readers of a part get, or that what they get is decoded from, and the bytes that
        they see; ``before_slow`` is called before a header is read. FileNotFoundError; ChunkCorrupt for a coded file
        whose header is damaged, which goes to quarantine."""
        with contextlib.suppress(FileNotFoundError):
            st = self._lstat(place, coded=False)
            return st, st.st_size
        with contextlib.suppress(FileNotFoundError):
            st = self._lstat(place, coded=True)
            return st, self._raw_size(place, source_of(st), before_slow)
        st = self._lstat(place, coded=False)  # brought back to its raw form between the two looks, or gone
        return st, st.st_size

    def _raw_size(self, place: Place, source: Source, before_slow: Callable[[], None]) -> int:
        with self._lock:
            if source in self._sizes:
                self._sizes.move_to_end(source)
                return self._sizes[source]
        before_slow()
        try:
            with self._catalog.verifier.open_coded(place.ns, place.key, place.part) as file:
                size, source = file.raw_size(), source_of(os.fstat(file.fd))
        except ChunkCorrupt as e:
            self._catalog.lost(place.ns, place.key, place.part, e, coded=True)
            raise
        with self._lock:
            self._sizes[source] = size
            if len(self._sizes) > MAX_SIZES:
                self._sizes.popitem(last=False)
        return size
