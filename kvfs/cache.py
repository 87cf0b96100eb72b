"""The KV of texts on torch tensors, without an engine: `kvfs.open(path, model)` gives put, lookup and get.

A layer's KV is a pair ``(k, v)``, each ``[kv_heads, tokens, head_dim]``: what a transformers cache holds of one text.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvfs import chunk, config, device
from kvfs.client import Client, connect
from kvfs.errors import ChunkCorrupt, IdentityError, Unsupported
from kvfs.identity import (
    TAIL_STEP,
    GroupKind,
    Manifest,
    PartId,
    as_tokens,
    chunk_keys,
    config_identity,
    next_key,
    root_key,
    salt32,
)
from kvfs.reach import Need, Reach, Tail, reach
from kvfs.weights import weights_fingerprint

__all__ = ["TextCache", "manifest_of"]

Layers = Sequence[tuple[Any, Any]]
"""``(k, v)`` of every layer of the model, in order: torch tensors ``[kv_heads, tokens, head_dim]``."""

TIMEOUT = 30.0
"""Seconds a call may take; nobody is kept waiting for a token here."""


def manifest_of(model: Any) -> Manifest:
    """The namespace of a transformers model loaded from a local folder.

    Raises IdentityError if the folder holds no weights, Unsupported for layers that keep no KV of tokens.
    """
    config = model.config.get_text_config()
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rules = getattr(config, "layer_types", None) or ["full_attention"] * layers
    members: dict[str, list[int]] = defaultdict(list)
    for layer, rule in enumerate(rules):
        if rule not in ("full_attention", "sliding_attention"):
            raise Unsupported(f"layers of the kind {rule}")
        members["full" if rule == "full_attention" else f"swa{config.sliding_window}"].append(layer)
    dtype = str(model.dtype).removeprefix("torch.")
    return Manifest(
        weights=weights_fingerprint(model.name_or_path),
        config=config_identity(config.to_dict()),
        model_dtype=dtype,
        kv_dtype=next(name for name, t in device.DTYPES.items() if t == model.dtype),
        kinds=tuple(GroupKind(name, tuple(at), heads, dim, dim) for name, at in sorted(members.items())),
    )


class TextCache:
    """The texts of one namespace, over a mount or a store folder.  ``cache_salt`` keeps them apart from others'."""

    def __init__(
        self, client: Client, manifest: Manifest, info: Mapping[str, Any] | None = None, cache_salt: str | None = None
    ) -> None:
        if any(kind.name == "mla" for kind in manifest.kinds):
            raise Unsupported("latent KV (MLA) without an engine")
        self._client, self.manifest = client, manifest
        self.ns = client.register(manifest, info, timeout=TIMEOUT)
        self._root = root_key(self.ns, salt32(client.salts(timeout=TIMEOUT).own, cache_salt))

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: Any, cache_salt: str | None = None) -> Self:
        """Use the store at ``path``, a mount point or a folder, for ``model``: a transformers model or a `Manifest`."""
        place = {"mount" if os.path.ismount(path) else "store": path}
        if isinstance(model, Manifest):
            return cls(connect(**place, upkeep=config.load()), model, None, cache_salt)
        manifest, info = manifest_of(model), {"name": Path(model.name_or_path).name}
        return cls(connect(**place, upkeep=config.load()), manifest, info, cache_salt)

    def lookup(self, tokens: Sequence[int]) -> int:
        """How many tokens of a text `get` would give: at most all but the last, which a model needs to go on."""
        return self._reach(tokens)[1].n

    def get(self, tokens: Sequence[int]) -> tuple[int, list[tuple[Any, Any]]]:
        """``n`` and the KV of the first n tokens, one ``(k, v)`` a layer; ``(0, [])`` if nothing is stored.

        Layers with a sliding window hold zeros where no token to come can look.  Damaged parts raise ChunkCorrupt
        and are quarantined; asking again then gives a shorter n.
        """
        keys, found = self._reach(tokens)
        if not found.n:
            return 0, []
        refs = [(need, keys[need.end], part) for need in found.needs for part in self.manifest.parts
                if part.kind in need.kinds]  # fmt: skip
        pieces: dict[tuple[int, str], list[tuple[int, int, Any]]] = defaultdict(list)
        with self._client.lease(self.ns, [(key, part) for _, key, part in refs], timeout=TIMEOUT) as lease:
            for (need, key, part), leased in zip(refs, lease.parts, strict=True):
                with chunk.open_part(os.dup(leased.fd), self.manifest, key, part) as file:
                    try:
                        data = file.read() if leased.verified else file.verify()
                    except ChunkCorrupt as e:
                        self._client.report(self.ns, key, part, e.reason, timeout=TIMEOUT)
                        raise
                    if not leased.verified:
                        self._client.report(self.ns, key, part, None, timeout=TIMEOUT)
                    self._take(pieces, file.header.layout, data, need, part, found.n)
        return found.n, [self._layer(pieces, layer, found.n) for layer in range(self.manifest.num_layers)]

    def put(self, tokens: Sequence[int], layers: Layers) -> int:
        """Store the KV of a text; returns how many of its tokens are stored now (a multiple of 16).

        A layer may hold only the text's last tokens, as caches of sliding layers do: what is whole is stored.
        """
        t = as_tokens(tokens)
        keys, size = self._keys(t), self.manifest.chunk_tokens
        ends = [*range(size, len(t) + 1, size)]
        if tail := len(t) % size // TAIL_STEP * TAIL_STEP:
            ends.append(len(t) // size * size + tail)
        have = self._client.lookup(self.ns, [keys[end] for end in ends], timeout=TIMEOUT)
        for end, mask in zip(ends, have, strict=True):
            start = (end - 1) // size * size
            for part in self.manifest.parts:
                if not mask & self.manifest.bit(part):
                    self._store(keys, part, start, end, len(t), layers)
        return ends[-1] if ends else 0

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- inside ---

    def _keys(self, t: Any) -> dict[int, bytes]:
        """The key of every chunk a text may have, by the token it ends at; 0 is the root."""
        size = self.manifest.chunk_tokens
        full = chunk_keys(self._root, t, size)
        keys = {0: self._root} | {(i + 1) * size: key for i, key in enumerate(full)}
        for start in range(0, len(t), size):
            for end in range(start + TAIL_STEP, min(start + size, len(t) + 1), TAIL_STEP):
                keys[end] = next_key(keys[start], t[start:end])
        return keys

    def _reach(self, tokens: Sequence[int]) -> tuple[dict[int, bytes], Reach]:
        t = as_tokens(tokens)
        keys, size = self._keys(t), self.manifest.chunk_tokens
        full = [end for end in keys if end and end % size == 0]
        masks = self._client.lookup(self.ns, [keys[end] for end in full], timeout=TIMEOUT)
        stop = next((i for i, mask in enumerate(masks) if not mask), len(masks)) * size
        tails = [end for end in keys if stop < end < stop + size]
        found = self._client.lookup(self.ns, [keys[end] for end in tails], timeout=TIMEOUT) if tails else []
        probed = [Tail(end, mask) for end, mask in zip(tails, found, strict=True) if mask]
        return keys, reach(self.manifest, masks, probed, len(t) - 1)

    def _take(
        self, pieces: dict[tuple[int, str], list[tuple[int, int, Any]]], lay: chunk.PartLayout, data: bytearray,
        need: Need, part: PartId, n: int,
    ) -> None:  # fmt: skip
        kind = self.manifest.kind(part.kind)
        head = part.slice * (kind.kv_heads // kind.head_slices)
        for spec in lay.tensors:
            _, layer, which = spec.name.split(".")
            t = device.from_bytes(data, spec.dtype, spec.shape, spec.start)
            pieces[int(layer), which].append((head, need.start, t[:, : n - need.start]))

    def _layer(
        self, pieces: Mapping[tuple[int, str], list[tuple[int, int, Any]]], layer: int, n: int
    ) -> tuple[Any, Any]:
        kind = next(k for k in self.manifest.kinds if layer in k.layers)
        k, v = (
            device.place((kind.kv_heads, n, dim), self.manifest.kv_dtype, pieces[layer, which])
            for which, dim in (("k", kind.head_dim), ("v", kind.head_dim_v))
        )
        return k, v

    def _store(self, keys: Mapping[int, bytes], part: PartId, start: int, end: int, total: int, layers: Layers) -> None:
        kind = self.manifest.kind(part.kind)
        heads = kind.kv_heads // kind.head_slices
        first = part.slice * heads
        rows = []
        for layer in kind.layers:
            for t, dim in zip(layers[layer], (kind.head_dim, kind.head_dim_v), strict=True):
                if t.ndim != 3 or (t.shape[0], t.shape[2]) != (kind.kv_heads, dim) or t.dtype != self._dtype:
                    raise IdentityError(f"layer {layer}: {tuple(t.shape)} {t.dtype} is not the KV of this namespace")
                skipped = total - t.shape[1]
                if start < skipped:
                    return
                rows.append(t[first : first + heads, start - skipped : end - skipped])
        meta = chunk.PartMeta(self.ns, keys[end], keys[start], end - start, start, part)
        payload = device.to_bytes(rows)
        size = len(payload) + chunk.MAX_HEADER
        reservation = self._client.reserve(self.ns, size, timeout=TIMEOUT, key=keys[end])
        with reservation:
            chunk.write_part(reservation.fd, self.manifest, meta, payload)
            self._client.publish(self.ns, reservation, keys[end], part, timeout=TIMEOUT)

    @property
    def _dtype(self) -> Any:
        return device.DTYPES[self.manifest.kv_dtype]
