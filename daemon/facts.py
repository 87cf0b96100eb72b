"""What is known of a part or a chunk besides its bytes: of a part the mount shows it as extended attributes
``user.kvfs.*``, of many chunks the control socket tells it."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any, Final

from kvfs.coded import open_stored
from kvfs.daemon.incoming import refusal
from kvfs.daemon.shown import stored_files
from kvfs.errors import ChunkCorrupt, ChunkNotFound

if TYPE_CHECKING:
    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.tree import Place

NAMES: Final = tuple(
    f"user.kvfs.{name}" for name in ("form", "stored", "tokens", "hits", "last_hit", "leases", "pinned")
)


def fact(catalog: Catalog, place: Place, name: str) -> bytes:
    """The value of one of `NAMES`: the form of the part and the bytes of its files; tokens, hits, time of the last hit
    (Unix seconds, 0 for never), leases of its chunk, and 1 if that is pinned. ENODATA for a chunk that the index does
    not know."""
    row = catalog.index.get(place.ns, place.key)
    if row is None:
        raise refusal(errno.ENODATA)
    match name.rpartition(".")[2]:
        case "form":
            with open_stored(catalog.store, place.ns, place.key, place.part) as file:
                return file.header.form.encode()
        case "stored":
            files = stored_files(catalog.store, place.ns, place.key, place.part)
            value = sum(st.st_size for st in files.values())
        case "tokens":
            value = row.tokens or _tokens(catalog, place)
        case "hits":
            value = row.hits
        case "last_hit":
            value = int(row.last)
        case "pinned":
            value = int(row.pinned)
        case _:
            value = catalog.leases.held(place.ns, place.key)
    return str(value).encode()


def _tokens(catalog: Catalog, place: Place) -> int:
    with open_stored(catalog.store, place.ns, place.key, place.part) as file:
        return file.header.meta.tokens


def describe(catalog: Catalog, ns: bytes, key: bytes) -> dict[str, Any] | None:
    """The chunk ``key``, ready for JSON: tokens (0 if no header can be read), the form of its first part, hits, time of
    the last one (Unix seconds, 0 for never), whether it is pinned, and by part the bytes of its files.  None for one
    that the index does not know; NamespaceNotFound."""
    row = catalog.index.get(ns, key)
    if row is None:
        return None
    store, manifest = catalog.store, catalog.store.manifest(ns)
    parts = sorted(part for part in manifest.parts if row.mask & manifest.bit(part))
    tokens, form = row.tokens, "raw"
    if not tokens or not row.raw & manifest.bit(parts[0]):
        with contextlib.suppress(ChunkNotFound, ChunkCorrupt), open_stored(store, ns, key, parts[0]) as file:
            tokens, form = file.header.meta.tokens, file.header.form
    sizes = {str(part): sum(st.st_size for st in stored_files(store, ns, key, part).values()) for part in parts}
    used = {"hits": row.hits, "last_use": int(row.last), "pinned": row.pinned}
    return {"tokens": tokens, "form": form, **used, "parts": sizes}
