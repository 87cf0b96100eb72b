"""Loads into an engine's blocks: threads that read, and a watchdog that gives up what takes too long.

A load is reported exactly once, and a failure only when nothing writes into its blocks any more: after that report the
engine gives them to someone else. A read that hangs cannot be interrupted; its thread is left to itself and replaced.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.chunk import layout, open_part
from kvfs.client.claims import LeasedPart
from kvfs.codec import FORMS
from kvfs.coded import open_coded
from kvfs.cores import cores
from kvfs.errors import ChunkCorrupt, ChunkNotFound, DaemonUnavailable, DeadlineExceeded, KvfsError, StoreBusy
from kvfs.identity import Manifest, PartId
from kvfs.vllm_hook.copying import CodedRows, Copy
from kvfs.vllm_hook.jobs import Load, LoadPart
from kvfs.vllm_hook.layout import PagedKV
from kvfs.vllm_hook.stats import Counts
from kvfs.vllm_hook.threads import step_aside
from kvfs.vllm_hook.ways import Ways

__all__ = ["Loader"]

log = logging.getLogger(__name__)

MAX_STUCK = 8
"""Threads left in reads that hang; beyond it loads fail at once until one comes back."""
MAX_THREADS = 4
"""Threads that a load is spread over, where there are as many cores. A forward pass waits for the slowest of its own
threads, so a load beside it costs least if it is over soon."""
AT_ONCE = 16
"""Parts that a thread leases at once: opening them takes the interpreter, which the other threads want as well, so that
their first bytes would be late if it were all of a long text."""
TOGETHER = 6
"""Coded parts that a thread decodes without coming back to the interpreter, for which it would wait each time."""
REPORT_TIMEOUT = 1.0
RAW = FORMS[0]

CANCELLED = "cancelled"
"""Of an attempt whose load was ended meanwhile: whoever did that has reported why."""
REASONS: dict[type[Exception], str] = {
    ChunkNotFound: "missing",
    ChunkCorrupt: "corrupt",
    DaemonUnavailable: "unavailable",
    DeadlineExceeded: "deadline",
}
"""Why loads fail, as the label of a metric; anything else is an ``error``."""

Ref = tuple[LoadPart, PartId]
Group = Sequence[tuple[LoadPart, LeasedPart]]


@dataclass(eq=False)
class Active:
    """A load under way. ``left`` counts the batches that its threads have not finished; ``threads`` are those at work,
    with their numbers."""

    load: Load
    manifests: Mapping[bytes, Manifest]
    table: npt.NDArray[np.int64]
    deadline: float
    submitted: float
    left: int
    token: _native.CancelToken = field(default_factory=_native.CancelToken)
    ended: bool = False
    moved_at: float | None = None
    moved: int = 0
    threads: dict[threading.Thread, int] = field(default_factory=dict)

    def rows(self, part: LoadPart, where: PartId) -> tuple[int, int]:
        """Which rows of a part are wanted: [first, last)."""
        load = self.load
        return max(load.first[where.kind] - part.position, 0), min(load.n - part.position, part.tokens)


class Loader:
    """The loads of one rank. ``stall`` and ``longest`` are deadlines in seconds (see `Settings`)."""

    def __init__(self, client: Any, kv: PagedKV, copy: Copy, counts: Counts, stall: float, longest: float) -> None:
        self._client, self._kv, self._copy, self._counts = client, kv, copy, counts
        self._stall, self._longest = stall, longest
        self._ways = Ways()
        self._queue: queue.SimpleQueue[tuple[Active, list[Ref]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards all that follows
        self._active: dict[str, Active] = {}
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._stuck: set[threading.Thread] = set()
        self._closed = False
        self._width = min(MAX_THREADS, len(cores()))
        for number in range(self._width):
            self._start_thread(number)
        threading.Thread(target=self._watch, name="kvfs-watchdog", daemon=True).start()

    def submit(self, load: Load, manifests: Mapping[bytes, Manifest]) -> None:
        """Begin a load; what becomes of it is told by `take`. ``manifests`` are those of its namespaces, by digest."""
        if not load.parts or any(part.ns not in manifests for part in load.parts):
            self.fail(load.request, "refused")
            return
        refs = [(part, where) for part in load.parts for where in self._kv.loads if where.kind in part.kinds]
        batches = [b for i in range(self._width) if (b := refs[i :: self._width])]
        table = self._kv.tables(load.block_ids)
        now = time.monotonic()
        with self._changed:
            if len(self._stuck) >= MAX_STUCK:
                self._count_failure(load.request, "stuck")
                return
            ahead = sum(a.load.seconds for a in self._active.values())
            deadline = now + max(self._longest, 2 * (ahead + load.seconds))
            active = Active(load, manifests, table, deadline, now, len(batches))
            self._active[load.request] = active
            self._changed.notify_all()
        for batch in batches:
            self._queue.put((active, batch))

    def fail(self, request: str, reason: str) -> None:
        """Report a load as failed, after ending what is under way of it."""
        with self._changed:
            active = self._active.get(request)
            if active is None:
                self._count_failure(request, reason)
                return
        self._end(active, reason)

    def take(self, wait: float = 0.0) -> tuple[set[str], set[str]]:
        """Loads that have ended since the last call, and which of them failed. ``wait``: so many seconds, at most, for
        one to end, if any is under way."""
        if not (self._done or (wait and self._active)):  # the usual case in every step of the engine
            return set(), set()
        with self._changed:
            self._changed.wait_for(lambda: self._done or not self._active, wait)
            done, failed = self._done, self._failed
            self._done, self._failed = set(), set()
        return done, failed

    def close(self) -> None:
        """Give up every load and end the threads; those in a read that hangs are left behind."""
        with self._changed:
            self._closed, active = True, list(self._active.values())
            self._changed.notify_all()
        for each in active:
            self._end(each, "shutdown")
        for _ in range(self._width):
            self._queue.put(None)

    # --- ending ---

    def _end(self, active: Active, reason: str | None) -> None:
        """Report the end of a load, unless it was; ``reason`` says why it failed."""
        if reason is not None:
            active.token.cancel()  # on return nothing is written into its blocks
        with self._changed:
            if active.ended:
                return
            active.ended = True
            del self._active[active.load.request]
            if reason is not None:
                self._replace(active.threads)
                self._count_failure(active.load.request, reason)
                return
            self._done.add(active.load.request)
            self._changed.notify_all()
        self._counts.add("loads", 1)
        self._counts.add("load_bytes", active.token.progress)
        self._counts.add("load_seconds", time.monotonic() - active.submitted)

    def _count_failure(self, request: str, reason: str) -> None:
        self._done.add(request)
        self._failed.add(request)
        self._changed.notify_all()
        self._counts.add("load_failures", 1, reason)

    def _replace(self, threads: dict[threading.Thread, int]) -> None:
        """The threads of a load given up may be stuck: leave them, and start others."""
        for thread in () if self._closed else threads.keys() - {threading.current_thread()}:
            self._stuck.add(thread)
            self._start_thread(threads[thread])

    # --- threads ---

    def _start_thread(self, number: int) -> None:
        threading.Thread(target=self._run, args=(number,), name=f"kvfs-load-{number}", daemon=True).start()

    def _run(self, number: int) -> None:
        me = threading.current_thread()
        step_aside(number, self._width)
        while (task := self._queue.get()) is not None:
            active, refs = task
            with self._changed:
                if active.ended:
                    continue
                active.threads[me] = number
                active.moved_at = active.moved_at or time.monotonic()
            with contextlib.ExitStack() as later:  # what is not needed to report the end of the load
                reason = self._attempt(active, refs, later)
                with self._changed:
                    active.threads.pop(me, None)
                    active.left -= 1
                    finished = active.left == 0
                    replaced = me in self._stuck
                    self._stuck.discard(me)
                if reason != CANCELLED and (reason or finished):
                    self._end(active, reason)
            if replaced:
                return

    def _attempt(self, active: Active, refs: Sequence[Ref], later: contextlib.ExitStack) -> str | None:
        """Load a batch; returns why it failed. ``later`` gets what remains to be done: ending the lease, and reporting
        parts that were read here first."""
        try:
            self._batch(active, refs, later)
        except InterruptedError:
            return CANCELLED
        except (KvfsError, OSError) as e:
            log.log(logging.WARNING if isinstance(e, ChunkCorrupt) else logging.DEBUG, "kvfs: load failed: %s", e)
            return next((slug for kind, slug in REASONS.items() if isinstance(e, kind)), "error")
        except Exception:  # a thread of the hook's outer boundary
            log.exception("kvfs: a load failed")
            return "error"
        return None

    def _batch(self, active: Active, refs: Sequence[Ref], later: contextlib.ExitStack) -> None:
        for i in range(0, len(refs), AT_ONCE):
            some = refs[i : i + AT_ONCE]
            for ns in dict.fromkeys(part.ns for part, _ in some):
                own = [(part, where) for part, where in some if part.ns == ns]
                wanted = [(part.key, where) for part, where in own]
                lease = later.enter_context(self._client.lease(ns, wanted, timeout=self._stall, coded=True))
                self._bring(active, list(zip((part for part, _ in own), lease.parts, strict=True)), later)

    def _bring(self, active: Active, todo: Group, later: contextlib.ExitStack) -> None:
        """Bring parts into the blocks, each by the way that is the fastest for its form."""
        coded = []
        for part, leased in todo:
            if leased.form == RAW:
                self._fill(active, part, leased, later)
            elif self._ways.decodes() or not self._hydrated(active, part, leased, later):
                os.posix_fadvise(leased.fd, 0, 0, os.POSIX_FADV_WILLNEED)  # the disk reads while others are decoded
                coded.append((part, leased))
        for i in range(0, len(coded), TOGETHER):
            self._decode(active, coded[i : i + TOGETHER], later)

    def _fill(self, active: Active, part: LoadPart, leased: LeasedPart, later: contextlib.ExitStack) -> None:
        """Bring a part in its raw form into the blocks."""
        manifest, sums = active.manifests[part.ns], None
        try:
            with open_part(os.dup(leased.fd), manifest, part.key, leased.part) as file:
                part.check(file.header.meta)
                sums = None if leased.verified else file.header.sums
                self._copy.load(file, manifest, active.table, *active.rows(part, leased.part), sums, active.token)
        except ChunkCorrupt as e:
            later.callback(self._report, part.ns, part.key, leased.part, e.reason)
            raise
        if sums is not None:
            later.callback(self._report, part.ns, part.key, leased.part, None)

    def _hydrated(self, active: Active, part: LoadPart, leased: LeasedPart, later: contextlib.ExitStack) -> bool:
        """Have the store decode a part, and bring that into the blocks. False: there is no memory to hydrate it."""
        began = time.monotonic()
        try:
            with self._client.lease(part.ns, [(part.key, leased.part)], timeout=self._stall) as hydrated:
                self._fill(active, part, hydrated.parts[0], later)
        except StoreBusy:
            return False
        self._count(active, [(part, leased)], False, time.monotonic() - began)
        return True

    def _decode(self, active: Active, group: Group, later: contextlib.ExitStack) -> None:
        """Decode parts into the blocks."""
        began = time.monotonic()
        try:
            with contextlib.ExitStack() as files:
                rows: list[CodedRows] = []
                for part, leased in group:
                    manifest = active.manifests[part.ns]
                    file = files.enter_context(open_coded(os.dup(leased.fd), manifest, part.key, leased.part))
                    part.check(file.header.meta)
                    rows.append((file, manifest, *active.rows(part, leased.part)))
                self._copy.decode(rows, active.table, active.token)
        except ChunkCorrupt as e:
            for part, leased in group:
                if e.name == f"{part.key.hex()}.{leased.part}":
                    later.callback(self._report, part.ns, part.key, leased.part, e.reason)
            raise
        for part, leased in group:
            if not leased.verified:
                later.callback(self._report, part.ns, part.key, leased.part, None)
        self._count(active, group, True, time.monotonic() - began)

    def _count(self, active: Active, group: Group, decoded: bool, seconds: float) -> None:
        nbytes = sum(layout(active.manifests[p.ns], leased.part, p.tokens).nbytes for p, leased in group)
        self._ways.took(decoded, nbytes, seconds)
        way = "decoded" if decoded else "hydrated"
        self._counts.add("compacted_bytes", nbytes, way)
        self._counts.add("compacted_seconds", seconds, way)

    def _report(self, ns: bytes, key: bytes, where: PartId, reason: str | None) -> None:
        try:
            self._client.report(ns, key, where, reason, timeout=REPORT_TIMEOUT)
        except (KvfsError, OSError) as e:  # it will be verified again, by someone
            log.debug("report of %s.%s failed: %s", key.hex(), where, e)

    # --- deadlines ---

    def _watch(self) -> None:
        pause = min(self._stall / 10, 0.05)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._closed)
                if self._closed:
                    return
                active = list(self._active.values())
            now = time.monotonic()
            for each in active:
                if (reason := self._overdue(each, now)) is not None:
                    log.warning("kvfs: a load is given up (%s) after %.2f s", reason, now - each.submitted)
                    self._end(each, reason)
            time.sleep(pause)

    def _overdue(self, active: Active, now: float) -> str | None:
        if now > active.deadline:
            return "deadline"
        if active.moved_at is None:
            return None
        if (moved := active.token.progress) != active.moved:
            active.moved, active.moved_at = moved, now
        return "stall" if now - active.moved_at > self._stall else None
