"""What no single file shows: kinds that lack a head slice, and chunks that nothing leads to."""

from collections.abc import Iterator
from functools import partial

from kvfs.fsck.findings import Finding, Repairs
from kvfs.fsck.parts import Chunk
from kvfs.names import leaf_name

__all__ = ["incomplete", "orphans"]


def incomplete(repairs: Repairs, ns: bytes, rows: dict[bytes, Chunk]) -> Iterator[Finding]:
    """Kinds of which some head slices are missing and no longer to be expected: no reader can use the others."""
    store, manifest = repairs.store, repairs.store.manifest(ns)
    kinds = [[part for part in manifest.parts if part.kind == kind.name] for kind in manifest.kinds]
    for key, row in rows.items():
        for parts in kinds:
            there = [part for part in parts if row.mask & manifest.bit(part)]
            if not there or len(there) == len(parts):
                continue
            path = f"{_path(ns, key)}.{parts[0].kind}"
            detail = f"{len(there)} of {len(parts)} head slices"
            if repairs.is_old(row.newest):
                row.mask &= ~sum(manifest.bit(part) for part in there)
                yield repairs.repair("incomplete", path, detail, "removed", partial(store.remove, ns, key, there))
            else:
                yield repairs.report("incomplete", path, f"{detail}; the others may be on their way")


def orphans(repairs: Repairs, ns: bytes, rows: dict[bytes, Chunk], remove: bool) -> Iterator[Finding]:
    """Chunks that no text can lead to, since a chunk before them is gone: dead weight."""
    store, parts = repairs.store, repairs.store.manifest(ns).parts
    reachable = set()
    for key, row in sorted(rows.items(), key=lambda item: item[1].position):
        if not row.mask:
            continue
        if row.position == 0 or row.parent in reachable or not repairs.is_old(row.newest):
            reachable.add(key)
            continue
        detail = f"{row.size} bytes at token {row.position}, and no chunk {row.parent.hex()[:12]} before it"
        if remove:
            yield repairs.repair("orphan", _path(ns, key), detail, "removed", partial(store.remove, ns, key, parts))
        else:
            yield repairs.report("orphan", _path(ns, key), detail)


def _path(ns: bytes, key: bytes) -> str:
    return f"{ns.hex()}/{leaf_name(key)}/{key.hex()}"
