"""Compacts a store that no daemon serves, as `kvfs compact --now` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfs import codec
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.metrics import Metrics
from kvfs.store import Store

if TYPE_CHECKING:
    from pathlib import Path


def compact(folder: Path, level: str = "lossless") -> int:
    """Bring all chunks to their coded form, those of lossy namespaces to ``level``; returns how many got smaller."""
    store = Store.open(folder)
    store.lock_daemon("a test")
    catalog, chunks = Catalog(store, Config(store=folder), Metrics()), 0
    try:
        catalog.reconcile()
        for ns in store.namespaces():
            if store.manifest(ns).fidelity == "lossy":
                catalog.force(ns, codec.level(level))
        while True:
            swept = catalog.sweep(None, 0, 60)
            chunks += swept.chunks
            if swept.done:
                return chunks
    finally:
        catalog.close()
        store.close()
