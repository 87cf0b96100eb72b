"""The encoder in numpy, beside `kvfs.codec.reference`: how the parameters of a stream are chosen.

A decoder follows whatever parameters it is given; these choices are part of the specification so that one input makes
one file.  Sums run over tokens in order, one at a time, in float32; all else that decides is integer arithmetic.
"""

from collections.abc import Sequence

import numpy as np

from kvfs.codec.reference import (
    F32,
    FLIP,
    LOW,
    OCTAVES,
    STEP_ONE,
    Array,
    from_bf16,
    step,
    to_bf16,
    turn,
    widen,
)  # fmt: skip
from kvfs.codec.shape import DTYPES, LANES, Kind, Section, Shape
from kvfs.codec.tables import FIRST_LOSSLESS, LOG2, LOSSLESS, LOSSY, SLOTS, THRESHOLDS, frequencies

__all__ = ["encode"]

HEADROOM, BINS = 8, 32
EXCEPTION_COST = 48 * 256
LEAST_VARIANCE = 16 * 256
ALL_ZERO = -125 * 256

Coded = tuple[bytes, Array, Array]
"""Side information, symbols ``[rows, channels]``, tables ``[channels]``."""


def log2(x: Array) -> Array:
    """256 log2 of positive float32, in integers."""
    bits = np.asarray(x, F32).view(np.uint32)
    logs: Array = ((bits >> 23).astype(np.int64) - 127) * 256 + np.array(LOG2)[bits >> 15 & 255]
    return logs


