"""Compacts a bare store whole, as the daemon does part by part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfs import codec
from kvfs.chunk import open_part
from kvfs.store import Store

if TYPE_CHECKING:
    from pathlib import Path


def compact(folder: Path, level: str = "lossless") -> int:
    """Put every part into its coded form, those of exact namespaces without loss; returns how many there were."""
    store, done = Store.open(folder), 0
    for ns in store.namespaces():
        manifest = store.manifest(ns)
        chosen = codec.level(level if manifest.fidelity == "lossy" else "lossless")
        for found in list(store.scan(ns)):
            with open_part(store.open_part(ns, found.key, found.part), manifest, found.key, found.part) as file:
                rope = codec.rope_of(manifest.config, manifest.kind(found.part.kind))
                coded = codec.encode_part(file.header, file.verify(), chosen, rope)
            raw = folder / ns.hex() / found.key.hex()[:3] / found.entry.name
            raw.with_name(raw.name.replace(".safetensors", ".cachegen.safetensors")).write_bytes(coded)
            raw.unlink()
            done += 1
    store.close()
    return done
