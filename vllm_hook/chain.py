"""The keys of one request's text: the chain of its full chunks, and the tails that may be stored inside the next."""

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from kvfs.identity import TAIL_STEP, Extra, Manifest, Salts, as_tokens, next_key, root_key, salt32

__all__ = ["Chain", "chains_of"]


class Chain:
    """Keys of a growing text in one namespace.

    ``keys[i]`` names the i-th full chunk. Keys and tokens already there never change, so other threads may read them
    while the chain is extended. ``request`` is vLLM's; what its KV depends on beside the tokens (multimodal items,
    prompt embeddings) enters the key of each chunk it overlaps. ``salt`` is that of
    `kvfs.identity.salt32`.
    """

    def __init__(self, manifest: Manifest, request: Any, salt: bytes) -> None:
        self.manifest = manifest
        self._request = request
        self._root = root_key(manifest.ns, salt)
        self._tokens: npt.NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self.keys: list[bytes] = []

    def __len__(self) -> int:
        """Tokens of the text known to the chain."""
        return len(self._tokens)

    def extend(self) -> Self:
        """Take in the tokens that the request has got since."""
        have = len(self._tokens)
        if self._request.num_tokens > have:
            fresh = as_tokens(self._request.all_token_ids[have:])
            self._tokens = np.concatenate((self._tokens, fresh))
            chunk = self.manifest.chunk_tokens
            for i in range(len(self.keys), len(self._tokens) // chunk):
                self.keys.append(self._key(i * chunk, (i + 1) * chunk))
        return self

    def parent(self, position: int) -> bytes:
        """The key of the chunk that ends at ``position``."""
        i = position // self.manifest.chunk_tokens
        return self.keys[i - 1] if i else self._root

    def tail_ends(self, index: int) -> list[int]:
        """Where tails inside the chunk ``index`` may end: multiples of 16 tokens, longest first."""
        start = index * self.manifest.chunk_tokens
        stop = min(len(self._tokens), start + self.manifest.chunk_tokens - 1)
        return list(range(start + TAIL_STEP, stop + 1, TAIL_STEP))[::-1]

    def tail_key(self, end: int) -> bytes:
        """The key of the tail that ends at ``end``."""
        return self._key(end // self.manifest.chunk_tokens * self.manifest.chunk_tokens, end)

    def _key(self, start: int, end: int) -> bytes:
        return next_key(self.parent(start), self._tokens[start:end], self._extras(start, end))

    def _extras(self, start: int, end: int) -> list[Extra]:
        extras = []
        for item in self._request.mm_features or ():
            place = item.mm_position
            if place.offset < end and place.offset + place.length > start:
                names = [item.modality.encode(), str(item.mm_hash or item.identifier).encode()]
                framed = b"".join(struct.pack("<I", len(n)) + n for n in names)
                extras.append(Extra(Extra.MULTIMODAL, framed + struct.pack("<qI", place.offset - start, place.length)))
        embeds = self._request.prompt_embeds
        if embeds is not None and start < len(embeds):
            is_token = self._request.prompt_is_token_ids
            mask = bytes(is_token[start:end]) if is_token is not None else b""
            extras.append(Extra(Extra.EMBEDS, _digest(embeds[start:end], mask)))
        return extras


def chains_of(manifests: Sequence[Manifest], request: Any, salts: Salts) -> tuple[Chain, ...]:
    """The keys of a request's text in each of these namespaces, in their order: first as the public tenant has it, if
    there is one, where no request's own salt has a part, then as its own tenant does."""
    own, public = salt32(salts.own, request.cache_salt), salt32(salts.public)
    both = (public, own) if salts.public else (own,)
    return tuple(Chain(manifest, request, salt).extend() for manifest in manifests for salt in both)


def _digest(embeds: torch.Tensor, mask: bytes) -> bytes:
    """SHA-256 of prompt embeddings ``[tokens, hidden]`` and of the mask that tells where tokens are used instead."""
    shape = repr((tuple(embeds.shape), str(embeds.dtype))).encode()
    data = embeds.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(struct.pack("<II", len(shape), len(mask)) + shape + mask + data).digest()
