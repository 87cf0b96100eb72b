"""The files in the store behind a part that the mount shows, which is always the raw form."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from kvfs.hydrate import Source, source_of
from kvfs.names import part_path

if TYPE_CHECKING:
    from kvfs.daemon.tree import Place
    from kvfs.identity import PartId
    from kvfs.store import Store
    from kvfs.verify import Verifier

MAX_SIZES: Final = 1 << 16
"""Coded files whose raw sizes are remembered."""


def stored_files(store: Store, ns: bytes, key: bytes, part: PartId) -> dict[bool, os.stat_result]:
    """The files of a part, by form (True: coded)."""
    found = {}
    for coded in (False, True):
        with contextlib.suppress(FileNotFoundError):
            found[coded] = os.lstat(store.path / ns.hex() / part_path(key, part, coded))
    return found


class Shown:
    """What the mount says of parts. Thread-safe."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._sizes: OrderedDict[Source, int] = OrderedDict()
        self._lock = threading.Lock()

    def _lstat(self, place: Place, coded: bool) -> os.stat_result:
        return os.lstat(self._verifier.store.path / place.ns.hex() / part_path(place.key, place.part, coded))

    def exists(self, place: Place) -> bool:
        """Whether the part is there in either form."""
        for coded in (False, True):
            with contextlib.suppress(OSError):
                self._lstat(place, coded)
                return True
        return False

    def stat(self, place: Place) -> tuple[os.stat_result, int]:
        """The status of the file that readers of a part get, or that what they get is decoded from, and the bytes that
        they see. FileNotFoundError; ChunkCorrupt for a coded file that cannot be read."""
        with contextlib.suppress(FileNotFoundError):
            st = self._lstat(place, coded=False)
            return st, st.st_size
        with contextlib.suppress(FileNotFoundError):
            st = self._lstat(place, coded=True)
            return st, self._raw_size(place, source_of(st))
        st = self._lstat(place, coded=False)  # brought back to its raw form between the two looks, or gone
        return st, st.st_size

    def _raw_size(self, place: Place, source: Source) -> int:
        with self._lock:
            if source in self._sizes:
                self._sizes.move_to_end(source)
                return self._sizes[source]
        with self._verifier.open_coded(place.ns, place.key, place.part) as file:
            size, source = file.raw_size(), source_of(os.fstat(file.fd))
        with self._lock:
            self._sizes[source] = size
            if len(self._sizes) > MAX_SIZES:
                self._sizes.popitem(last=False)
        return size
