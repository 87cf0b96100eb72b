"""The decoder in numpy: docs/codec-format.md as a program.  Slow; the other decoders give the same bytes.

Floats are float32 throughout and every operation rounds.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvfs.codec.shape import DTYPES, LANES, Kind, Section, Shape, Style
from kvfs.codec.tables import FIRST_LOSSLESS, LOSSLESS, LOSSY, LUT, SLOTS
from kvfs.errors import ChunkCorrupt

__all__ = ["decode", "rotation"]

Array = npt.NDArray[Any]
F32 = np.float32

LOW = 1 << 15
STEP_ONE = 128
OCTAVES = 16
FLIP = 0x80
EIGHTHS = np.array([0, 759234, 1587184, 2490071, 3474675, 4548394, 5719293, 6996167], dtype=np.uint32)


# --- arithmetic ----------------------------------------------------------------------------------


def step(code: Array | int) -> Array:
    """2 ** ((code - 128) / 8), codes 0 to 256."""
    code = np.asarray(code, np.uint32)
    bits: Array = (code >> 3) + np.uint32(127 - STEP_ONE // 8) << 23 | EIGHTHS[code & 7]
    return bits.view(F32)


def to_bf16(x: Array) -> Array:
    """To nearest, ties to even."""
    u = np.asarray(x, F32).view(np.uint32)
    return ((u + np.uint32(0x7FFF) + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(u: Array) -> Array:
    return (u.astype(np.uint32) << 16).view(F32)


def widen(u: Array, dtype: str) -> Array:
    return from_bf16(u) if dtype == "BF16" else u.view(np.float16).astype(F32)


def narrow(x: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return to_bf16(x)
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


def rotation(inv_freq: Array, position: int, tokens: int) -> Array:
    """Cosines and sines, float32 ``[tokens, 2, pairs]``: token 16 i + j of the chunk is turned by
    (position + 16 i) * inv_freq and then by j * inv_freq, all in float64 without fused operations."""

    def turns(t: Array) -> tuple[Array, Array]:
        angle = np.multiply.outer(t.astype(np.float64), inv_freq.astype(np.float64))
        quarters = angle * float.fromhex("0x1.45f306dc9c883p-1") + 1.5 * 2.0**52
        n = quarters - 1.5 * 2.0**52
        r = angle - n * float.fromhex("0x1.921fb544p+0") - n * float.fromhex("0x1.0b4611a626331p-34")
        z = r * r
        s = np.full_like(z, SINE[-1])
        for a in SINE[-2::-1]:
            s = a + z * s
        c = np.full_like(z, COSINE[-1])
        for a in COSINE[-2::-1]:
            c = a + z * c
        s, c = r + r * z * s, 1 - 0.5 * z + z * z * c
        q = quarters.view(np.int64) & 3
        return np.choose(q, [c, -s, -c, s]), np.choose(q, [s, c, -s, -c])

    fine_c, fine_s = turns(np.arange(16))
    coarse_c, coarse_s = (x[:, None] for x in turns(position + np.arange(0, tokens, 16)))
    c = coarse_c * fine_c - coarse_s * fine_s
    s = coarse_s * fine_c + coarse_c * fine_s
    return np.stack([x.reshape(-1, len(inv_freq))[:tokens] for x in (c, s)], axis=1).astype(F32)


SINE = [float.fromhex(x) for x in (
    "-0x1.5555555555549p-3", "0x1.111111110f8a6p-7", "-0x1.a01a019c161d5p-13", "0x1.71de357b1fe7dp-19",
    "-0x1.ae5e68a2b9cebp-26", "0x1.5d93a5acfd57cp-33",
)]  # fmt: skip
COSINE = [float.fromhex(x) for x in (
    "0x1.555555555554cp-5", "-0x1.6c16c16c15177p-10", "0x1.a01a019cb159p-16", "-0x1.27e4f809c52adp-22",
    "0x1.1ee9ebdb4b1c4p-29", "-0x1.8fae9be8838d4p-37",
)]  # fmt: skip
"""Coefficients of fdlibm's kernels on [-pi/4, pi/4]."""


def turn(x: Array, section: Section, turns: Array, back: bool) -> Array:
    """Rows ``[tokens, channels]`` turned by RoPE, or turned back."""
    n, out = section.rope_pairs, x.copy()
    i = section.rope_first + np.arange(n) * (1 if section.style == Style.HALVES else 2)
    j = i + (n if section.style == Style.HALVES else 1)
    c, s = turns[:, 0], -turns[:, 1] if back else turns[:, 1]
    a, b = x[:, i], x[:, j]
    out[:, i] = a * c - b * s
    out[:, j] = b * c + a * s
    return out


