"""The upkeep of a store that no daemon serves, by the engines that use it: each is a member, one is the janitor.

Being a member costs a small file every few seconds.  Only he who is in office lists the store and evicts, in a thread
of its own; the threads of the engine touch nothing but memory here.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING

from kvfs.errors import ChunkCorrupt, ChunkNotFound, KvfsError
from kvfs.index import Index
from kvfs.upkeep.bulletin import Bulletin, News
from kvfs.upkeep.evict import Evictor
from kvfs.upkeep.leases import Leases
from kvfs.upkeep.listing import Difference, differences
from kvfs.upkeep.member import Member
from kvfs.upkeep.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvfs.config import Config
    from kvfs.identity import PartId
    from kvfs.upkeep.office import Pace
    from kvfs.verify import Admitted, Verifier

__all__ = ["Steward"]

log = logging.getLogger(__name__)

LIST_EVERY = 60.0
"""Seconds between listings of the store by its janitor, who is told of most changes."""
LEAVE = 1.0
"""Seconds that leaving may wait for the disk."""
LISTING_SHARE = 0.005
"""Of the time, at most, goes into listing."""


class Steward:
    """Keeps the store of ``verifier`` within the budget of ``config``, together with all others that use it."""

    def __init__(self, verifier: Verifier, config: Config, pace: Pace | None = None) -> None:
        self._verifier, self._store, self._config = verifier, verifier.store, config
        self.leases, self._bulletin = Leases(), Bulletin()
        self._numbers = itertools.count(1)
        name = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.member = Member(self._store, name, self.leases, self._bulletin, on_news=self._hear, pace=pace)
        self._work: _Work | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvfs-steward", daemon=True)

    def start(self) -> None:
        """Begin, without waiting for the disk."""
        self._thread.start()

    def close(self) -> bool:
        """Leave; False if the disk does not answer, and a thread is left behind."""
        self._stop.set()
        self._thread.join(2 * LEAVE)
        return not self._thread.is_alive()

    # --- what the engine does; nothing here waits ---

    def lease(self, ns: bytes, keys: Iterable[bytes]) -> Callable[[], None]:
        """Claim chunks; returns what ends the claim.  ChunkNotFound for one that is being removed."""
        number = next(self._numbers)
        self.leases.grant(self, number, ns, tuple(keys))
        return lambda: self.leases.release(self, number)

    def used(self, ns: bytes, key: bytes) -> None:
        """A chunk has been looked up, and with it all before it in its text."""
        self._bulletin.used(ns, key)
        work = self._work
        if work is not None:
            work.index.touch(ns, (key,))

    def published(self, ns: bytes, key: bytes, part: PartId, admitted: Admitted) -> None:
        """A part is new."""
        self._bulletin.changed(ns, key)
        work = self._work
        if work is not None:
            work.index.add(ns, key, part, admitted.size, admitted.meta)

    def removed(self, ns: bytes, key: bytes) -> None:
        """A chunk has been removed."""
        self._bulletin.changed(ns, key)
        work = self._work
        if work is not None:
            work.index.discard(ns, key)

    @property
    def full(self) -> bool:
        """Whether the budget is used up."""
        return self.member.full

    # --- the janitor ---

    def _hear(self, news: News) -> None:
        work = self._work
        if work is not None:
            work.hear(news)

    def _run(self) -> None:
        try:
            self.member.start()
            while not self._stop.wait(self.member.pace.look):
                try:
                    self.tick()
                except (OSError, KvfsError) as e:
                    log.debug("upkeep of %s: %s", self._store.path, e)
        finally:  # whatever ends this thread, nobody is in office who does not work
            self.member.close(LEAVE)

    def tick(self) -> None:
        """Do the janitor's work, if this is the janitor."""
        if not self.member.epoch:
            self._work = None
            return
        if self._work is None:
            self._work = _Work(self._verifier, self._config, self.leases, self.member, self._bulletin)
        self._work.tick()


class _Work:
    """What there is only while in office: an index and an evictor."""

    def __init__(self, verifier: Verifier, config: Config, leases: Leases, member: Member, bulletin: Bulletin) -> None:
        self._verifier, self._store, self._member, self._bulletin = verifier, verifier.store, member, bulletin
        self.index = Index(self._store, POLICIES[config.policy])
        self.index.load()
        self.evictor = Evictor(self._store, self.index, leases, config, self._evicted, self._lost)
        self.evictor.office = member
        self._news: list[tuple[bytes, bytes]] = []
        self._next = self._saved = 0.0
        self._save_every = config.snapshot_interval

    def hear(self, news: News) -> None:
        """Others have told; it is looked at in the next round."""
        for ns, key in news.used:
            with contextlib.suppress(KvfsError):
                self.index.touch(ns, (key,))
        self._news += news.changed
        if news.missed:
            self._next = 0.0

    def tick(self) -> None:
        """List the store if it is time to, look at what has changed, evict, and remember."""
        begun = time.monotonic()
        news, self._news = self._news, []
        if begun >= self._next:
            self.index.reconcile()
            for ns in self.index.namespaces():
                with contextlib.suppress(KvfsError, OSError):  # retired meanwhile
                    self._store.reap_temps(ns)
            self._next = begun + max(LIST_EVERY, (time.monotonic() - begun) / LISTING_SHARE)
        else:
            for found in differences(self._store, self.index, news):
                self._correct(found)
        self.evictor.tick()
        whole = self.evictor.accounts[-1]
        self._member.is_full = self.evictor.used(whole) + self._member.trash > whole.limit
        if begun - self._saved >= self._save_every:
            self._saved = begun
            with contextlib.suppress(OSError):
                self.index.save()

    def _correct(self, found: Difference) -> None:
        ns, key, part, coded, is_there = found
        with self.index.turn(ns, key):
            if is_there:
                with contextlib.suppress(ChunkNotFound, ChunkCorrupt):
                    meta, size = self._verifier.peek(ns, key, part, coded)
                    self.index.add(ns, key, part, size, meta, coded)
            elif self._store.size(ns, key, part, coded) is None:
                self.index.discard(ns, key, part, coded=coded)

    def _evicted(self, ns: bytes, key: bytes, _mask: int, _reason: str) -> None:
        self._bulletin.changed(ns, key)

    def _lost(self, ns: bytes, key: bytes, part: PartId, error: ChunkNotFound | ChunkCorrupt, coded: bool) -> None:
        with self.index.turn(ns, key):
            if isinstance(error, ChunkCorrupt):
                self._verifier.quarantine(ns, key, part, error, coded)
            elif self._store.size(ns, key, part, coded) is not None:
                return
            self.index.discard(ns, key, part, coded=coded)
