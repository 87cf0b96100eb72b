"""Saves from an engine's blocks: gathered into staging at the end of the step, written behind.

The engine never waits for the store: what finds no room in staging is dropped and counted. The writing thread does, for
a daemon that may be restarting.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvfs.chunk import PartMeta, layout, write_part
from kvfs.errors import DaemonUnavailable, DeadlineExceeded, KvfsError
from kvfs.identity import Manifest
from kvfs.vllm_hook.copying import Copy
from kvfs.vllm_hook.jobs import Save
from kvfs.vllm_hook.layout import PagedKV
from kvfs.vllm_hook.staging import Bytes, Staging
from kvfs.vllm_hook.stats import Counts
from kvfs.vllm_hook.threads import step_aside

__all__ = ["Saver"]

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that gathered parts wait for a daemon that is away. After that each is tried once, until one gets through."""
PAUSE = 0.1
ANSWER = 2.0
"""Seconds a daemon may take to hand out a file: it may be short of time beside an engine that uses every core."""
QUIET = 30.0
"""Seconds between warnings about a store that does not take parts."""


class Item(NamedTuple):
    """A gathered part on its way to the store; ``ready`` returns when ``data`` is whole."""

    manifest: Manifest
    meta: PartMeta
    data: Bytes
    ready: Callable[[], None] | None


class Saver:
    """The saves of one rank. At most ``staging_bytes`` are on the way at any time."""

    def __init__(self, client: Any, kv: PagedKV, copy: Copy, counts: Counts, staging_bytes: int) -> None:
        self._client, self._kv, self._copy, self._counts = client, kv, copy, counts
        self._staging = Staging(staging_bytes, copy.allocate)
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._warned = -QUIET
        self._away: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvfs-save", daemon=True)
        self._thread.start()

    def gather(self, save: Save, manifest: Manifest) -> None:
        """Copy the parts of a save out of the blocks, or drop them; on return the blocks may be overwritten (by
        whatever comes after `Copy.order`)."""
        table = self._kv.tables(save.block_ids)
        for part in save.parts:
            for where in self._kv.stores:
                if where.kind not in part.kinds:
                    continue
                data = self._staging.take(layout(manifest, where, part.tokens).nbytes)
                if data is None:
                    self._counts.add("save_drops", 1, "queue")
                    continue
                try:
                    ready = self._copy.gather(manifest, where, part.tokens, part.position, table, data)
                except BaseException:
                    self._staging.give(data)
                    raise
                meta = PartMeta(manifest.ns, part.key, part.parent, part.tokens, part.position, where)
                self._queue.put(Item(manifest, meta, data, ready))

    def close(self, wait: float) -> None:
        """Write what is on the way, for at most ``wait`` seconds."""
        self._queue.put(None)
        self._closing.set()
        self._thread.join(wait)

    def _run(self) -> None:
        step_aside()
        while (item := self._queue.get()) is not None:
            try:
                if item.ready is not None:
                    item.ready()
                self._deliver(item)
            except (KvfsError, OSError) as e:
                self._counts.add("save_drops", 1, type(e).__name__)
                if time.monotonic() - self._warned > QUIET:
                    self._warned = time.monotonic()
                    log.warning("kvfs: parts are not stored: %s", e)
            except Exception:  # a thread of the hook's outer boundary
                self._counts.add("save_drops", 1, "error")
                log.exception("kvfs: a save failed")
            finally:
                self._staging.give(item.data)

    def _deliver(self, item: Item) -> None:
        """Write a part; wait for a daemon that does not answer, but not for ever."""
        while True:
            try:
                self._write(item)
            except (DaemonUnavailable, DeadlineExceeded):
                now = time.monotonic()
                self._away = self._away or now
                if now - self._away > PATIENCE or self._closing.wait(PAUSE):
                    raise
            else:
                self._away = None
                return

    def _write(self, item: Item) -> None:
        meta = item.meta
        with self._client.reserve(meta.ns, item.data.nbytes, timeout=ANSWER, key=meta.key) as reservation:
            written = write_part(reservation.fd, item.manifest, meta, item.data.data)
            if self._client.publish(meta.ns, reservation, meta.key, meta.part):
                self._counts.add("saved_parts", 1)
                self._counts.add("saved_bytes", written)
            else:
                self._counts.add("parts_present", 1)
