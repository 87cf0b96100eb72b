"""What is known of a part besides its bytes; the mount shows it as extended attributes ``user.kvfs.*``."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from kvfs import chunk
from kvfs.daemon.incoming import refusal

if TYPE_CHECKING:
    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.tree import Place

NAMES: Final = tuple(f"user.kvfs.{name}" for name in ("form", "tokens", "hits", "last_hit", "leases", "pinned"))


def fact(catalog: Catalog, place: Place, name: str) -> bytes:
    """The value of one of `NAMES`: the form of the file; tokens, hits, time of the last hit (Unix seconds, 0 for
    never), leases of its chunk, and 1 if that is pinned. ENODATA for a chunk that the index does not know."""
    row = catalog.index.get(place.ns, place.key)
    if row is None:
        raise refusal(errno.ENODATA)
    match name.rpartition(".")[2]:
        case "form":
            return _header(catalog, place).form.encode()
        case "tokens":
            value = row.tokens or _header(catalog, place).meta.tokens
        case "hits":
            value = row.hits
        case "last_hit":
            value = int(row.last)
        case "pinned":
            value = int(row.pinned)
        case _:
            value = catalog.leases.held(place.ns, place.key)
    return str(value).encode()


def _header(catalog: Catalog, place: Place) -> chunk.PartHeader:
    fd = catalog.open_part(place.ns, place.key, place.part, verify=False)
    try:
        return chunk.read_header(fd, place.name)
    finally:
        os.close(fd)
