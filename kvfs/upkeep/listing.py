"""Folders that others write to, listed anew, and what an index has to learn from that."""

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvfs.errors import IdentityError, NamespaceNotFound
from kvfs.identity import PartId
from kvfs.index import Index
from kvfs.names import leaf_name
from kvfs.store import Found, Store

__all__ = ["Difference", "differences", "listed"]


def listed(store: Store, ns: bytes, leaf: str) -> list[Found]:
    """The parts of a leaf folder, as the server has them now.  OSError.

    An NFS client that once saw a name absent goes on saying so for 30 s, until the folder is listed; it may be the
    folder itself that was absent.
    """
    found = list(store.scan_leaf(ns, leaf))
    if not found:
        os.listdir(store.path / ns.hex())
        found = list(store.scan_leaf(ns, leaf))
    return found


class Difference(NamedTuple):
    """A file of a part, in one form, that the index does not know and that is there, or the other way round."""

    ns: bytes
    key: bytes
    part: PartId
    coded: bool
    is_there: bool


def differences(store: Store, index: Index, chunks: Iterable[tuple[bytes, bytes]]) -> Iterator[Difference]:
    """Compare chunks (namespace, key) by listing their folders.  Namespaces that the store does not have are left out.
    OSError if a folder cannot be listed."""
    leaves: dict[tuple[bytes, str], set[bytes]] = defaultdict(set)
    for ns, key in chunks:
        leaves[ns, leaf_name(key)].add(key)
    for (ns, leaf), keys in leaves.items():
        try:
            manifest = store.manifest(ns)
        except (NamespaceNotFound, IdentityError):
            continue
        there = {(found.key, found.part, found.coded) for found in listed(store, ns, leaf) if found.key in keys}
        for key in keys:
            row = index.get(ns, key)
            known = (row.raw, row.coded) if row else (0, 0)
            for part, coded in itertools.product(manifest.parts, (False, True)):
                is_there = (key, part, coded) in there
                if bool(known[coded] & manifest.bit(part)) != is_there:
                    yield Difference(ns, key, part, coded, is_there)
