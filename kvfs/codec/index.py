"""The index of a coded part: what its streams hold and where they lie (docs/codec-format.md)."""

import functools
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.chunk import MAX_DATA, PartLayout, PartMeta, TensorSpec
from kvfs.codec.rope import MAX_FREQUENCY, Rope
from kvfs.codec.shape import DTYPES, SINK, Kind, Section, Shape, Style

__all__ = ["Index"]

VERSION = 1
LAYER_ALIGNMENT = 16
"""The streams of a layer start at a multiple of it."""
MAX_LAYERS, MAX_HEADS = 1024, 1024
BATCH = 1 << 19
"""Bytes of KV that a native call codes, at least: enough to hide the call, few enough to share out."""
_HEAD = struct.Struct("<8I")
"""Version, dtype, heads, raw tokens, sections, layers, RoPE pairs, 0."""
_SECTION = struct.Struct("<6I")
"""Kind, channels, first channel of RoPE, its pairs, its style, 0."""
_TURNED = 1 << 31
"""In a layer's number: RoPE turns its keys."""


@dataclass(frozen=True)
class Index:
    """One stream for each layer and head, in that order.

    ``layers``: the model's layer numbers; ``turned``: those that RoPE turns, by ``inv_freq`` (float32, a frequency for
    each pair).  ``sizes``: bytes of each stream.  ``layer_sums``: XXH3-64 of each layer's streams; ``sums``: of each
    (tensor, head) of the raw form.
    """

    shape: Shape
    latent: bool
    heads: int
    layers: tuple[int, ...]
    turned: frozenset[int]
    inv_freq: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.int64]
    layer_sums: bytes
    sums: bytes

    @classmethod
    def of(cls, lay: PartLayout, meta: PartMeta, lossless: bool, rope: Rope | None) -> Self:
        """The index of a raw part to be coded, without sizes and sums."""
        rope = None if lossless else rope
        latent = lay.tensors[0].name.endswith(".latent")
        raw = 0 if lossless or meta.position else min(SINK, meta.tokens)
        shape = Shape(lossless, lay.tensors[0].dtype, meta.tokens, raw, _sections(lay, latent, rope))
        layers = tuple(dict.fromkeys(int(t.name.split(".")[1]) for t in lay.tensors))
        turned = rope.layers & frozenset(layers) if rope else frozenset[int]()
        inv_freq = np.array(rope.inv_freq if rope else (), np.float32)
        none = np.zeros(0, np.int64)
        return cls(shape, latent, lay.tensors[0].heads, layers, turned, inv_freq, none, b"", b"")

    @cached_property
    def layout(self) -> PartLayout:
        """Of the raw form."""
        return _layout(self.shape, self.latent, self.heads, self.layers)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """For each stream, whether RoPE turns it, and the offsets of its sections in the raw data."""
        return _places(self.shape, self.latent, self.heads, self.layers, self.turned)

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Where the streams of each layer start, and where the last ones end, padding included."""
        per_layer = self.sizes.reshape(len(self.layers), self.heads).sum(1)
        return np.concatenate([[0], np.cumsum(-(-per_layer // LAYER_ALIGNMENT) * LAYER_ALIGNMENT)])

    @cached_property
    def streams(self) -> npt.NDArray[np.int64]:
        """For each stream its start, its size, and `places`."""
        sizes = self.sizes.reshape(len(self.layers), self.heads)
        starts = self.bounds[:-1, None] + np.cumsum(sizes, axis=1) - sizes
        return np.ascontiguousarray(np.column_stack([starts.ravel(), self.sizes, self.places]), np.int64)

    def batches(self) -> list[tuple[int, int]]:
        """Ranges of layers worth a native call each, in order."""
        step = max(2, -(-BATCH * len(self.layers) // self.layout.nbytes))
        return [(i, min(i + step, len(self.layers))) for i in range(0, len(self.layers), step)]

    def turns(self, position: int) -> bytearray | None:
        """Cosines and sines for the tokens of a part at ``position``, as the native codec takes them."""
        return _turns(self.inv_freq.tobytes(), position, self.shape.tokens) if len(self.inv_freq) else None

    def pack(self) -> bytes:
        """As bytes, a multiple of LAYER_ALIGNMENT."""
        block = _pack_frame(self.shape, self.heads, self.layers, self.turned, self.inv_freq)
        block += self.sizes.astype(np.uint32).tobytes()
        block += bytes(-len(block) % 8) + self.layer_sums + self.sums
        return block + bytes(-len(block) % LAYER_ALIGNMENT)

    @classmethod
    def parse(cls, block: bytes, lossless: bool, latent: bool, tokens: int) -> Self:
        """The reverse; ValueError for anything that `pack` does not write."""
        if len(block) < _HEAD.size:
            raise ValueError("too short")
        _, _, heads, _, n_sections, n_layers, pairs, _ = _HEAD.unpack_from(block)
        if not (0 < heads <= MAX_HEADS and 0 < n_layers <= MAX_LAYERS and 1 <= n_sections <= 2 and pairs < len(block)):
            raise ValueError(f"{n_layers} layers, {n_sections} sections, {heads} heads, {pairs} pairs of RoPE")
        split = _HEAD.size + _SECTION.size * n_sections + 4 * n_layers + 4 * pairs
        pad = split + 4 * n_layers * heads
        sums = pad + -pad % 8
        end = sums + 8 * n_layers + 8 * n_layers * heads * (1 if latent else 2)
        if len(block) != end + -end % LAYER_ALIGNMENT or any(block[pad:sums]) or any(block[end:]):
            raise ValueError("not the size that its numbers make")
        shape, layers, turned, inv_freq = _frame(block[:split], lossless, latent, tokens)
        sizes = np.frombuffer(block, np.uint32, n_layers * heads, split).astype(np.int64)
        middle = sums + 8 * n_layers
        return cls(shape, latent, heads, layers, turned, inv_freq, sizes, block[sums:middle], block[middle:end])


def _pack_frame(
    shape: Shape, heads: int, layers: tuple[int, ...], turned: frozenset[int], inv_freq: npt.NDArray[np.float32]
) -> bytes:
    """What all parts of one kind and length have in common."""
    counts = (heads, shape.raw_tokens, len(shape.sections), len(layers), len(inv_freq), 0)
    block = _HEAD.pack(VERSION, list(DTYPES).index(shape.dtype), *counts)
    for x in shape.sections:
        block += _SECTION.pack(x.kind, x.channels, x.rope_first, x.rope_pairs, x.style, 0)
    numbers = [i | (_TURNED if i in turned else 0) for i in layers]
    return block + np.array(numbers, np.uint32).tobytes() + inv_freq.tobytes()


@functools.lru_cache(maxsize=256)
def _frame(
    block: bytes, lossless: bool, latent: bool, tokens: int
) -> tuple[Shape, tuple[int, ...], frozenset[int], npt.NDArray[np.float32]]:
    """The reverse, of as many bytes as its numbers of sections, layers and pairs make."""
    version, dtype, heads, raw, n_sections, n_layers, pairs, _ = _HEAD.unpack_from(block)
    if version != VERSION or dtype >= len(DTYPES) or raw > SINK or (latent and heads != 1):
        raise ValueError(f"version {version}, dtype {dtype}, {raw} raw tokens, {heads} heads")
    fields = [_SECTION.unpack_from(block, _HEAD.size + _SECTION.size * i) for i in range(n_sections)]
    width = sum(f[1] for f in fields)
    sections = tuple(
        Section(Kind(k), n, width if latent else n, first, p, Style(st)) for k, n, first, p, st, _ in fields
    )
    shape = Shape(lossless, list(DTYPES)[dtype], tokens, raw, sections)
    if not shape.codable or any(
        s.rope_first + 2 * s.rope_pairs > s.channels or s.rope_pairs not in (0, pairs) for s in sections
    ):
        raise ValueError("a shape that cannot be coded")
    at = _HEAD.size + _SECTION.size * n_sections
    numbers = np.frombuffer(block, np.uint32, n_layers, at).astype(np.int64)
    layers = tuple((numbers & ~_TURNED).tolist())
    turned = frozenset((numbers[numbers >= _TURNED] & ~_TURNED).tolist())
    if list(layers) != sorted(set(layers)) or layers[-1] > 9999 or (turned and not pairs):
        raise ValueError("layers are not in order, or turned by nothing")
    inv_freq = np.frombuffer(block, np.float32, pairs, at + 4 * n_layers)
    if not ((inv_freq > 0) & (inv_freq <= MAX_FREQUENCY)).all():
        raise ValueError("frequencies of RoPE out of range")
    if _layout(shape, latent, heads, layers).nbytes > MAX_DATA:
        raise ValueError("more KV than a part can hold")
    if _pack_frame(shape, heads, layers, turned, inv_freq) != block:
        raise ValueError("not the index that its numbers make")
    return shape, layers, turned, inv_freq


@functools.lru_cache(maxsize=64)
def _turns(inv_freq: bytes, position: int, tokens: int) -> bytearray:
    """All parts of a chunk share it, and all texts that a host serves at the same time."""
    return _native.codec_rotation(inv_freq, position, tokens)


@functools.lru_cache(maxsize=256)
def _places(
    shape: Shape, latent: bool, heads: int, layers: tuple[int, ...], turned: frozenset[int]
) -> npt.NDArray[np.int64]:
    pieces = _layout(shape, latent, heads, layers).bounds[:-1]
    if latent:
        inside = np.cumsum([0, *(s.channels for s in shape.sections[:-1])]) * DTYPES[shape.dtype][0]
        starts = pieces[:, None] + inside
    else:
        starts = pieces.reshape(-1, 2, heads).transpose(0, 2, 1).reshape(-1, 2)
    places = np.ascontiguousarray(np.column_stack([np.repeat([i in turned for i in layers], heads), starts]), np.int64)
    places.flags.writeable = False
    return places


@functools.lru_cache(maxsize=256)
def _layout(shape: Shape, latent: bool, heads: int, layers: tuple[int, ...]) -> PartLayout:
    """All parts of one kind and length share it, as raw ones do."""
    dims: dict[str, tuple[int, ...]] = {"latent": (shape.tokens, shape.channels)}
    if not latent:
        k, v = (s.channels for s in shape.sections)
        dims = {"k": (heads, shape.tokens, k), "v": (heads, shape.tokens, v)}
    tensors, at = list[TensorSpec](), 0
    for layer in layers:
        for which, dim in dims.items():
            size = DTYPES[shape.dtype][0] * math.prod(dim)
            tensors.append(TensorSpec(f"layers.{layer}.{which}", shape.dtype, dim, at, size))
            at += size
    return PartLayout(tuple(tensors))


def _sections(lay: PartLayout, latent: bool, rope: Rope | None) -> tuple[Section, ...]:
    """How rows are cut: K by channel and V by token; a latent by token, its rotary end by channel."""
    width = lay.tensors[0].shape[-1]
    first, pairs, style = (rope.first, len(rope.inv_freq), rope.style) if rope else (0, 0, Style.HALVES)
    if not latent:
        value = lay.tensors[1].shape[-1]
        return Section(Kind.BY_CHANNEL, width, width, first, pairs, style), Section(Kind.BY_TOKEN, value, value)
    if not pairs:
        return (Section(Kind.BY_TOKEN, width, width),)
    return Section(Kind.BY_TOKEN, first, width), Section(Kind.BY_CHANNEL, width - first, width, 0, pairs, style)
