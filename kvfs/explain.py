"""Why a text hits or misses: how far its chunks reach, what stops them, and which namespaces nearly fit.

Pure: the daemon and a client of a bare store both give it what they see.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvfs.identity import Manifest, diff
from kvfs.reach import reach

__all__ = ["Known", "explain"]

MAX_NEAR = 5
"""Namespaces named, those with the fewest differences first."""
MAX_DIFFERENCES = 20


class Known(NamedTuple):
    """A namespace of the store: its manifest, what people call it, and its chunks (None if not counted)."""

    manifest: Manifest
    info: Mapping[str, Any]
    chunks: int | None


def explain(
    ns: bytes,
    keys: Sequence[bytes],
    masks: Sequence[int],
    known: Mapping[bytes, Known],
    manifest: Manifest | None = None,
) -> dict[str, Any]:
    """An answer for people and programs, ready for JSON.

    ``keys`` are those of the text's full chunks in order, ``masks`` what is present of each (nothing, if the store
    does not know the namespace), ``known`` the namespaces of the store, ``manifest`` that of the asker.

    ``verdict`` is ``hit`` (every chunk can be loaded), ``partial``, ``miss`` or ``unknown-namespace``; ``reach`` the
    tokens that can be loaded; ``blocker`` the first chunk that stops them, with its missing parts; ``near`` other
    namespaces with the fields in which their manifests differ from the asker's, as ``[field, asked, theirs]``.
    """
    own = known.get(ns)
    asked = manifest or (own.manifest if own else None)
    answer: dict[str, Any] = {
        "ns": ns.hex(),
        "name": own.info.get("name") if own else None,
        "chunks": own.chunks if own else None,
        "asked": len(keys),
        "complete": 0,
        "reach": 0,
        "blocker": None,
        "near": _near(ns, asked, known) if asked else [],
    }
    if own is None:
        return answer | {"verdict": "unknown-namespace"}
    whole = own.manifest.all_parts
    answer["complete"] = sum(1 for _ in itertools.takewhile(lambda m: m & whole == whole, masks))
    limit = len(keys) * own.manifest.chunk_tokens
    reached = reach(own.manifest, masks, (), limit)
    answer["reach"] = reached.n
    if reached.blocker:
        b = reached.blocker
        answer["blocker"] = {
            "index": b.index,
            "key": keys[b.index].hex(),
            "absent": masks[b.index] == 0,
            "kind": b.kind,
            "missing": list(b.missing),
        }
    return answer | {"verdict": "hit" if reached.n == limit else "partial" if reached.n else "miss"}


def _near(ns: bytes, asked: Manifest, known: Mapping[bytes, Known]) -> list[dict[str, Any]]:
    others = [(diff(asked, k.manifest), other, k) for other, k in known.items() if other != ns]
    others.sort(key=lambda o: (len(o[0]), -(o[2].chunks or 0), o[1]))
    return [
        {
            "ns": other.hex(),
            "name": k.info.get("name"),
            "chunks": k.chunks,
            "differences": len(differs),
            "differs": [list(d) for d in differs[:MAX_DIFFERENCES]],
        }
        for differs, other, k in others[:MAX_NEAR]
    ]
