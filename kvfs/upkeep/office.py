"""Who of all that use a store may evict: one janitor, elected by a lease file, with no trust in anybody's clock.

The file ``.kvfs/janitor.<epoch>`` of the highest epoch says who is in office.  Its holder writes it anew every few
seconds.  Others watch: content that has not changed for `Pace.stale` of the watcher's own seconds is that of a dead
holder, and whoever makes the file of the next epoch (O_EXCL, by a link) takes over.  The holder counts itself out
after half that time without a beat.

Between "it is stale" and "the next file is there" anything may happen.  So he who takes over looks at the old file
again after he has made his own, and the holder looks for a higher epoch after each beat: one sees the other (Dekker's
algorithm).  A removal that was decided before and comes after meets `kvfs.trash.Trash.begin`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfs.files import OPEN_DIR, read_small, write_new

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Office", "Pace", "boottime"]

log = logging.getLogger(__name__)

_FILE = re.compile(r"janitor\.([1-9][0-9]{0,17})")
UNKNOWN = "somebody"
_LENGTH = 512
"""Bytes of the file, always: it is written in place, in one go."""


@dataclass(frozen=True)
class Pace:
    """Seconds: between looks at what others say; between beats; after which what has not changed is a dead one's; for
    which removed files stay readable on a shared volume: the end of a dead host's lease, and a load."""

    look: float = 1.0
    beat: float = 5.0
    stale: float = 20.0
    keep: float = 35.0


def boottime() -> float:
    """Seconds that go on while this host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Office:
    """One candidate, ``name``, which nobody else has at the same time; it may have been that of one who is dead.

    ``prepare(epoch)`` runs before an epoch begins.  ``told`` is what the holder says beside its name.  Only one thread
    may `step` and `leave`; `epoch` may be asked by any.
    """

    def __init__(
        self, folder: Path, name: str, prepare: Callable[[int], None], pace: Pace, clock: Callable[[], float] = boottime
    ) -> None:
        self._folder, self.name, self._prepare, self._pace, self._clock = folder, name, prepare, pace, clock
        self._mine, self._beats = 0, 0
        self._until = self._next = 0.0
        self._seen: tuple[int, bytes] = (0, b"")
        self._since = clock()
        self.holder = ""
        self.told: dict[str, Any] = {}

    @property
    def epoch(self) -> int:
        """The number under which this candidate is in office, now; 0 if it is not."""
        mine = self._mine
        return mine if self._clock() < self._until else 0

    @property
    def seen(self) -> tuple[int, bytes]:
        """The highest epoch and its file, as last read; a holder that is alive changes it."""
        return self._seen

    def step(self, **telling: int) -> None:
        """Watch, take over or beat, whatever is due.  OSError, after which the state is as it was.

        ``telling``: numbers for others to read in `told`.
        """
        now = self._clock()
        if self._mine:
            if now >= self._next:
                self._beat(telling)
            return
        epoch, text = self._latest()
        if (epoch, text) != self._seen:
            self._seen, self._since = (epoch, text), now
            self._read(text)
        if not epoch or self.holder in ("", self.name) or now - self._since >= self._pace.stale:
            self._take_over(epoch, text, telling)

    def leave(self) -> None:
        """Give the office up, so that another may have it at once."""
        mine, self._mine, self._until = self._mine, 0, 0.0
        if mine:
            with contextlib.suppress(OSError):
                self._write(mine, {"holder": ""})

    # --- the holder ---

    def _beat(self, telling: dict[str, int]) -> None:
        begun = self._clock()
        self._beats += 1
        try:
            self._write(self._mine, {"holder": self.name, "beat": self._beats, **telling})
            latest, _ = self._epochs()
        except FileNotFoundError:  # only a later janitor removes it
            latest = self._mine + 1
        if latest != self._mine:
            log.info("%s is not the janitor of %s any more: epoch %d has begun", self.name, self._folder.parent, latest)
            self._mine, self._until, self._seen = 0, 0.0, (0, b"")
            return
        self._until, self._next = begun + self._pace.stale / 2, begun + self._pace.beat
        self.holder, self.told = self.name, dict(telling)

    def _write(self, epoch: int, content: dict[str, Any]) -> None:
        fd = os.open(self._folder / f"janitor.{epoch}", os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.pwrite(fd, _page(content), 0)
        finally:
            os.close(fd)  # NFS writes it now

    # --- the others ---

    def _take_over(self, epoch: int, text: bytes, telling: dict[str, int]) -> None:
        mine = epoch + 1
        folder = os.open(self._folder, OPEN_DIR)
        try:
            content = _page({"holder": self.name, "beat": 0, "by": os.urandom(8).hex()})
            write_new(folder, f"janitor.{mine}", content)
            if not self._is_still(folder, mine, content) or not self._is_still(folder, epoch, text):
                self._withdraw(folder, mine, content)
                return
            self._prepare(mine)
            self._mine = mine
            self._beat(telling)
            if self._mine:
                log.info("%s is the janitor of %s, epoch %d", self.name, self._folder.parent, mine)
                for old in self._epochs()[1]:
                    if old < mine:
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(f"janitor.{old}", dir_fd=folder)
        finally:
            os.close(folder)

    @staticmethod
    def _is_still(folder: int, epoch: int, text: bytes) -> bool:
        try:
            return (read_small(folder, f"janitor.{epoch}") if epoch else b"") == text
        except FileNotFoundError:
            return False

    def _withdraw(self, folder: int, mine: int, content: bytes) -> None:
        """Another was quicker, or the holder is alive."""
        if self._is_still(folder, mine, content):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"janitor.{mine}", dir_fd=folder)

    def _epochs(self) -> tuple[int, list[int]]:
        found = [int(m[1]) for name in os.listdir(self._folder) if (m := _FILE.fullmatch(name))]
        return max(found, default=0), found

    def _latest(self) -> tuple[int, bytes]:
        epoch, _ = self._epochs()
        folder = os.open(self._folder, OPEN_DIR)
        try:
            return epoch, read_small(folder, f"janitor.{epoch}") if epoch else b""
        finally:
            os.close(folder)

    def _read(self, text: bytes) -> None:
        """Whose file it is: one that cannot be read is somebody's."""
        self.holder = UNKNOWN if text else ""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            content = json.loads(text)
            self.holder, self.told = str(content["holder"]), dict(content)


def _page(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode().ljust(_LENGTH - 1) + b"\n"
