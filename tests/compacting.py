"""Compacts a store that no daemon serves, as `kvfs compact --now` does, or puts it through another codec."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.baselines import BASELINES, bf16
from kvfs import codec
from kvfs.chunk import open_part, write_part
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.metrics import Metrics
from kvfs.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfs.chunk import PartFile


def compact(folder: Path, level: str = "lossless") -> int:
    """Bring all chunks to their coded form, those of lossy namespaces to ``level``; returns how many got smaller."""
    store = Store.open(folder)
    store.lock_daemon("a test")
    catalog, chunks = Catalog(store, Config(store=folder), Metrics()), 0
    try:
        catalog.reconcile()
        for ns in store.namespaces():
            if store.manifest(ns).fidelity == "lossy":
                catalog.compactor.force(ns, codec.level(level))
        while True:
            swept = catalog.sweep(None, 0, 60)
            chunks += swept.chunks
            if swept.done:
                return chunks
    finally:
        catalog.close()
        store.close()


def recode(source: Path, folder: Path, baseline: str) -> int:
    """Put the KV of every part of the raw store ``source`` through a codec of `bench.baselines`, and what is left of it
    into its copy ``folder``, as raw parts; returns how many there were."""
    done = 0
    with Store.open(source) as raw, Store.open(folder) as store:
        for ns in raw.namespaces():
            manifest = raw.manifest(ns)
            for key, part in [(found.key, found.part) for found in raw.scan(ns)]:
                with open_part(raw.open_part(ns, key, part), manifest, key, part) as file:
                    data = _through(BASELINES[baseline], file)
                    temp = store.reserve(ns)
                    write_part(temp.fd, manifest, file.header.meta, data)
                os.close(temp.fd)
                done += store.publish(ns, temp.name, key, part)
    return done


def _through(code: Callable[..., Any], file: PartFile) -> bytes:
    data = np.frombuffer(file.read(), np.uint8)
    tensors = [data[t.start : t.start + t.nbytes].view(np.uint16).reshape(t.shape) for t in file.header.layout.tensors]
    k, v = (np.stack(tensors[i::2]).astype(np.uint32) << 16 for i in (0, 1))
    k, v, _ = code(k.view(np.float32), v.view(np.float32))
    k, v = ((bf16(x).view(np.uint32) >> 16).astype(np.uint16) for x in (k, v))
    return b"".join(x.tobytes() for layer in zip(k, v, strict=True) for x in layer)
