"""Keeps a store within its budgets: what is used, what may be written, what goes.

It needs no more than a store, its index, something that knows what is held, and settings, so that it also runs without
a daemon. Where several share a store, only the one that is in office acts. Open files and maps of a chunk go on.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from kvfs.errors import ChunkCorrupt, ChunkNotFound, NamespaceNotFound, StoreBusy
from kvfs.names import part_path
from kvfs.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvfs.config import Config
    from kvfs.identity import PartId
    from kvfs.index import Index, Victim
    from kvfs.store import Store

log = logging.getLogger(__name__)

TICK: Final = 1.0
"""Seconds between looks at the budgets, if nothing calls for one."""
REST: Final = 0.01
"""Seconds between looks, at least: many writers that are refused at once call as one."""
PARTIAL: Final = 60.0
"""Seconds after its last part came in which a chunk gets the others."""
LEARN: Final = 200
"""Headers read a second, at most, while nothing has to be evicted."""
SWEEP: Final = 5000
"""Rows looked at a second, in each namespace, for what has not been used for too long."""
PATIENCE: Final = 1024
"""Chunks in use that are passed over, at most, before a round is given up."""
PRESSED: Final = 0.02
"""Share of the store that goes when the disk is full though the figures do not say so: a quota."""
BEGIN, END = 1.25, 1.5
"""Of the free space to keep: below the first eviction begins, at the second it ends."""


class Leases(Protocol):
    """What knows who holds which chunks: `kvfs.upkeep.leases.Leases`."""

    @property
    def settled(self) -> bool:
        """Whether all holders have said what they hold."""

    def removing(self, ns: bytes, key: bytes) -> contextlib.AbstractContextManager[None]:
        """Keep a chunk from being claimed while it is removed; StoreBusy if it is."""


class Office(Protocol):
    """Whose turn it is to evict: `kvfs.upkeep.member.Member`, or `Alone`."""

    @property
    def epoch(self) -> int:
        """The number under which this process may evict, now; 0: another's turn."""

    @property
    def trash(self) -> int:
        """Bytes that have been removed and are not free yet."""


class Alone(NamedTuple):
    """The only user of a store."""

    epoch: int = 1
    trash: int = 0


class Account(NamedTuple):
    """Who shares a budget: ``name`` is the reason for what has to go for it; ``namespaces`` are those that count."""

    name: str
    limit: int
    namespaces: frozenset[bytes]


class Freed(NamedTuple):
    """What has been evicted."""

    chunks: int
    bytes: int


