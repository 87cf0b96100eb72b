"""Stores with coded parts, for the tests: a namespace of one small kind, and parts that the codec makes smaller."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from kvfs import chunk, codec
from kvfs.coded import CodedFile, open_coded
from kvfs.config import Amount
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.store import Store
from tests.codec_parts import raw_part

if TYPE_CHECKING:
    from pathlib import Path

    from kvfs.daemon.catalog import Catalog

LONG_AGO = 7200.0
NO_FLOOR = {"min_free": Amount(0, 0.0)}
KIND = GroupKind("full", (0, 1), 2, 64, 64)
PARTS = (PartId("full", 0), PartId("full", 1))


def manifest_of(fidelity: str = "exact") -> Manifest:
    """Two parts a chunk, 132 KiB each at 256 tokens."""
    config = {"model_type": "llama", "rope_theta": 10000.0}
    return Manifest("ef" * 32, config, "bfloat16", "BF16", (KIND,), fidelity=fidelity)


EXACT, LOSSY = manifest_of(), manifest_of("lossy")


def data_of(key: bytes, part: PartId, tokens: int = 256) -> bytes:
    """KV-like numbers that depend on key and part."""
    return raw_part(KIND, tokens=tokens, seed=int.from_bytes(key[:4], "little") + part.slice).data


def put_raw(
    store: Store, manifest: Manifest, key: bytes, parent: bytes = bytes(32), position: int = 0, tokens: int = 256
) -> None:
    """Publish a chunk in its raw form."""
    for part in PARTS:
        temp = store.reserve(manifest.ns)
        meta = chunk.PartMeta(manifest.ns, key, parent, tokens, position, part)
        chunk.write_part(temp.fd, manifest, meta, data_of(key, part, tokens))
        os.close(temp.fd)
        store.publish(manifest.ns, temp.name, key, part)


def put_coded(store: Store, manifest: Manifest, key: bytes, level: str, keep_raw: bool = False) -> None:
    """Publish a chunk in its coded form."""
    put_raw(store, manifest, key)
    for part in PARTS:
        with chunk.open_part(store.open_part(manifest.ns, key, part), manifest, key, part) as file:
            rope = codec.rope_of(manifest.config, KIND)
            blob = codec.encode_part(file.header, file.read(), codec.level(level), rope)
        temp = store.reserve(manifest.ns)
        os.write(temp.fd, blob)
        os.close(temp.fd)
        assert store.publish(manifest.ns, temp.name, key, part, coded=True)
        if not keep_raw:
            store.remove(manifest.ns, key, [part], [False])


def coded_file(store: Store, manifest: Manifest, key: bytes, part: PartId) -> CodedFile:
    """A coded part, open."""
    return open_coded(store.open_part(manifest.ns, key, part, coded=True), manifest, key, part)


def new_store(path: Path, *manifests: Manifest) -> Store:
    """A store with these namespaces."""
    store = Store.init(path)
    for manifest in manifests:
        store.register(manifest, {"name": f"sample-{manifest.fidelity}"})
    return store


def forms_of(store: Store, manifest: Manifest, key: bytes) -> list[str]:
    """The forms of all files of a chunk."""
    found = []
    for each in store.scan(manifest.ns):
        if each.key == key:
            opened = open_coded if each.coded else chunk.open_part
            with opened(store.open_part(manifest.ns, key, each.part, each.coded), manifest, key, each.part) as file:
                found.append(file.header.form)
    return sorted(found)


def read(catalog: Catalog, manifest: Manifest, key: bytes) -> list[bytes]:
    """The parts of a chunk as readers get them, checked."""
    found = []
    for part in PARTS:
        with chunk.open_part(catalog.open_part(manifest.ns, key, part), manifest, key, part) as file:
            found.append(bytes(file.verify()))
    return found


def exact(key: bytes) -> list[bytes]:
    return [data_of(key, part) for part in PARTS]


def on_disk(store: Store) -> int:
    return sum(found.entry.stat().st_size for ns in store.namespaces() for found in store.scan(ns))


def grow_old(catalog: Catalog, ns: bytes = EXACT.ns, ago: float = LONG_AGO) -> None:
    """Chunks that the index knows were last used so long ago."""
    catalog.index.touch(ns, catalog.index.page(ns, 0, 1 << 20).keys, time.time() - ago)
