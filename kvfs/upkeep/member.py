"""One of several users of a store: tells what it holds, hears what others tell, and is the janitor when elected.

Every daemon is a member, and every engine that uses a bare folder (`kvfs.upkeep.steward`).  Whoever is in office evicts
for all, honours what any of them holds, and frees the trash of a shared volume.  A disk that does not answer stops a
member's thread and nothing else: it goes out of office by its own clock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from kvfs.errors import KvfsError, StoreBusy
from kvfs.files import from_os_error
from kvfs.upkeep.bulletin import Board, Bulletin, News
from kvfs.upkeep.office import Office, Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvfs.store import Store
    from kvfs.trash import Thrown
    from kvfs.upkeep.leases import Leases

__all__ = ["Member"]

log = logging.getLogger(__name__)


class Member:
    """A member called ``name``, which no other has at the same time.

    ``leases`` are those it tells of; they learn from it what others hold.  ``pins`` gives the chunks pinned here.
    ``on_news`` hears what others have told, from the member's thread.  `start`, or else `tick` by hand.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        leases: Leases,
        bulletin: Bulletin,
        pins: Callable[[], Iterable[tuple[bytes, bytes]]] = tuple,
        on_news: Callable[[News], None] = lambda _: None,
        pace: Pace | None = None,
    ) -> None:
        self.store, self.name, self.bulletin, self.leases = store, name, bulletin, leases
        self.pace = pace or Pace()
        self._pins, self._on_news = pins, on_news
        self.board = Board(store.derived, name, self.pace)
        self.office = Office(store.derived, name, self._prepare, self.pace)
        self.is_full = False
        """To be told to all while in office: the budget is used up."""
        self._thrown: dict[str, float] = {}
        self._waiting = 0
        self._due = 0.0
        self._well = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvfs-member", daemon=True)
        leases.others = self.board.holder

    # --- in office ---

    @property
    def epoch(self) -> int:
        """The number under which this member may evict, now; 0: it is another's turn."""
        return self.office.epoch

    @property
    def trash(self) -> int:
        """Bytes in the trash, as the janitor has counted them."""
        return self._waiting if self.office.epoch else int(self.office.told.get("trash", 0))

    @property
    def full(self) -> bool:
        """Whether the janitor says that the budget is used up."""
        return self.is_full if self.office.epoch else bool(self.office.told.get("full", 0))

    def require_office(self) -> None:
        """StoreBusy, naming the janitor, unless it is this member."""
        if not self.office.epoch:
            raise StoreBusy(self.store.path, f"its janitor, {self.office.holder or 'to be elected'}; evict there")

    def _prepare(self, epoch: int) -> None:
        if self.store.trash is not None:
            self.store.trash.begin(epoch)

    def state(self) -> dict[str, Any]:
        """What to show of it, ready for JSON."""
        return {
            "janitor": self.office.holder,
            "in_office": bool(self.office.epoch),
            "members": [self.name, *self.board.living()],
            "held_elsewhere": self.board.held(),
            "trash": self.trash,
            "full": self.full,
        }

    # --- rounds ---

    def tick(self) -> None:
        """Tell, hear, watch or beat, and free what nobody can be reading any more.  OSError, StoreBusy."""
        due = time.monotonic() >= self._due
        path = self.store.derived / f"bulletin.{self.name}"
        self.bulletin.publish(path, self.leases.chunks(), self._pins(), due)
        if due:
            self._due = time.monotonic() + self.pace.beat
        news = self.board.read()
        self.office.step(trash=self._waiting, full=int(self.is_full))
        if news.changed or news.used or news.missed:
            self._on_news(news)
        if self.office.epoch:
            self._tidy()

    def _tidy(self) -> None:
        for name in self.board.dead():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.store.derived / f"bulletin.{name}")
        if self.store.trash is None:
            return
        now, waiting, seen = time.monotonic(), 0, {}
        for thrown in self.store.trash.entries():
            since = self._thrown.get(thrown.path, now)
            if now - since >= self.pace.keep and not self._is_held(thrown):
                if not self.office.epoch:
                    return
                self.store.trash.free(thrown)
            else:
                seen[thrown.path], waiting = since, waiting + thrown.size
        self._thrown, self._waiting = seen, waiting

    def _is_held(self, thrown: Thrown) -> bool:
        ns, key = thrown.ns, thrown.key
        return ns is not None and (self.leases.held(ns, key) > 0 or self.board.holder(ns, key) is not None)

    # --- the thread ---

    def start(self) -> None:
        """Begin, with one round before this returns."""
        self._round()
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.pace.look):
            self._round()

    def _round(self) -> None:
        try:
            self.tick()
            self._well = True
        except (OSError, KvfsError) as e:
            if self._well:
                log.info("%s: no word to or from other users: %s", self.store.path, e)
            self._well = False

    def close(self, timeout: float = 5.0) -> bool:
        """Leave: give the office up, and withdraw the bulletin unless it tells of pins.  False if the thread is stuck
        in a disk after ``timeout`` seconds, and is left there."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        self.office.leave()
        if not list(self._pins()):
            with contextlib.suppress(OSError):
                os.unlink(self.store.derived / f"bulletin.{self.name}")
        return True

    def campaign(self) -> None:
        """Come into office, at once or when a dead janitor's time is over; StoreBusy if there is one that lives."""
        deadline, first = time.monotonic() + self.pace.stale + 2 * self.pace.look, None
        try:
            while True:
                self.tick()
                seen = self.office.seen
                first = seen if first is None else first
                if self.office.epoch:
                    return
                if seen != first or time.monotonic() > deadline:
                    self.require_office()
                time.sleep(self.pace.look)
        except OSError as e:
            raise from_os_error(e, self.store.path) from e
