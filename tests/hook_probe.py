"""The connector with eyes: after each load it compares the engine's blocks with the files, and it can be made to fail.

``KVFS_PROBE`` names the file its events go to, ``KVFS_PROBE_STORE`` the folder of the store. ``KVFS_PROBE_FAULTS`` is
``{"fail": [numbers], "hang": [numbers]}``: which of its loads, counted from 1, fail, and which hang for ten seconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfs import _native
from kvfs.chunk import layout, open_part
from kvfs.store import Store
from kvfs.vllm_hook.connector import KvfsConnector
from kvfs.vllm_hook.loader import Active, Loader
from kvfs.vllm_hook.worker import WorkerHalf

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["HANG", "ProbeConnector", "events"]

HANG = 10.0
"""Seconds that a hanging load hangs."""


def tell(**event: Any) -> None:
    line = json.dumps(event | {"pid": os.getpid(), "time": time.monotonic()}) + "\n"
    fd = os.open(os.environ["KVFS_PROBE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(fd, line.encode())
    os.close(fd)


class ProbeLoader(Loader):
    """Counts loads, breaks some, and checks the others."""

    def __init__(self, *args: Any) -> None:
        self.faults = {"fail": [], "hang": []} | json.loads(os.environ.get("KVFS_PROBE_FAULTS", "{}"))
        self.store = Store.open(os.environ["KVFS_PROBE_STORE"])
        self.number: dict[str, int] = {}
        self.lock, self.ending = threading.Lock(), threading.Lock()
        super().__init__(*args)

    def submit(self, load: Any, manifests: Any) -> None:
        with self.lock:
            self.number[load.request] = len(self.number) + 1
        super().submit(load, manifests)

    def _bring(self, active: Active, *args: Any) -> None:
        number = self.number[active.load.request]
        if number in self.faults["fail"]:
            raise OSError(5, "on purpose")
        if number in self.faults["hang"]:
            time.sleep(HANG)
            before = active.token.progress
            try:
                super()._bring(active, *args)
            finally:
                tell(event="woke", number=number, late_bytes=active.token.progress - before)
            return
        super()._bring(active, *args)

    def _end(self, active: Active, reason: str | None) -> None:
        bad = self.compare(active) if reason is None else []
        with self.ending:  # several threads of a load may fail; one of them ends it
            told = active.ended
            super()._end(active, reason)
        if told:
            return
        tell(
            event="load",
            number=self.number[active.load.request],
            n=active.load.n,
            reason=reason,
            bad=bad,
            rank=self._kv.loads[0].slice,
            bytes=active.token.progress,
            seconds=time.monotonic() - active.submitted,
        )

    def compare(self, active: Active) -> list[str]:
        """The parts whose rows in the engine's blocks are not those of their file."""
        load, bad = active.load, []
        for part in load.parts:
            manifest = active.manifests[part.ns]
            for where in self._kv.loads:
                if where.kind not in part.kinds:
                    continue
                lay = layout(manifest, where, part.tokens)
                first = max(load.first[where.kind], self.first_live(active, where.kind)) - part.position
                first, last = max(first, 0), min(load.n - part.position, part.tokens)
                if first >= last:
                    continue
                held = np.zeros(lay.nbytes, np.uint8)
                ops = self._kv.ops(manifest, where, part.tokens)
                _native.gather(ops, active.table, first, last, part.position, held)
                fd = self.store.open_part(part.ns, part.key, where)
                with open_part(fd, manifest, part.key, where) as file:
                    stored = np.frombuffer(file.read(), np.uint8)
                for t in lay.tensors:
                    tensors = (x[t.start : t.start + t.nbytes].reshape(*t.shape[:2], -1) for x in (held, stored))
                    if not np.array_equal(*(x[:, first:last] for x in tensors)):
                        bad.append(f"{where} {t.name} of {part.position}")
        return bad

    def first_live(self, active: Active, kind: str) -> int:
        """Where the blocks of a kind begin: the engine gives a sliding group none before its window."""
        groups = zip(self._kv.geometry.groups, active.load.block_ids, strict=True)
        return max(next(i for i, b in enumerate(ids) if b) * g.block_size for g, ids in groups if g.kind == kind)


class ProbeWorker(WorkerHalf):
    """The worker half with a `ProbeLoader`."""

    loader_class = ProbeLoader


class ProbeConnector(KvfsConnector):
    """`KvfsConnector` with a `ProbeWorker`, telling its counts at the end."""

    worker_class = ProbeWorker

    def get_kv_connector_stats(self) -> Any:
        stats = super().get_kv_connector_stats()
        if stats is not None:
            tell(event="stats", **stats.data)
        return stats


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind that an engine has told."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [e for e in map(json.loads, lines) if e["event"] == kind]
