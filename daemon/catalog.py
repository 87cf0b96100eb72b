"""The worker's state: what is in the store, who holds it, what is known to be whole, and what has been counted.

The filesystem view and the control socket both work on it; nothing else changes the store.
"""

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from kvfs import retired
from kvfs.chunk import PartMeta
from kvfs.config import Config
from kvfs.daemon import coder
from kvfs.daemon.admission import Admission
from kvfs.daemon.compact import Compactor, Make
from kvfs.daemon.figures import figures
from kvfs.daemon.sweep import Sweeper, Swept
from kvfs.daemon.trace import Trace
from kvfs.daemon.wear import Wear
from kvfs.errors import ChunkCorrupt, ChunkNotFound, KvfsError, NamespaceNotFound, StoreReadOnly
from kvfs.explain import Known, explain
from kvfs.hydrate import Area
from kvfs.identity import Manifest, PartId
from kvfs.index import Index
from kvfs.metrics import Metrics
from kvfs.reader import Reader
from kvfs.store import Store, Temp
from kvfs.upkeep.bulletin import Bulletin
from kvfs.upkeep.evict import Evictor, Freed
from kvfs.upkeep.leases import Leases
from kvfs.upkeep.member import Member
from kvfs.upkeep.policy import POLICIES
from kvfs.verify import Opened, Verifier

__all__ = ["Catalog", "Listener"]

log = logging.getLogger(__name__)

Listener = Callable[[str, bytes, bytes | None, PartId | None], None]
"""``listener(event, ns, key, part)``; events are ``registered`` and ``retired`` (of a namespace), ``added``,
``removed`` and ``changed`` (of a part; the last: it is another file now)."""


