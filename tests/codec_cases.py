"""Streams for the codec's tests: KV-like numbers in every shape that is coded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfs import _native
from kvfs.codec import reference
from kvfs.codec.shape import DTYPES, Kind, Section, Shape, Style

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

MEDIUM = (-320, -196)


@dataclass(frozen=True)
class Case:
    """A stream to code: its shape, its sections `[tokens, channels]`, and what RoPE turns it by."""

    name: str
    shape: Shape
    arrays: list[Array]
    turns: Array | None
    steps: tuple[int, int] = MEDIUM


def kv(shape: Shape, rng: np.random.Generator, scale: float = 1) -> list[Array]:
    """Channels of very different spread and mean, tokens of different norm, now and then an outlier."""
    out = []
    for s in shape.sections:
        size = (shape.tokens, s.channels)
        x = rng.standard_normal(size) * np.exp(rng.standard_normal(s.channels)) + 2 * rng.standard_normal(s.channels)
        x *= scale * np.exp(0.7 * rng.standard_normal((shape.tokens, 1)))
        x[rng.random(size) < 0.002] *= 50
        if shape.dtype == "BF16":
            out.append(reference.to_bf16(x.astype(np.float32)))
        elif shape.dtype == "F16":
            out.append(x.astype(np.float16).view(np.uint16))
        elif shape.dtype == "F32":
            out.append(x.astype(np.float32).view(np.uint32))
        else:
            out.append(rng.integers(0, 256, size).astype(np.uint8))
    return out


def case(
    name: str, dtype: str = "BF16", tokens: int = 40, k: int = 64, v: int = 64, *, lossless: bool = False, raw: int = 0,
    pairs: int | None = None, first: int = 0, style: Style = Style.HALVES, latent: bool = False,
    steps: tuple[int, int] = MEDIUM, scale: float = 1, seed: int = 0,
) -> Case:  # fmt: skip
    """Make a case; ``pairs`` are those of RoPE, all channels of K unless given."""
    pairs = 0 if lossless else k // 2 if pairs is None else pairs
    keys = Section(Kind.BY_CHANNEL, k, k + v if latent else k, first, pairs, style)
    values = Section(Kind.BY_TOKEN, v, k + v if latent else v)
    shape = Shape(lossless, dtype, tokens, raw, (values, keys) if latent else (keys, values))
    rng = np.random.default_rng([seed, *name.encode()])
    turns = None
    if pairs:
        turns = reference.rotation(
            (1e4 ** (-np.arange(pairs) / pairs)).astype(np.float32), int(rng.integers(0, 100000)), tokens
        )
    return Case(name, shape, kv(shape, rng, scale), turns, steps)


def cases() -> list[Case]:
    """Every element type, head size, kind of RoPE and extreme."""
    return [
        case("head 64 from position 0", raw=4),
        case("head 80", k=80, v=80, tokens=35),
        case("head 96", k=96, v=96, tokens=17),
        case("head 128", k=128, v=128, tokens=33),
        case("head 192 with values of 128", k=192, v=128, tokens=16),
        case("head 256, a quarter turned", k=256, v=256, tokens=16, pairs=32),
        case("turned from the middle", first=16, pairs=16),
        case("neighbours turned", style=Style.NEIGHBOURS),
        case("not turned", pairs=0),
        case("latent", k=64, v=512, tokens=24, raw=4, latent=True, style=Style.NEIGHBOURS),
        case("half", "F16", raw=4),
        case("half, small numbers", "F16", scale=1e-2),
        case("one token", tokens=1),
        case("only raw tokens", tokens=3, raw=3),
        case("a whole chunk", tokens=256, raw=4),
        case("fine steps", steps=(-701, -576)),
        case("steps that make exceptions", steps=(-1300, -1300)),
        case("coarse steps", steps=(0, 124)),
        case("steps so coarse that all is zero", steps=(4000, 4000)),
        case("all zero", scale=0),
        case("lossless", lossless=True, tokens=33),
        case("lossless chunk", lossless=True, tokens=256),
        case("lossless zero", lossless=True, scale=0),
        case("lossless half", "F16", 33, 80, 80, lossless=True),
        case("lossless e4m3", "F8_E4M3", 20, lossless=True),
        case("lossless e5m2", "F8_E5M2", 20, lossless=True),
        case("lossless float32", "F32", 20, lossless=True),
        case("lossless latent", k=64, v=512, tokens=16, latent=True, lossless=True),
    ]


def refused() -> list[Case]:
    """What no lossy level can hold."""
    infinite = case("an infinity")
    infinite.arrays[0][7, 3] = 0x7F80
    nan = case("a NaN in values")
    nan.arrays[1][7, 3] = 0x7FC1
    huge = case("squares overflow", scale=1e30)
    far = case("one number too far from the others", tokens=256)
    far.arrays[1][100, 5] = reference.to_bf16(np.float32(1e6))
    return [infinite, nan, huge, far, case("finer than any step", scale=1e-7)]


def interleave(shape: Shape, arrays: list[Array]) -> tuple[bytearray, list[int]]:
    """Memory with the sections as their pitch says, and where each starts."""
    if shape.sections[0].pitch > shape.sections[0].channels:
        first = arrays[0].shape[1] * arrays[0].itemsize
        return bytearray(np.concatenate(arrays, axis=1).tobytes()), [0, first]
    return bytearray(b"".join(a.tobytes() for a in arrays)), [0, arrays[0].nbytes]


def separate(shape: Shape, memory: bytearray | bytes, arrays: list[Array]) -> list[Array]:
    """The reverse of `interleave`."""
    kind = arrays[0].dtype
    if shape.sections[0].pitch > shape.sections[0].channels:
        rows = np.frombuffer(memory, kind).reshape(shape.tokens, -1)
        return [rows[:, : arrays[0].shape[1]], rows[:, arrays[0].shape[1] :]]
    return [
        np.frombuffer(memory, kind, a.size, at).reshape(a.shape)
        for a, at in zip(arrays, (0, arrays[0].nbytes), strict=True)
    ]


def native_encode(c: Case) -> bytes | None:
    memory, places = interleave(c.shape, c.arrays)
    found = _native.codec_encode(c.shape.array(), c.steps, c.turns, memory, np.array([[1, *places]]))
    return None if found is None else found[0]


def native_decode(c: Case, stream: bytes) -> list[Array] | str:
    """The sections, or what is wrong with the stream."""
    memory, places = interleave(c.shape, c.arrays)
    memory[:] = b"\xa5" * len(memory)
    bad = _native.codec_decode(c.shape.array(), c.turns, stream, memory, np.array([[0, len(stream), 1, *places]]))
    return bad[1] if bad else separate(c.shape, memory, c.arrays)


def nbytes(shape: Shape) -> int:
    return DTYPES[shape.dtype][0] * shape.tokens * shape.channels
