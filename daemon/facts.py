"""What is known of a part besides its bytes; the mount shows it as extended attributes ``user.kvfs.*``."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvfs.coded import open_stored
from kvfs.daemon.incoming import refusal
from kvfs.daemon.shown import stored_files

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