class Catalog:
    """Everything the worker knows of one store.  Thread-safe.

    A new catalog has read the snapshot of the index, or else listed the store; after a snapshot, call `reconcile`
    soon (`Watcher` does).  ``resumed``: it takes the place of a worker that died, whose clients are about to claim
    again what they hold.  ``make`` codes parts elsewhere (`kvfs.daemon.coder.Coder`) rather than in this process.
    """

    def __init__(
        self, store: Store, config: Config, metrics: Metrics, resumed: bool = False, make: Make | None = None
    ) -> None:
        self.store, self.config, self.metrics = store, config, metrics
        self.index = Index(store, POLICIES[config.policy])
        self.leases, self.bulletin = Leases(resumed), Bulletin()
        self.member: Member | None = None
        self.verifier = Verifier(store, always=config.verify == "always")
        self.reader = Reader(self.verifier, Area(config.hydrate_limit), self.lost)
        self._verified_path = store.derived / f"verified.{socket.gethostname()}"
        self._listeners: list[Listener] = []
        self.last_use = 0.0
        """When somebody last read or published anything, in monotonic seconds."""
        store.lost.limit = config.quarantine_limit
        self.started = time.monotonic()
        self.verifier.load(self._verified_path)
        if not self.index.load():
            self.index.reconcile()
        self.evictor = Evictor(store, self.index, self.leases, config, self._evicted, self.lost)
        daily = config.write_budget and config.write_budget.of(self.evictor.total)
        self.wear = Wear(store.derived / f"written.{socket.gethostname()}", daily)
        self.admission = Admission(self.verifier, self.evictor, self.wear, metrics)
        self.compactor = Compactor(self, make or functools.partial(coder.make, store))
        self.sweeper = Sweeper(self)
        self._trace = Trace(config.trace) if config.trace else None
        metrics.budget.set_function(lambda: self.evictor.accounts[-1].limit)
        metrics.written.set_function(self.wear.today)
        metrics.chunks.set_function(lambda: self.index.totals()[0])
        metrics.bytes.labels("raw").set_function(lambda: self.index.forms().raw)
        metrics.bytes.labels("coded").set_function(lambda: self.index.forms().coded)
        metrics.saved.set_function(lambda: self.index.forms().saved)
        metrics.hydrated.set_function(lambda: self.reader.area.used)
        metrics.leases.set_function(lambda: len(self.leases))
        metrics.lost_bytes.set_function(lambda: store.lost.totals()[1])

    def join(self, member: Member) -> None:
        """Be one of several users of the store: evict only while it is ``member``'s turn."""
        self.member = self.evictor.office = member

    def on_change(self, listener: Listener) -> None:
        """Call ``listener`` after each change, from the thread that made it.  It must be quick and not raise."""
        self._listeners.append(listener)

    def tell(self, event: str, ns: bytes, key: bytes | None = None, part: PartId | None = None) -> None:
        """Let the listeners know of a change."""
        for listener in self._listeners:
            listener(event, ns, key, part)

    def save(self) -> None:
        """Write the snapshots for a quick restart.  A failure costs only that, and is logged."""
        if not self.config.read_only:
            try:
                self.index.save()
                self.verifier.save(self._verified_path)
                self.wear.save()
            except OSError as e:
                log.warning("no snapshot in %s: %s; the next start will list the store", self.store.derived, e.strerror)

    def close(self) -> None:
        """End the evictor and the compactor, save, and close the trace."""
        self.evictor.close()
        self.compactor.close()
        self.reader.area.close()
        self.save()
        if self._trace:
            self._trace.close()

    # --- reading ---

    def lookup(self, ns: bytes, keys: Sequence[bytes]) -> list[int]:
        """The presence mask of each key, 0 for absent; NamespaceNotFound."""
        masks = self.index.look(ns, keys)
        misses = masks.count(0)
        if misses < len(masks):
            self.bulletin.used(ns, next(key for key, mask in zip(reversed(keys), reversed(masks), strict=True) if mask))
        if self._trace:
            self._trace.looked(ns, keys)
        self.metrics.lookup.labels("hit").inc(len(masks) - misses)
        self.metrics.lookup.labels("miss").inc(misses)
        return masks

    def open_part(self, ns: bytes, key: bytes, part: PartId, verify: bool = True) -> int:
        """A read-only descriptor of the raw form of a part, decoded if it is stored in its coded form.

        With ``verify`` a part not known to be whole is read in full first, and put into quarantine if it is not:
        ChunkCorrupt.
        """
        return self.show(ns, key, part, verify).fd

    def show(
        self, ns: bytes, key: bytes, part: PartId, verify: bool = True, before_slow: Callable[[], None] = lambda: None
    ) -> Opened:
        """As `open_part`; ``before_slow`` is called before a part is read in full or decoded."""
        self.last_use = time.monotonic()
        opened = self.reader.open(ns, key, part, before_slow=before_slow)
        if verify and not opened.verified:
            before_slow()
            with self.metrics.verify_seconds.time():
                self.reader.verify(opened, ns, key, part)
        return opened

    def lease(
        self, holder: Hashable, lease: int, ns: bytes, refs: Sequence[tuple[bytes, PartId]], coded: bool = False
    ) -> list[Opened]:
        """Open parts, and claim their chunks for ``holder`` under its number ``lease``; all or none.  ``coded``: the
        holder takes a part in its coded form where there is no raw one; otherwise that is decoded for it.

        ChunkNotFound for the first that is missing, ChunkCorrupt, StoreBusy if there is no memory to decode it now;
        whether a part is whole is for the reader to check unless it is known.
        """
        self.last_use = time.monotonic()
        keys = list(dict.fromkeys(key for key, _ in refs))
        self.leases.grant(holder, lease, ns, keys)
        opened: list[Opened] = []
        try:
            for key, part in refs:
                opened.append(self.reader.open(ns, key, part, coded))
        except BaseException:
            self.leases.release(holder, lease)
            for o in opened:
                os.close(o.fd)
            raise
        self.index.touch(ns, keys)
        self.metrics.leased_bytes.inc(sum(o.size for o in opened))
        return opened

    def hold(self, holder: Hashable, lease: int, ns: bytes, keys: Sequence[bytes]) -> int:
        """Claim chunks again after a restart; returns how many are gone."""
        self.leases.grant(holder, lease, ns, keys)
        return self.index.masks(ns, keys).count(0)

    def report(self, holder: Hashable, ns: bytes, key: bytes, part: PartId, reason: str | None) -> bool:
        """What a reader found: None if the part is whole, which only one who holds it can say.  True if
        nothing damaged is left in its place: it was moved to quarantine, or is gone."""
        if reason is not None:
            if self.damaged(ns, key, part, reason):
                return not self.config.read_only
        elif self.leases.holds(holder, ns, key):
            with contextlib.suppress(ChunkNotFound):  # removed meanwhile
                self.verifier.vouch(ns, key, part)
        return not self.store.masks(ns, [key])[0] & self.store.manifest(ns).bit(part)

    def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """Count chunks as used now."""
        self.index.touch(ns, keys)

    # --- damage ---

    def damaged(self, ns: bytes, key: bytes, part: PartId, reason: str) -> bool:
        """Somebody found a part damaged.  Check its files; True if one is, and has been moved to quarantine."""
        with self.index.turn(ns, key):  # a whole one may have come in the place of what was found
            found = self.verifier.recheck(ns, key, part)
            damage = {coded: error for coded, error in found.items() if error is not None}
            for coded, error in damage.items():
                self._put_away(ns, key, part, error, coded)
        if found and not damage:
            log.info("part %s.%s was reported as damaged (%s) and is whole", key.hex()[:12], part, reason)
        return bool(damage)

    def lost(self, ns: bytes, key: bytes, part: PartId, error: KvfsError, coded: bool = False) -> None:
        """What turned out to be missing or damaged, in one form, is no longer shown to anyone."""
        if isinstance(error, ChunkCorrupt):
            self.damaged(ns, key, part, error.reason)
            return
        with self.index.turn(ns, key):
            if self.store.size(ns, key, part, coded) is None:  # else it has come meanwhile
                self._vanished(ns, key, part, coded)

    def _put_away(self, ns: bytes, key: bytes, part: PartId, error: ChunkCorrupt, coded: bool) -> None:
        if not self.config.read_only:
            purged = self.store.lost.purged
            self.verifier.quarantine(ns, key, part, error, coded)
            self.metrics.purged.inc(self.store.lost.purged - purged)
        self.metrics.quarantined.labels(error.reason).inc()
        log.warning("%s; it is in lost+found", error)
        self._vanished(ns, key, part, coded)

    def _vanished(self, ns: bytes, key: bytes, part: PartId, coded: bool) -> None:
        """A file is gone.  Without the raw one a part that is still there is another file to its readers."""
        row = self.index.get(ns, key)
        is_gone = self.index.discard(ns, key, part, coded=coded)
        if is_gone:
            self.tell("removed", ns, key, part)
        elif not coded and row is not None and row.raw & self.store.manifest(ns).bit(part):
            self.tell("changed", ns, key, part)

    # --- writing ---

    def _writable(self) -> None:
        if self.config.read_only:
            raise StoreReadOnly(self.store.path, "the daemon was started with read_only")

    def register(self, manifest: Manifest, info: Mapping[str, Any] | None = None) -> bytes:
        """Make the namespace of a manifest, or find it; returns its digest."""
        ns = manifest.ns
        if ns not in self.index.namespaces():
            try:
                self.index.register(ns)
            except NamespaceNotFound:
                self._writable()
                self.index.register(self.store.register(manifest, info))
            self.tell("registered", ns)
        return ns

    def reserve(self, ns: bytes, nbytes: int, key: bytes | None = None) -> Temp:
        """A temp file to write a part of ``nbytes`` of the chunk ``key`` into; NamespaceNotFound, StoreReadOnly,
        StoreFull, which says what is used up."""
        self._writable()
        return self.admission.reserve(ns, nbytes, key)

    def discard(self, ns: bytes, temp: str) -> None:
        """Give up a temp file; it, or its namespace, may be gone already."""
        with contextlib.suppress(NamespaceNotFound):
            self.admission.discard(ns, temp)

    def publish_file(self, ns: bytes, temp: str, key: bytes, part: PartId) -> bool:
        """Check a written temp file and make it a part; raises as `Verifier.admit`.  True if the part is new."""
        self.last_use = time.monotonic()
        try:
            self._writable()
            admitted = self.admission.admit(ns, temp, key, part)
            with self.index.turn(ns, key):
                if self.store.size(ns, key, part) is not None:  # else somebody was quick to remove it
                    self._appeared(ns, key, part, admitted.size, admitted.meta)
        except KvfsError:
            self.metrics.publish.labels("refused").inc()
            raise
        finally:
            self.admission.end(temp)
        self.metrics.publish.labels("created" if admitted.created else "exists").inc()
        if admitted.created:
            self.bulletin.changed(ns, key)
            self.metrics.published_bytes.inc(admitted.size)
            if self._trace:
                self._trace.stored(admitted.meta, admitted.size)
        return admitted.created

    def _appeared(self, ns: bytes, key: bytes, part: PartId, size: int, meta: PartMeta, coded: bool = False) -> None:
        if self.index.add(ns, key, part, size, meta, coded):
            self.tell("added", ns, key, part)

    def remove_chunk(self, ns: bytes, key: bytes) -> bool:
        """Remove all parts of a chunk; False if there were none.  StoreBusy while it is leased."""
        self._writable()
        manifest, [mask] = self.store.manifest(ns), self.index.masks(ns, [key])
        with self.leases.removing(ns, key), self.index.turn(ns, key):
            self.index.discard(ns, key)  # first: what is being compacted would come back
            self.store.remove(ns, key, manifest.parts)
        self._gone(ns, key, mask, "request")
        return mask != 0

    def _gone(self, ns: bytes, key: bytes, mask: int, reason: str) -> None:
        manifest = self.store.manifest(ns)
        self.bulletin.changed(ns, key)
        for part in manifest.parts:
            if mask & manifest.bit(part):
                self.metrics.removed.labels(reason).inc()
                self.tell("removed", ns, key, part)

    def _evicted(self, ns: bytes, key: bytes, mask: int, reason: str) -> None:
        self.metrics.evicted.labels(reason).inc()
        self._gone(ns, key, mask, "evicted")

    def _in_office(self) -> None:
        self._writable()
        if self.member is not None:
            self.member.require_office()

    def evict(self, ns: bytes | None, nbytes: int) -> Freed:
        """Remove the least useful chunks, of one namespace or all, until ``nbytes`` are free or none may go."""
        self._in_office()
        return self.evictor.evict(self.index.namespaces() if ns is None else [ns], nbytes, "request")

    def sweep(self, ns: bytes | None, idle: float | None, seconds: float) -> Swept:
        """Compact what was not used for a while: see `Sweeper.sweep`."""
        self._in_office()
        return self.sweeper.sweep(ns, idle, seconds)

    def pin(self, ns: bytes, key: bytes, pinned: bool) -> None:
        """Keep a chunk, and what comes before it in its text, from eviction, or end that; ChunkNotFound.  Remembered in
        the snapshot."""
        self._writable()
        if not self.index.pin(ns, key, pinned):
            raise ChunkNotFound(key.hex())
        self.save()

    def retire(self, ns: bytes) -> int:
        """Remove a namespace and all its chunks; returns how many there were.  StoreBusy while one is leased."""
        self._writable()
        chunks, _ = self.index.totals(ns)
        with self.leases.removing(ns):
            self.store.retire(ns)
            self.index.forget(ns)
        self.metrics.removed.labels("retired").inc(chunks)
        self.tell("retired", ns)
        return chunks

    # --- behind our back ---

    def reconcile(self) -> tuple[int, int]:
        """List the store and correct the index; returns parts found anew and parts found gone.  Also removes what
        the dead left: temp files, and namespaces that were being retired."""
        known = set(self.index.namespaces())
        counts = self.index.reconcile(
            lambda ns, key, part, appeared: self.tell("added" if appeared else "removed", ns, key, part)
        )
        present = set(self.index.namespaces())
        for ns in known - present:
            self.tell("retired", ns)
        for ns in present - known:
            self.tell("registered", ns)
        if not self.config.read_only:
            with contextlib.suppress(OSError):
                retired.clear(self.store.derived)
            for ns in present:
                with contextlib.suppress(KvfsError, OSError):  # retired meanwhile, or not ours to write
                    self.store.reap_temps(ns)
        return counts

    def refresh(self, ns: bytes, key: bytes, part: PartId, coded: bool = False) -> None:
        """A file of a part may have appeared or vanished: look.  One that is not whole by its header is not shown."""
        with self.index.turn(ns, key):
            try:
                meta, size = self.verifier.peek(ns, key, part, coded)
            except (ChunkNotFound, ChunkCorrupt):
                self._vanished(ns, key, part, coded)
            else:
                self._appeared(ns, key, part, size, meta, coded)

    # --- asking ---

    def explain(self, ns: bytes, keys: Sequence[bytes], manifest: Manifest | None = None) -> dict[str, Any]:
        """Why a text hits or misses; see `kvfs.explain.explain`."""
        known = {
            other: Known(self.store.manifest(other), self.store.info(other), self.index.totals(other)[0])
            for other in self.index.namespaces()
        }
        masks = self.index.masks(ns, keys) if ns in known else []
        return explain(ns, keys, masks, known, manifest)

    def stats(self) -> dict[str, Any]:
        """What the store holds and what has been counted since the start, ready for JSON."""
        return figures(self)
