"""Parts opened for those who read them, in whichever form they are stored."""

import os
from collections.abc import Callable

from kvfs.errors import ChunkCorrupt, ChunkNotFound
from kvfs.hydrate import Area
from kvfs.identity import PartId
from kvfs.verify import Opened, Verifier

__all__ = ["OnLost", "Reader"]

OnLost = Callable[[bytes, bytes, PartId, ChunkNotFound | ChunkCorrupt, bool], None]
"""``on_lost(ns, key, part, error, coded)`` hears of a file, raw or coded, that turned out to be missing or damaged, and
puts it away."""


def _nothing() -> None:
    """What comes before a slow step where nobody minds."""


class Reader:
    """Opens parts of one store; coded ones are decoded into ``area`` for those who take raw ones only.  Thread-safe."""

    def __init__(self, verifier: Verifier, area: Area, on_lost: OnLost) -> None:
        self.verifier, self.area, self._on_lost = verifier, area, on_lost
        self.on_coded: Callable[[bytes, bytes], None] = lambda _ns, _key: None
        """Called with each chunk of which a part is opened that has no raw form."""

    def open(
        self, ns: bytes, key: bytes, part: PartId, coded: bool = False, before_slow: Callable[[], None] = _nothing
    ) -> Opened:
        """Open a part: its raw form, else its coded one (``coded``) or what that decodes to.

        ``before_slow`` is called before it is decoded.  ChunkNotFound, ChunkCorrupt; StoreBusy if decoded parts in use
        take all the memory that they may.
        """
        for _ in range(2):  # a part may be brought back to its raw form between the looks
            try:
                return self.verifier.open(ns, key, part)
            except ChunkNotFound as e:
                missing = e
            except ChunkCorrupt as e:
                self._on_lost(ns, key, part, e, False)
                raise
            try:
                return self._open_coded(ns, key, part, coded, before_slow)
            except ChunkNotFound:
                pass
            except ChunkCorrupt as e:
                self._on_lost(ns, key, part, e, True)
                raise
        for form in (False, True):
            self._on_lost(ns, key, part, missing, form)
        raise missing

    def _open_coded(self, ns: bytes, key: bytes, part: PartId, coded: bool, before_slow: Callable[[], None]) -> Opened:
        if coded:
            opened = self.verifier.open(ns, key, part, coded=True)
            self.on_coded(ns, key)
            return opened
        with self.verifier.open_coded(ns, key, part) as file:
            inode = os.fstat(file.fd).st_ino
            self.on_coded(ns, key)
            before_slow()
            fd = self.area.open(file)
            return Opened(fd, True, os.fstat(fd).st_size, inode)

    def verify(self, opened: Opened, ns: bytes, key: bytes, part: PartId) -> None:
        """Read an open raw part in full; if that is damaged it is put away and its descriptor closed: ChunkCorrupt."""
        try:
            self.verifier.check(opened.fd, ns, key, part)
        except BaseException as e:
            os.close(opened.fd)
            if isinstance(e, ChunkCorrupt):
                self._on_lost(ns, key, part, e, False)
            raise
