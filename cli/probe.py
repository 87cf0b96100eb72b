"""A transformers model under test: the KV of a text's beginning, and what other KV does to the predictions after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvfs import _native, chunk, codec
from kvfs.cache import manifest_of
from kvfs.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt
    from typing_extensions import Buffer

    from kvfs.identity import Manifest

__all__ = ["Effect", "Probe", "Sample"]

Layers = list[tuple["npt.NDArray[np.uint16]", "npt.NDArray[np.uint16]"]]
"""K and V of every layer, bfloat16 as u16 ``[kv_heads, tokens, head_dim]``."""


class Effect(NamedTuple):
    """On next-token distributions: mean KL divergence (nats) from those of the unchanged KV, share of equal most
    likely tokens, and mean negative log-likelihood (nats) of the text itself."""

    kl: float
    top1: float
    nll: float


@dataclass(frozen=True)
class Sample:
    """A text's tokens, the KV of its prefix, and the log-probabilities ``[continuation, vocabulary]`` after it."""

    tokens: npt.NDArray[np.int64]
    layers: Layers
    logprobs: Any


class Probe:
    """A model from a local folder.  ``prefix`` tokens have their KV coded, ``continuation`` tokens are then predicted,
    each after the true ones before it.  Computes in float32; KV is rounded to bfloat16, as engines keep it."""

    def __init__(self, folder: str | Path, prefix: int = 1024, continuation: int = 224) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.prefix, self.continuation = prefix, continuation
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        self.manifest: Manifest = replace(
            manifest_of(self._model), model_dtype="bfloat16", kv_dtype="BF16", fidelity="lossy"
        )
        if prefix % self.manifest.chunk_tokens:
            raise ConfigError(f"a prefix of {prefix} tokens is not a whole number of chunks")
        if any(kind.name == "mla" for kind in self.manifest.kinds):
            raise Unsupported("latent KV (MLA) without an engine")

    def sample(self, text: str) -> Sample:
        """Run a text.  ConfigError if it has too few tokens."""
        import torch
        from transformers import DynamicCache

        count = self.prefix + self.continuation
        # A token takes a few characters: enough text for the tokens, and no more, for tokenizers are slow.
        tokens = self._tokenizer(text[: 16 * count], return_tensors="np").input_ids[0][:count]
        if len(tokens) < count:
            raise ConfigError(f"a text of {len(tokens)} tokens where {count} are needed")
        cache = DynamicCache()
        with torch.no_grad():
            ids = torch.from_numpy(tokens[None, : self.prefix]).to(self.device)
            self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = [(_to_numpy(x.keys), _to_numpy(x.values)) for x in cache.layers]
        return Sample(tokens, layers, self._predict(tokens, layers))

    def effect(self, sample: Sample, layers: Layers) -> Effect:
        """What the predictions become with other KV of the prefix."""
        import torch

        found, true = self._predict(sample.tokens, layers), sample.logprobs
        kl = (true.exp() * (true - found)).sum(-1).mean()
        top1 = (true.argmax(-1) == found.argmax(-1)).float().mean()
        targets = torch.from_numpy(sample.tokens[self.prefix + 1 :]).to(self.device)
        nll = -found[:-1].gather(1, targets[:, None]).mean()
        return Effect(float(kl), float(top1), float(nll))

    def _predict(self, tokens: npt.NDArray[np.int64], layers: Layers) -> Any:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (k, v) in enumerate(layers):
            cache.update(*(torch.from_numpy(_to_float(x))[None].to(self.device) for x in (k, v)), i)
        with torch.no_grad():
            ids = torch.from_numpy(tokens[None, self.prefix :]).to(self.device)
            logits = self._model(ids, past_key_values=cache, use_cache=True).logits[0]
        return logits.float().log_softmax(-1)

    def coded(self, sample: Sample, level: codec.Level) -> tuple[Layers, float]:
        """KV after coding, every part through a file of its own; and the bits of the files."""
        layers, bits = [(k.copy(), v.copy()) for k, v in sample.layers], 0.0
        for header, data in self.parts(sample.layers):
            kind = self.manifest.kind(header.meta.part.kind)
            file = codec.encode_part(header, data, level, codec.rope_of(self.manifest.config, kind))
            decoded = codec.CodedPart.parse(file, len(file)).decode(file)
            for view, piece in self._pieces(layers, header.meta, decoded):
                view[:] = piece
            bits += 8 * len(file)
        return layers, bits

    def parts(self, layers: Layers) -> Iterator[tuple[chunk.PartHeader, bytes]]:
        """The raw parts, header and data region, of all chunks of the prefix."""
        size = self.manifest.chunk_tokens
        for start in range(0, self.prefix, size):
            for part in self.manifest.parts:
                lay = chunk.layout(self.manifest, part, size)
                meta = chunk.PartMeta(self.manifest.ns, bytes(32), bytes(32), size, start, part)
                data = b"".join(view.tobytes() for view, _ in self._pieces(layers, meta, bytes(lay.nbytes)))
                yield chunk.PartHeader(meta, lay, _native.sums(data, lay.bounds), chunk.ALIGNMENT, "raw", "lossy"), data

    def _pieces(
        self, layers: Layers, meta: chunk.PartMeta, data: Buffer
    ) -> Iterator[tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]]:
        """Every tensor of a part: where it lies in ``layers``, and in its data region."""
        kind, at = self.manifest.kind(meta.part.kind), 0
        heads = kind.kv_heads // kind.head_slices
        for layer in kind.layers:
            for x in layers[layer]:
                view = x[meta.part.slice * heads : (meta.part.slice + 1) * heads, meta.position :][:, : meta.tokens]
                yield view, np.frombuffer(memoryview(data), np.uint16, view.size, at).reshape(view.shape)
                at += view.nbytes


def _to_numpy(x: Any) -> npt.NDArray[np.uint16]:
    import torch

    array: npt.NDArray[np.uint16] = x[0].bfloat16().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return array


def _to_float(x: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)
