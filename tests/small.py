"""A store with small chunks, for tests of what many of them do: texts, budgets counted in chunks."""

from kvfs.config import Amount
from kvfs.identity import GroupKind, Manifest
from kvfs.store import Store
from tests.samples import new_key, put

SMALL = Manifest(
    weights="cd" * 32,
    config={"model_type": "small"},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", (0,), 1, 8, 8),),
)
"""One part a chunk, 12 KiB with its header."""
NS = SMALL.ns
PART = SMALL.parts[0]
CHUNK = 4096 + 256 * 8 * 2 * 2
NO_FLOOR = {"min_free": Amount(0, 0.0)}


def text(store: Store, length: int, manifest: Manifest = SMALL) -> list[bytes]:
    """Publish a text of so many chunks behind the daemon's back."""
    keys = [new_key() for _ in range(length)]
    for i, key in enumerate(keys):
        put(store, key, manifest=manifest, position=i * 256, parent=keys[i - 1] if i else bytes(32))
    return keys


def budget(chunks: float) -> Amount:
    return Amount(int(chunks * CHUNK), 0.0)


def names(store: Store) -> set[bytes]:
    return {found.key for ns in store.namespaces() for found in store.scan(ns)}
