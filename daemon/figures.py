"""What a daemon tells of itself: `kvfs status`, ``stats.json``."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import kvfs
from kvfs.codec import gate

if TYPE_CHECKING:
    from kvfs.daemon.catalog import Catalog


def figures(catalog: Catalog) -> dict[str, Any]:
    """What the store holds and what has been counted since the start, ready for JSON."""
    chunks, total = catalog.index.totals()
    counted = catalog.metrics.snapshot()
    lookups, published = counted.get("kvfs_lookup_total", {}), counted.get("kvfs_publish_total", {})
    space = os.statvfs(catalog.store.path)
    lost, lost_bytes = catalog.store.lost.totals()
    return {
        "version": kvfs.__version__,
        "store": str(catalog.store.path),
        "uptime": time.monotonic() - catalog.started,
        "chunks": chunks,
        "bytes": total,
        "free": space.f_bavail * space.f_frsize,
        "namespaces": [namespace(catalog, ns) for ns in catalog.index.namespaces()],
        "hits": int(lookups.get("result=hit", 0)),
        "misses": int(lookups.get("result=miss", 0)),
        "leases": len(catalog.leases),
        "publishes": int(published.get("result=created", 0)),
        "drops": int(published.get("result=refused", 0)),
        "eviction": eviction(catalog, counted),
        "compaction": compaction(catalog, counted),
        "quarantined": by_label(counted, "kvfs_quarantined_total"),
        "lost_found": {"entries": lost, "bytes": lost_bytes, "purged": int(counted["kvfs_quarantine_purged_total"])},
        "scrub": {
            "rate": catalog.config.scrub_rate,
            "complete_since": counted["kvfs_scrub_complete_since_seconds"],
            "bytes": int(counted["kvfs_scrub_bytes_total"]),
            "damaged": int(counted["kvfs_scrub_damaged_total"]),
        },
        "metrics": counted,
    }


def eviction(catalog: Catalog, counted: dict[str, Any]) -> dict[str, Any]:
    """Budgets, what is used of them, and what had to go or was refused; bytes, and chunks or parts."""
    evictor, today = catalog.evictor, catalog.wear.today()
    accounts = [
        {"reason": each.name, "namespaces": len(each.namespaces), "limit": each.limit, "used": evictor.used(each)}
        for each in evictor.accounts
    ]
    return {
        "policy": catalog.config.policy,
        "budgets": accounts,
        "pending": catalog.admission.pending,
        "min_free": evictor.floor(),
        "written_day": today,
        "write_budget": catalog.wear.limit,
        "drive_writes_per_day": today / max(1, evictor.total),
        "evicted": by_label(counted, "kvfs_evicted_total"),
        "refused": by_label(counted, "kvfs_refused_total"),
    }


def compaction(catalog: Catalog, counted: dict[str, Any]) -> dict[str, Any]:
    """What the forms take and save, in bytes; chunks by form; and how far each namespace may go."""
    forms, area = catalog.index.forms(), catalog.reader.area
    return {
        "raw": forms.raw,
        "coded": forms.coded,
        "saved": forms.saved,
        "chunks": forms.chunks,
        "after": catalog.config.compact_after,
        "namespaces": [compacted(catalog, ns) for ns in catalog.index.namespaces()],
        "parts": by_label(counted, "kvfs_compacted_total"),
        "heated": int(counted["kvfs_heated_total"]),
        "hydrated": {"bytes": area.used, "limit": catalog.config.hydrate_limit, "decoded": area.decoded},
    }


def namespace(catalog: Catalog, ns: bytes) -> dict[str, Any]:
    """What one namespace is called and holds."""
    info = catalog.store.info(ns)
    chunks, size = catalog.index.totals(ns)
    return {"ns": ns.hex(), "name": info.get("name"), "revision": info.get("revision"), "chunks": chunks, "bytes": size}


def compacted(catalog: Catalog, ns: bytes) -> dict[str, Any]:
    """How far a namespace is compacted, whether an operator decided that, and what it saves."""
    level, forced = catalog.compactor.target(ns), gate.allowed(catalog.store.derived, ns)[1]
    return {"ns": ns.hex(), "level": level.name, "forced": forced, "saved": catalog.index.forms(ns).saved}


def by_label(counted: dict[str, Any], name: str) -> dict[str, int]:
    """The counts of a metric with one label, by its value."""
    return {label.partition("=")[2]: int(n) for label, n in counted.get(name, {}).items()}
