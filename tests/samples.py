"""Small stores for the tests: a hybrid namespace, parts with known bytes."""

import os
import secrets
from pathlib import Path

import numpy as np

from kvfs import chunk
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.store import Store

MANIFEST = Manifest(
    weights="ab" * 32,
    config={"model_type": "sample"},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("swa512", (0, 1), 2, 64, 64), GroupKind("full", (2,), 2, 64, 64)),
)
"""Four parts a chunk: swa512.h0, swa512.h1, full.h0, full.h1; 64 and 32 KiB each at 256 tokens."""


def payload(key: bytes, part: PartId, manifest: Manifest = MANIFEST, tokens: int = 256) -> bytes:
    """Bytes that depend on key and part."""
    return np.random.default_rng([*key, part.slice, len(part.kind)]).bytes(chunk.layout(manifest, part, tokens).nbytes)


def put(
    store: Store,
    key: bytes,
    *parts: PartId,
    manifest: Manifest = MANIFEST,
    tokens: int = 256,
    position: int = 0,
    parent: bytes = bytes(32),
) -> None:
    """Publish parts (default: all) of a chunk as a writer without a daemon does."""
    for part in parts or manifest.parts:
        temp = store.reserve(manifest.ns)
        meta = chunk.PartMeta(manifest.ns, key, parent, tokens, position, part)
        chunk.write_part(temp.fd, manifest, meta, payload(key, part, manifest, tokens))
        os.close(temp.fd)
        store.publish(manifest.ns, temp.name, key, part)


def new_store(path: Path, manifest: Manifest = MANIFEST) -> Store:
    store = Store.init(path)
    store.register(manifest, {"name": "sample", "revision": "r1"})
    return store


def new_key() -> bytes:
    return secrets.token_bytes(32)