def unpack_bits(data: bytes, bits: int, count: int) -> Array:
    planes = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(count, bits)
    numbers: Array = (planes.astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(1, dtype=np.uint32)
    return numbers


# --- streams -------------------------------------------------------------------------------------


def rans_decode(words: Array, states: Array, tables: Array, rows: int) -> Array:
    """The reverse; ChunkCorrupt unless all words are used and every lane ends in the state it began with."""
    x, at, out = states.astype(np.uint32), 0, np.empty((rows, len(tables)), np.int32)
    if ((x < LOW) | (x >= LOW << 16)).any():
        raise damaged("states")
    for row in range(rows):
        for c in range(0, len(tables), LANES):
            entry = LUT[tables[c : c + LANES], x & (SLOTS - 1)]
            out[row, c : c + LANES] = entry.view(np.int32) >> 24
            x = (entry >> 12 & 0xFFF) * (x >> 11) + (entry & 0xFFF)
            need = x < LOW
            taken = words[at : at + need.sum()].astype(np.uint32)
            if len(taken) < need.sum():
                raise damaged("words")
            at += len(taken)
            x[need] = x[need] << 16 | taken
    if at != len(words):
        raise damaged("words")
    if (x != LOW).any():
        raise damaged("states")
    return out


class Fields(NamedTuple):
    """The pieces of a stream: raw tokens and side information by section, fractions, states, exceptions, words."""

    heads: list[Array]
    sides: list[Array]
    residual: bytes
    states: Array
    exceptions: Array
    words: Array


def damaged(how: str) -> ChunkCorrupt:
    return ChunkCorrupt("stream", "stream", how)


def fields(shape: Shape, data: bytes) -> Fields:
    """Cut a stream into its pieces."""
    if len(data) < 8:
        raise damaged("truncated")
    n_words, n_exceptions = np.frombuffer(data, np.uint32, 2).tolist()
    nbytes, _, fraction = DTYPES[shape.dtype]
    rows, sizes = shape.rows, [shape.raw_tokens * s.channels * nbytes for s in shape.sections]
    for s in shape.sections:
        by_token = s.channels + 4 + 4 * -(-rows // 16)
        sizes.append(2 * s.channels if shape.lossless else 4 * s.channels if s.kind == Kind.BY_CHANNEL else by_token)
    sizes += [rows * shape.channels // 8 * fraction if shape.lossless else 0, 4 * LANES, 6 * n_exceptions, 2 * n_words]
    ends = (8 + np.cumsum(sizes)).tolist()
    if -(-ends[-1] // 4) * 4 != len(data):
        raise damaged("truncated")
    pieces = [data[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    n = len(shape.sections)
    heads = [
        np.frombuffer(p, f"u{nbytes}").reshape(-1, s.channels) for p, s in zip(pieces, shape.sections, strict=False)
    ]
    sides = [np.frombuffer(p, np.uint8) for p in pieces[n : 2 * n]]
    residual, states, exceptions, words = pieces[2 * n :]
    listed = np.frombuffer(exceptions, np.uint16).reshape(-1, 3).astype(np.int64)
    return Fields(heads, sides, residual, np.frombuffer(states, np.uint32), listed, np.frombuffer(words, np.uint16))


def tables(shape: Shape, sides: list[Array]) -> Iterator[Array]:
    """The table of each channel, by section."""
    for s, side in zip(shape.sections, sides, strict=True):
        by_channel = s.kind == Kind.BY_CHANNEL and not shape.lossless
        table = side[3 * s.channels :] if by_channel else side[: s.channels]
        if shape.lossless:
            table = side[s.channels :] & ~np.uint8(FLIP)
        if by_channel and not np.isfinite(from_bf16(side[: 2 * s.channels].view(np.uint16))).all():
            raise damaged("parameters")
        if (table >= (len(LOSSLESS) if shape.lossless else len(LOSSY))).any():
            raise damaged("parameters")
        yield table.astype(np.int64) + (FIRST_LOSSLESS if shape.lossless else 0)


def decode(shape: Shape, data: bytes, turns: Array | None) -> list[Array]:
    """A stream to unsigned integers ``[tokens, channels]`` by section.  ``turns`` as `rotation` gives it, or None.

    Raises ChunkCorrupt ``stream`` for a damaged stream."""
    _, exponent, fraction = DTYPES[shape.dtype]
    f, rows = fields(shape, data), shape.rows
    symbols = rans_decode(f.words, f.states, np.concatenate(list(tables(shape, f.sides))), rows)
    if shape.lossless:
        octave, flip = (np.concatenate([s.reshape(2, -1)[i] for s in f.sides]).astype(np.int64) for i in (0, 1))
        symbols = (symbols >> 4 ^ flip >> 7) << exponent | octave - (symbols & 15) & (1 << exponent) - 1
    t, c, _ = f.exceptions.T
    if (np.diff(t) < 0).any() or (t >= rows).any() or (c >= shape.channels).any():
        raise damaged("exceptions")
    for row, channel, value in f.exceptions:
        symbols[row, channel] = value if value < 0x8000 else value - 0x10000
    rest: Array = np.zeros(symbols.size, np.uint32)
    if shape.lossless:
        rest = unpack_bits(f.residual, fraction, symbols.size)
    out, first = [], 0
    for s, side, head in zip(shape.sections, f.sides, f.heads, strict=True):
        q, r = (x.reshape(rows, shape.channels)[:, first : first + s.channels] for x in (symbols, rest))
        if shape.lossless:
            body = (q.astype(np.uint32) << fraction | r).astype(head.dtype)
        else:
            with np.errstate(all="ignore"):
                x = dequantise(s, side, q)
                if s.rope_pairs and turns is not None:
                    x = turn(x, s, turns[shape.raw_tokens :], back=False)
                body = narrow(x, shape.dtype)
        out.append(np.concatenate([head, body]))
        first += s.channels
    return out


def dequantise(section: Section, side: Array, q: Array) -> Array:
    n = section.channels
    if section.kind == Kind.BY_CHANNEL:
        return q.astype(F32) * step(side[2 * n : 3 * n]) + from_bf16(side[: 2 * n].view(np.uint16))
    halvings = unpack_bits(side[n + 4 :].tobytes(), 2, 4 * (len(side) - n - 4))[: len(q)]
    scale: Array = step(side[n]) * (F32(1) / (1 << halvings).astype(F32))
    return q.astype(F32) * scale[:, None]