def pack_bits(values: Array, bits: int) -> bytes:
    """Numbers of so many bits, from the lowest bit of the first byte upwards; a multiple of 8 of them."""
    planes = values.reshape(-1, 1) >> np.arange(bits) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def rans_encode(symbols: Array, tables: Array) -> tuple[Array, list[int]]:
    """States and words (in the order of decoding) of rows ``[rows, channels]``, table by channel."""
    states, words, slots = [LOW] * LANES, list[int](), []
    for table in tables:
        low, freq = frequencies(table)
        slots.append((low, freq.tolist(), (np.cumsum(freq) - freq).tolist()))
    for row in symbols[::-1].tolist():
        for c in range(len(row) - 1, -1, -1):
            low, freqs, starts = slots[c]
            f, start, x = freqs[row[c] - low], starts[row[c] - low], states[c % LANES]
            if x >= f << 20:
                words.append(x & 0xFFFF)
                x >>= 16
            states[c % LANES] = (x // f) * SLOTS + x % f + start
    return np.array(states, np.uint32), words[::-1]


def running_sum(x: Array) -> Array:
    """Column sums, row after row."""
    total = np.zeros(x.shape[1], F32)
    for row in x:
        total += row
    return total


def table_of(q: Array) -> Array:
    square = q.astype(F32)
    return np.searchsorted(np.array(THRESHOLDS), log2(running_sum(square * square) / F32(len(q))), side="right")


def quantise(x: Array, scale: Array) -> Array | None:
    q = np.clip(x * scale, F32(-32768), F32(32768))
    return None if (np.rint(np.abs(q)) >= 32768).any() else np.rint(q).astype(np.int32)


def encode_by_channel(section: Section, x: Array, turns: Array | None, log_step: int) -> Coded | None:
    if section.rope_pairs and turns is not None:
        x = turn(x, section, turns, back=True)
    mean = to_bf16(running_sum(x) / F32(len(x)))
    mean[mean & 0x7F80 == 0] = 0
    x = x - from_bf16(mean)
    squares = running_sum(x * x)
    if not np.isfinite(squares).all():
        return None
    logs = log2(squares / F32(len(x)))
    logs = np.maximum(logs, logs.max() - LEAST_VARIANCE)
    wanted = (4 * log_step + logs.sum() // len(logs) + logs + 64 >> 7) + STEP_ONE
    code = np.clip(wanted, 0, 255)
    q = quantise(x, step(256 - code))
    if q is None or (wanted.min() < 0 and logs.max() > ALL_ZERO):
        return None
    tables = table_of(q)
    return mean.tobytes() + code.astype(np.uint8).tobytes() + tables.astype(np.uint8).tobytes(), q, tables


def encode_by_token(x: Array, log_step: int) -> Coded | None:
    lanes = np.zeros((len(x), 8), F32)
    for c in range(0, x.shape[1], 8):
        lanes += x[:, c : c + 8] * x[:, c : c + 8]
    lanes = lanes[:, :4] + lanes[:, 4:]
    squares = (lanes[:, 0] + lanes[:, 2] + (lanes[:, 1] + lanes[:, 3])) / F32(x.shape[1])
    if not np.isfinite(squares).all():
        return None
    logs = log2(squares)
    median = np.sort(logs)[len(logs) // 2]
    wanted = (2 * log_step + median + 32 >> 6) + STEP_ONE
    code = int(np.clip(wanted, 0, 255))
    halvings = np.clip(-(logs - median + 256 >> 9), 0, 3)
    q = quantise(x, step(256 - code) * (1 << halvings).astype(F32)[:, None])
    if q is None or (wanted < 0 and logs.max() > ALL_ZERO):
        return None
    tables = table_of(q)
    padded = np.zeros(-(-len(x) // 16) * 16, np.uint32)
    padded[: len(x)] = halvings
    return tables.astype(np.uint8).tobytes() + bytes([code, 0, 0, 0]) + pack_bits(padded, 2), q, tables


def encode_octaves(top: Array, exponent: int) -> Coded:
    """Signs and exponents of a lossless section; a symbol of -1 is an exception."""
    rows, channels = top.shape
    exponents, signs = top & (1 << exponent) - 1, top >> exponent
    octave, flip, tables = (np.zeros(channels, np.int64) for _ in range(3))
    for c in range(channels):
        mean = int(exponents[:, c].sum()) * 256 // rows
        flip[c] = 2 * signs[:, c].sum() > rows
        bins = np.clip((mean >> 8) + HEADROOM - exponents[:, c], 0, BINS - 1)
        counts = np.stack([np.bincount(bins[(signs[:, c] ^ flip[c]) == s], minlength=BINS) for s in (0, 1)])
        best = None
        for i, freq in enumerate(LOSSLESS):
            first = mean + int((np.array(freq) * (np.arange(2 * OCTAVES) % OCTAVES)).sum()) * 256 // SLOTS + 128 >> 8
            base = (mean >> 8) + HEADROOM - first
            window = counts[:, base : base + OCTAVES].ravel()
            cost = (rows - window.sum()) * EXCEPTION_COST + (window * (256 * 11 - log2(np.array(freq)))).sum()
            if best is None or cost < best:
                best, octave[c], tables[c] = cost, min(max(first, 0), 255), i
    k = octave - exponents
    symbols = np.where((k < 0) | (k >= OCTAVES), -1, k + OCTAVES * (signs ^ flip))
    side = octave.astype(np.uint8).tobytes() + (tables | flip * FLIP).astype(np.uint8).tobytes()
    return side, symbols, tables + FIRST_LOSSLESS


def encode(shape: Shape, steps: tuple[int, int], arrays: Sequence[Array], turns: Array | None) -> bytes | None:
    """One stream from ``arrays``, unsigned integers ``[tokens, channels]`` by section; None if the values are not
    finite or too far apart for lossy coding.  ``turns`` as `kvfs.codec.reference.rotation` gives it, or None."""
    _, exponent, fraction = DTYPES[shape.dtype]
    rows, coded = shape.rows, list[Coded]()
    raw = b"".join(a[: shape.raw_tokens].tobytes() for a in arrays)
    with np.errstate(all="ignore"):
        for section, a in zip(shape.sections, arrays, strict=True):
            one: Coded | None
            log_step = steps[section.kind]
            if shape.lossless:
                one = encode_octaves((a >> fraction).astype(np.int64), exponent)
            elif rows == 0:
                size = 4 * section.channels if section.kind == Kind.BY_CHANNEL else section.channels + 4
                one = bytes(size), np.zeros((0, section.channels), np.int64), np.zeros(section.channels, np.int64)
            elif section.kind == Kind.BY_CHANNEL:
                x = widen(a[shape.raw_tokens :], shape.dtype)
                one = encode_by_channel(section, x, None if turns is None else turns[shape.raw_tokens :], log_step)
            else:
                one = encode_by_token(widen(a[shape.raw_tokens :], shape.dtype), log_step)
            if one is None:
                return None
            coded.append(one)
    symbols = np.concatenate([q for _, q, _ in coded], axis=1)
    tables = np.concatenate([t for _, _, t in coded])
    exceptions = []
    if shape.lossless:
        tops = np.concatenate([a >> fraction for a in arrays], axis=1)
        exceptions = [(t, c, int(tops[t, c])) for t, c in zip(*np.nonzero(symbols < 0), strict=True)]
        symbols = np.maximum(symbols, 0)
        rest = np.concatenate([a & (1 << fraction) - 1 for a in arrays], axis=1)
        residual = pack_bits(rest.astype(np.int64), fraction)
    else:
        reach = np.array([len(half) - 1 for half in LOSSY])[tables]
        exceptions = [(t, c, int(symbols[t, c])) for t, c in zip(*np.nonzero(np.abs(symbols) > reach), strict=True)]
        symbols = np.clip(symbols, -reach, reach)
        residual = b""
    states, words = rans_encode(symbols, tables)
    listed = np.array([(t, c, v & 0xFFFF) for t, c, v in exceptions], dtype=np.uint16).tobytes()
    counts = np.array([len(words), len(exceptions)], dtype=np.uint32).tobytes()
    side = b"".join(s for s, _, _ in coded)
    out = counts + raw + side + residual + states.tobytes() + listed + np.array(words, np.uint16).tobytes()
    return out + bytes(-len(out) % 4)
