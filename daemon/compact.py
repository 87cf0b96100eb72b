"""Chunks nobody uses become smaller instead of going: their parts are kept in the coded form, the raw one is retired.

At any moment, and so after any crash, each part has at least one whole file: the coded form is written beside the raw
one, decoded again and compared before that goes, and the same the other way round. What is used again gets its raw form
back beside the coded one, so that it can grow cold a second time for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvfs.chunk import layout
from kvfs.codec import FORMS, LEVELS, Level, gate
from kvfs.daemon.coder import RAW, Made
from kvfs.daemon.shown import stored_files
from kvfs.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    DaemonUnavailable,
    IdentityError,
    KvfsError,
    NamespaceNotFound,
    Unsupported,
)
from kvfs.identity import PartId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.evict import Account

log = logging.getLogger(__name__)

Make = Callable[[bytes, bytes, PartId, str, int], Made]
"""`kvfs.daemon.coder.make` of one store."""

AFTER: Final = 3600.0
"""Seconds without use after which a chunk is cold where the setting is off."""
LOOK: Final = 10.0
"""Seconds between looks for something to do, if nothing calls for one."""
BATCH: Final = 256
RECENT: Final = 600.0
"""Seconds in which a chunk is too fresh to be compacted under pressure, and in which uses count as heat."""
GRACE: Final = 5.0
"""Seconds for which eviction waits while compaction makes room."""
WORTH: Final = 0.95
"""Of the raw form, the size beyond which the coded one is not worth keeping."""
MAX_WARM: Final = 4096
"""Chunks whose uses are counted."""
SAMPLE: Final = 4
"""Chunks that are coded for an estimate."""


class Swept(NamedTuple):
    """What one sweep has done: chunks looked at, bytes of their files before and after, and whether none is left."""

    chunks: int
    before: int
    after: int
    done: bool


class Compactor:
    """Compaction of one store, by a thread once it is started, or in sweeps on request. Thread-safe."""

    def __init__(self, catalog: Catalog, make: Make) -> None:
        self._catalog, self._make_form = catalog, make
        self._turn = threading.Lock()  # one chunk at a time
        self._lock = threading.Lock()  # guards the next three
        self._warm: OrderedDict[tuple[bytes, bytes], list[int]] = OrderedDict()
        self._hot: deque[tuple[bytes, bytes]] = deque(maxlen=MAX_WARM)
        self._strained: dict[str, tuple[float, float]] = {}
        self._queue: deque[tuple[bytes, bytes]] = deque()
        self._looked = 0.0  # when these were cold
        self._spent = 0.0
        self.is_idle = False
        """Whether there was nothing to do at the last look."""
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="kvfs-compact", daemon=True)
        catalog.reader.on_coded = self.used
        catalog.evictor.relief = self.relieves

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the part that is being coded."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping:
            self._wake.wait(pause)
            self._wake.clear()
            try:
                pause = self._step()
            except DaemonUnavailable as e:
                log.error("%s; nothing is compacted until the next worker takes over", e)
                return
            except NamespaceNotFound:  # retired meanwhile
                pause = 0.0
            except KvfsError as e:
                log.info("compaction in %s waits: %s", self._catalog.store.path, e)
                pause = LOOK
            except Exception:  # the daemon's loop: a bad disk must not end it
                log.exception("compaction in %s failed", self._catalog.store.path)
                pause = LOOK

    def _step(self) -> float:
        """Do one chunk; returns seconds to rest."""
        with self._lock:
            hot = self._hot.popleft() if self._hot else None
        self.is_idle = False
        if hot is not None:
            self.bring_back(*hot)
        elif (cold := self._next()) is not None:
            self.compact(*cold)
        else:
            self.is_idle = True
            return LOOK
        spent, self._spent = self._spent, 0.0
        return spent / self._catalog.config.compact_share - spent

    def _next(self) -> tuple[bytes, bytes] | None:
        catalog, after = self._catalog, self._catalog.config.compact_after
        if after is None or not catalog.leases.settled:
            return None
        while True:
            while self._queue:
                ns, key = self._queue.popleft()
                row = catalog.index.get(ns, key)
                if row is not None and row.last < self._looked and not catalog.leases.held(ns, key):
                    return ns, key
            self._looked = time.time()
            looked = [*self._pressed(), (time.time() - after, catalog.index.namespaces())]
            for before, namespaces in looked:
                self._queue.extend(self._cold(namespaces, before))
                if self._queue:
                    break
            if all(catalog.leases.held(*each) for each in self._queue):
                self._queue.clear()
                return None

    def _pressed(self) -> Iterator[tuple[float, Iterable[bytes]]]:
        """For each budget that is nearly used up, and for the disk: before when chunks were last used that may be
        compacted, and of which namespaces."""
        evictor, mark = self._catalog.evictor, self._catalog.config.compact_watermark
        for account in evictor.accounts:
            if evictor.used(account) > account.limit * mark:
                yield time.time() - RECENT, account.namespaces
        if evictor.spare() < 0:
            yield time.time() - RECENT, self._catalog.index.namespaces()

    def _cold(self, namespaces: Iterable[bytes], before: float) -> list[tuple[bytes, bytes]]:
        found = []
        for ns in namespaces:
            with contextlib.suppress(KvfsError):  # retired meanwhile
                number = FORMS.index(self.target(ns).form)
                found += [(ns, key) for key in self._catalog.index.cold(ns, number, before, BATCH)]
        return found

    # --- how far ---

    def target(self, ns: bytes) -> Level:
        """What chunks of a namespace are brought to: lossless, or, where its fidelity is lossy, the coarsest level that
        was found good enough for it."""
        if self._catalog.store.manifest(ns).fidelity == "exact":
            return LEVELS["lossless"]
        return gate.allowed(self._catalog.store.derived, ns)[0]

    def force(self, ns: bytes, level: Level) -> None:
        """Bring chunks of a namespace to ``level`` from now on, whatever has been measured. IdentityError for a level
        with loss where chunks are exact."""
        if self._catalog.store.manifest(ns).fidelity == "exact" and not level.lossless:
            raise IdentityError(f"{ns.hex()[:12]} holds exact chunks: {level.name} would change them")
        gate.record(self._catalog.store.derived, ns, level, None)

    # --- pressure and heat ---

    def relieves(self, account: Account, used: int) -> bool:
        """Whether eviction may wait, as compaction is making room in a budget of which ``used`` bytes are in use."""
        if not self._thread.is_alive() or self._catalog.config.compact_after is None or used > account.limit:
            return False
        now = time.monotonic()
        with self._lock:
            since, last = self._strained.get(account.name, (now, now))
            since = now if now - last > 2 * GRACE else since
            self._strained[account.name] = since, now
        if now - since > GRACE or not self._cold(account.namespaces, time.time() - RECENT):
            return False
        self._wake.set()
        return True

    def used(self, ns: bytes, key: bytes) -> None:
        """Somebody reads a chunk that has no raw form; when that has happened often enough it gets it back."""
        now = int(time.time())
        with self._lock:
            times = [at for at in self._warm.pop((ns, key), []) if now - at < RECENT]
            if not times or times[-1] != now:  # a chunk has several parts
                times.append(now)
            if len(times) >= self._catalog.config.heat_hits:
                self._hot.append((ns, key))
                self._wake.set()
                return
            self._warm[ns, key] = times
            if len(self._warm) > MAX_WARM:
                self._warm.popitem(last=False)

    # --- a chunk ---

    def compact(self, ns: bytes, key: bytes) -> None:
        """Bring a chunk to the form that its namespace may have. DaemonUnavailable, StoreFull."""
        level = self.target(ns)
        with self._turn:
            for part in self._parts(ns, key):
                try:
                    self._shrink(ns, key, part, level)
                except (ChunkNotFound, ChunkCorrupt) as e:
                    self._look_again(ns, key, part, e)
                except Unsupported as e:
                    log.debug("%s.%s stays raw: %s", key.hex()[:12], part, e)
            self._catalog.index.brought(ns, key, FORMS.index(level.form))

    def bring_back(self, ns: bytes, key: bytes) -> bool:
        """Give a chunk its raw form back, beside the coded one; False if it has that, or there is no room for it."""
        with self._turn:
            row = self._catalog.index.get(ns, key)
            if row is None:
                return False
            manifest = self._catalog.store.manifest(ns)
            parts = [p for p in manifest.parts if row.coded & ~row.raw & manifest.bit(p)]
            need = sum(layout(manifest, part, row.tokens or manifest.chunk_tokens).nbytes for part in parts)
            if not parts or not self._has_room(ns, need):
                return False
            for part in parts:
                try:
                    self._write(ns, key, part, RAW)
                except (ChunkNotFound, ChunkCorrupt) as e:
                    self._look_again(ns, key, part, e)
        self._catalog.metrics.heated.inc()
        return True

    def _parts(self, ns: bytes, key: bytes) -> list[PartId]:
        manifest, [mask] = self._catalog.store.manifest(ns), self._catalog.index.masks(ns, [key])
        return [part for part in manifest.parts if mask & manifest.bit(part)]

    def _has_room(self, ns: bytes, nbytes: int) -> bool:
        catalog = self._catalog
        evictor, config, wear = catalog.evictor, catalog.config, catalog.wear
        within = all(
            evictor.used(account) + nbytes <= account.limit * config.low_watermark
            for account in evictor.accounts
            if ns in account.namespaces
        )
        return within and evictor.spare() >= nbytes and (wear.limit is None or wear.today() + nbytes <= wear.limit)

    def _shrink(self, ns: bytes, key: bytes, part: PartId, level: Level) -> None:
        """Leave only the coded form of a part, at ``level`` or coarser."""
        catalog = self._catalog
        row, bit = catalog.index.get(ns, key), catalog.store.manifest(ns).bit(part)
        if row is None:
            return
        has_raw = bool(row.raw & bit)
        if row.coded & bit:
            if FORMS.index(self._verified_form(ns, key, part)) >= FORMS.index(level.form):
                if has_raw:
                    self._retire(ns, key, part, coded=False)
                return
            if not has_raw and not self._write(ns, key, part, RAW):
                return
            self._retire(ns, key, part, coded=True)
        if self._write(ns, key, part, level.name):
            self._retire(ns, key, part, coded=False)

    def _verified_form(self, ns: bytes, key: bytes, part: PartId) -> str:
        """The coded form that a part has, all of which has been read; ChunkCorrupt."""
        verifier = self._catalog.verifier
        with verifier.open_coded(ns, key, part) as file:
            if not verifier.is_verified(os.fstat(file.fd)):
                verifier.check(file.fd, ns, key, part, coded=True)
            return file.header.form

    def _write(self, ns: bytes, key: bytes, part: PartId, form: str) -> bool:
        """Publish a part in another form beside the one that it has; False if it is gone, or not worth it."""
        catalog, coded = self._catalog, form != RAW
        store, lay = catalog.store, layout(catalog.store.manifest(ns), part, catalog.store.manifest(ns).chunk_tokens)
        temp = catalog.verifier.reserve(ns, lay.nbytes)
        try:
            try:
                made = self._make_form(ns, key, part, form, temp.fd)
            finally:
                os.close(temp.fd)
            self._spent += made.seconds
            source = stored_files(store, ns, key, part).get(not coded)
            if source is None or (coded and made.size > WORTH * source.st_size):
                return False
            admitted = catalog.verifier.admit(ns, temp.name, key, part, coded)
            catalog.wear.wrote(admitted.size)
        finally:
            store.discard(ns, temp.name)
        if not catalog.index.add_form(ns, key, part, admitted.size, coded):  # removed meanwhile
            store.remove(ns, key, [part], [coded])
            return False
        self._keep_times(ns, key, part, coded, source)
        catalog.index.learn(ns, admitted.meta)
        if coded:
            catalog.metrics.compacted.labels(made.form).inc()
        else:
            catalog.tell("changed", ns, key, part)
        return True

    def _keep_times(self, ns: bytes, key: bytes, part: PartId, coded: bool, source: os.stat_result) -> None:
        """To its readers a part is as old in one form as in the other."""
        with contextlib.suppress(ChunkNotFound):
            fd = self._catalog.store.open_part(ns, key, part, coded)
            try:
                os.utime(fd, ns=(source.st_atime_ns, source.st_mtime_ns))
                self._catalog.verifier.mark(os.fstat(fd))
            finally:
                os.close(fd)

    def _retire(self, ns: bytes, key: bytes, part: PartId, coded: bool) -> None:
        """Remove one form of a part that is there in the other too; who has it open reads on."""
        catalog = self._catalog
        there = stored_files(catalog.store, ns, key, part).get(coded)
        catalog.store.remove(ns, key, [part], [coded])
        catalog.index.discard(ns, key, part, there and there.st_size, coded)
        if not coded:
            catalog.tell("changed", ns, key, part)

    def _look_again(self, ns: bytes, key: bytes, part: PartId, error: ChunkNotFound | ChunkCorrupt) -> None:
        """A file of a part is not what it should be: see which, and put it away."""
        if isinstance(error, ChunkCorrupt):
            self._catalog.damaged(ns, key, part, error.reason)
        else:
            for coded in (False, True):
                self._catalog.refresh(ns, key, part, coded)

    # --- on request ---

    def sweep(self, ns: bytes | None, idle: float | None, seconds: float) -> Swept:
        """For about ``seconds``, compact chunks of a namespace, or of all (None), that were not used for ``idle``
        seconds (None: as configured) and that nobody holds. DaemonUnavailable, StoreFull."""
        catalog, until, idle = self._catalog, time.monotonic() + seconds, self._idle(idle)
        namespaces = catalog.index.namespaces() if ns is None else [ns]
        chunks = before = after = 0
        while time.monotonic() < until:
            cold = [each for each in self._cold(namespaces, time.time() - idle) if not catalog.leases.held(*each)]
            if not cold:
                return Swept(chunks, before, after, True)
            for each in cold:
                had = self._size(*each)
                self.compact(*each)
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
            to = level or self.target(each)
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
            for part in self._parts(ns, key):
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
            return self._make_form(ns, key, part, level.name, out).size
        finally:
            os.close(out)
