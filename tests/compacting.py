"""Compacts a bare store whole, as the daemon does part by part."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvfs import codec
from kvfs.chunk import open_part
from kvfs.store import Store

if TYPE_CHECKING:
    from pathlib import Path


def compact(folder: Path, level: str = "lossless") -> int:
    """Put every raw part into its coded form, those of exact namespaces without loss; returns how many there were."""
    store, done = Store.open(folder), 0
    for ns in store.namespaces():
        manifest = store.manifest(ns)
        chosen = codec.level(level if manifest.fidelity == "lossy" else "lossless")
        for key, part in [(found.key, found.part) for found in store.scan(ns) if not found.coded]:
            with open_part(store.open_part(ns, key, part), manifest, key, part) as file:
                rope = codec.rope_of(manifest.config, manifest.kind(part.kind))
                coded = codec.encode_part(file.header, file.verify(), chosen, rope)
            temp = store.reserve(ns)
            os.write(temp.fd, coded)
            os.close(temp.fd)
            store.publish(ns, temp.name, key, part, coded=True)
            store.remove(ns, key, [part], [False])
            done += 1
    store.close()
    return done