class Evictor:
    """The accounts of one store, and a thread that keeps them in balance once it is started.

    ``on_evicted(ns, key, mask, reason)`` hears of parts that are gone, ``on_lost(ns, key, part, error, coded)`` of one
    that is missing or damaged, raw or coded, and puts it away. Reasons are ``budget``, ``namespace``, ``space`` (too
    little of it is free), ``ttl``, ``incomplete``, ``request``.
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        leases: Leases,
        config: Config,
        on_evicted: Callable[[bytes, bytes, int, str], None],
        on_lost: Callable[[bytes, bytes, PartId, ChunkNotFound | ChunkCorrupt, bool], None],
    ) -> None:
        self.store, self.index, self.leases, self.config = store, index, leases, config
        self.office: Office = Alone()
        self._on_evicted, self._on_lost = on_evicted, on_lost
        self._verifier = Verifier(store)
        self.relief: Callable[[Account, int], bool] = lambda _account, _used: False
        """Asked with a budget that is exceeded and what is used of it: whether room is being made in another way."""
        self._sweeps: dict[bytes, int] = {}
        self._round = threading.Lock()
        self._wake, self._stopping = threading.Event(), False
        self._pressed = False
        self._refused: dict[frozenset[bytes], int] = {}  # bytes that had no room, by who shares the budget
        self._thread = threading.Thread(target=self._run, name="kvfs-evict", daemon=True)
        self.total = self.free = 0
        self.accounts: tuple[Account, ...] = ()
        self.allowance: Callable[[int, int], int] | None = None
        """Where stores share a filesystem: the budget in bytes, by its size and free space, of which some is kept."""
        self.measure()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self) -> None:
        """Look at the budgets now."""
        self._wake.set()

    def press(self) -> None:
        """Somebody has met a full disk or quota, whatever the figures say: make room now."""
        self._pressed = True
        self.wake()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(TICK)
            self._wake.clear()
            try:
                self.tick()
            except Exception:  # the daemon's loop: a bad disk must not end eviction
                log.exception("eviction in %s failed", self.store.path)
            time.sleep(REST)

    # --- accounts ---

    def measure(self) -> None:
        """See how large and how free the filesystem is, and whose budgets there are."""
        space = os.statvfs(self.store.path)
        self.total, self.free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
        present = self.index.namespaces()
        accounts = [
            Account("namespace", amount.of(self.total), frozenset(ns for ns in present if self._is_called(ns, word)))
            for word, amount in self.config.namespace_budgets
        ]
        limit = self.allowance(self.total, self.free) if self.allowance else self.config.budget.of(self.total)
        self.accounts = (*accounts, Account("budget", limit, frozenset(present)))

    def _is_called(self, ns: bytes, word: str) -> bool:
        with contextlib.suppress(NamespaceNotFound):
            info = self.store.info(ns)
            name, revision = str(info.get("name")), str(info.get("revision"))
            return word in {name, f"{name}@{revision}"} or (len(word) >= 8 and ns.hex().startswith(word))
        return False

    def used(self, account: Account) -> int:
        """Bytes of the chunks that count towards a budget."""
        return sum(self.index.totals(ns)[1] for ns in account.namespaces)

    def _going(self, account: Account) -> int:
        """Bytes in the trash; those of a single namespace are not told apart."""
        return self.office.trash if account is self.accounts[-1] else 0

    def floor(self) -> int:
        """Bytes to keep free."""
        return self.config.min_free.of(self.total)

    def spare(self) -> int:
        """Bytes that may be used before too little is free."""
        return self.free - int(self.floor() * END)

    def lacking(self, ns: bytes, nbytes: int, pending: int) -> str | None:
        """Which budget, or ``space``, has no room for ``nbytes`` more in a namespace, beside ``pending`` bytes that are
        being written; None if there is room."""
        self.measure()
        for account in self.accounts:
            if ns in account.namespaces:
                used = self.used(account) + self._going(account) + pending + nbytes
                if used > account.limit * self.config.high_watermark:
                    self.wake()
                if used > account.limit:
                    if nbytes <= account.limit * self.config.low_watermark:  # else it can never have room
                        self._refused[account.namespaces] = pending + nbytes
                    return account.name
        if self.free - nbytes < self.floor():
            self.wake()
            return "space"
        return None

    # --- rounds ---

    def tick(self) -> None:
        """Bring every budget back into balance, and see to what is incomplete, too old, or not known well enough."""
        if not self.leases.settled or not self.office.epoch:
            return
        self.measure()
        for account in self.accounts:
            used = self.used(account) + self._refused.pop(account.namespaces, 0)
            too_much = used + self._going(account) > account.limit * self.config.high_watermark
            if too_much and not self.relief(account, used):
                self.evict(account.namespaces, used - int(account.limit * self.config.low_watermark), account.name)
        pressed, self._pressed = self._pressed, False
        wanted = int(self.index.totals()[1] * PRESSED) if pressed else 0
        if self.free < self.floor() * BEGIN and self.allowance is None:
            wanted = max(wanted, int(self.floor() * END) - self.free)
        wanted -= self.office.trash
        if wanted > 0:
            self.evict(self.index.namespaces(), wanted, "space")
        for ns in self.index.namespaces():
            with contextlib.suppress(NamespaceNotFound):  # retired meanwhile
                self._reap(ns)
                self._expire(ns)
                self._learn(ns, LEARN)

    def evict(self, namespaces: Iterable[bytes], goal: int, reason: str) -> Freed:
        """Remove chunks of these namespaces until ``goal`` bytes are free or none may go; those not used for longest go
        first, of each namespace in the order of its policy. What is leased stays, and what other chunks continue."""
        chunks = freed = busy = 0
        with self._round:
            for ns, victim in self._victims(namespaces):
                if freed >= goal or busy >= PATIENCE or not self.office.epoch:
                    break
                with contextlib.suppress(NamespaceNotFound):  # retired meanwhile
                    if (gone := self._remove(ns, victim.key, reason)) is not None:
                        chunks, freed = chunks + 1, freed + gone.size
                    else:
                        busy += 1
                        self.index.spare(ns, victim.key)
        if chunks:
            log.debug("evicted %d chunks, %d bytes (%s)", chunks, freed, reason)
        return Freed(chunks, freed)

    def _victims(self, namespaces: Iterable[bytes]) -> Iterator[tuple[bytes, Victim]]:
        heap = [(victim.stamp, ns, victim) for ns in namespaces if (victim := self._victim(ns)) is not None]
        heapq.heapify(heap)
        while heap:
            _, ns, victim = heap[0]
            yield ns, victim
            following = self._victim(ns)
            if following is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (following.stamp, ns, following))

    def _victim(self, ns: bytes) -> Victim | None:
        with contextlib.suppress(NamespaceNotFound):  # retired meanwhile
            while self._learn(ns, LEARN):  # one whose parent is unknown may continue any
                pass
            return self.index.victim(ns)
        return None

    def _remove(self, ns: bytes, key: bytes, reason: str) -> Victim | None:
        """Remove a chunk unless somebody holds or continues it; what went."""
        with contextlib.suppress(StoreBusy), self.leases.removing(ns, key), self.index.turn(ns, key):
            if (epoch := self.office.epoch) and (gone := self.index.evict(ns, key)) is not None:
                self._unlink(ns, key, gone.mask, reason, epoch)
                return gone
        return None

    def _unlink(self, ns: bytes, key: bytes, mask: int, reason: str, epoch: int) -> None:
        manifest = self.store.manifest(ns)
        self.store.remove(ns, key, [part for part in manifest.parts if mask & manifest.bit(part)], epoch=epoch)
        self._on_evicted(ns, key, mask, reason)

    def _reap(self, ns: bytes) -> None:
        """Remove what is of no use by itself: some head slices of a kind, without the others."""
        manifest, folder = self.store.manifest(ns), self.store.path / ns.hex()
        for key, mask in self.index.partial(ns, PARTIAL):
            with contextlib.suppress(StoreBusy), self.leases.removing(ns, key), self.index.turn(ns, key):
                if not (epoch := self.office.epoch):
                    return
                for part, coded in itertools.product(manifest.parts, (False, True)):
                    if mask & manifest.bit(part):
                        with contextlib.suppress(FileNotFoundError):
                            size = os.lstat(folder / part_path(key, part, coded)).st_size
                            self.index.discard(ns, key, part, size, coded)
                self._unlink(ns, key, mask, "incomplete", epoch)

    def _expire(self, ns: bytes) -> None:
        if self.config.ttl is not None:
            idle, self._sweeps[ns] = self.index.idle(ns, self._sweeps.get(ns, 0), SWEEP, time.time() - self.config.ttl)
            for victim in idle:
                self._remove(ns, victim.key, "ttl")

    def _learn(self, ns: bytes, count: int) -> bool:
        """Read headers of chunks that a listing has found; False if there are none left to read."""
        found = self.index.unlearnt(ns, count)
        for key, part, coded in found:
            try:
                meta, _ = self._verifier.peek(ns, key, part, coded)
            except (ChunkNotFound, ChunkCorrupt) as e:
                self._on_lost(ns, key, part, e, coded)
            else:
                self.index.learn(ns, meta)
        return bool(found)
