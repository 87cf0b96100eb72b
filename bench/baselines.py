"""Other ways to make KV smaller, for the rate-distortion table: each takes K and V and says what is left of them.

Arrays are float32 ``[layers, kv_heads, tokens, head_dim]``; every function returns K, V and bits, all side information
counted (the paper's tables excepted, which it keeps outside).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array = npt.NDArray[np.float32]
    Result = tuple[Array, Array, float]

__all__ = ["BASELINES"]

CHUNK = 256


def half(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def bf16(x: Array) -> Array:
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def zstd(k: Array, v: Array) -> Result:
    """zstd -3 of the bfloat16 bytes, a stream a chunk."""
    import zstandard

    coder, bits = zstandard.ZstdCompressor(level=3), 0
    for start in range(0, k.shape[2], CHUNK):
        piece = np.stack([x[:, :, start : start + CHUNK] for x in (k, v)])
        bits += 8 * len(coder.compress((piece.view(np.uint32) >> 16).astype(np.uint16).tobytes()))
    return k, v, bits


def int8(k: Array, v: Array) -> Result:
    """A float16 scale for each head and token."""

    def coded(x: Array) -> Array:
        scale = half(np.abs(x).max(-1, keepdims=True) / 127) + 1e-9
        return np.round(x / scale) * scale

    return coded(k), coded(v), k.size * 2 * (8 + 16 / k.shape[-1])


def _asymmetric(x: Array, bits: int) -> Array:
    """Uniform between minimum and maximum of the last axis."""
    low = half(x.min(-1, keepdims=True))
    scale = half((x.max(-1, keepdims=True) - low) / (2**bits - 1)) + 1e-9
    return np.clip(np.round((x - low) / scale), 0, 2**bits - 1) * scale + low


def kivi4(k: Array, v: Array) -> Result:
    """KIVI (Liu et al., ICML 2024), 4 bits: K by channel, 32 tokens a group, V by token, 32 channels a group."""
    layers, heads, tokens, dim = k.shape
    kt = _asymmetric(k.reshape(layers, heads, tokens // 32, 32, dim).swapaxes(-1, -2), 4).swapaxes(-1, -2)
    vt = _asymmetric(v.reshape(layers, heads, tokens, dim // 32, 32), 4)
    return kt.reshape(k.shape), vt.reshape(v.shape), k.size * 2 * (4 + 32 / 32)


def _gaussian_levels(count: int) -> Array:
    """The Lloyd-Max quantiser of a standard normal variable."""
    x = np.linspace(-5, 5, 20001)
    density = np.exp(-x * x / 2)
    levels = np.linspace(-2.5, 2.5, count)
    for _ in range(300):
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        levels = np.array([np.average(x[cell == i], weights=density[cell == i]) for i in range(count)])
    return levels.astype(np.float32)


def turboquant4(k: Array, v: Array) -> Result:
    """TurboQuant (Zandieh et al., 2025), 4 bits, as LMCache uses it: random signs and a Hadamard transform, then K by
    its norm and a Lloyd-Max codebook, V uniformly with scale and zero; no layer left out."""
    dim = k.shape[-1]
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    turn = hadamard * np.random.default_rng(0).choice(np.float32([-1, 1]), dim)[:, None] / np.sqrt(np.float32(dim))
    levels = _gaussian_levels(16)
    z = k @ turn
    norm = half(np.sqrt((z * z).mean(-1, keepdims=True))) + 1e-9
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, z / norm)
    return levels[cell] * norm @ turn.T, _asymmetric(v @ turn, 4) @ turn.T, k.size * (8 + 48 / dim)


def _counts(q: npt.NDArray[np.int64], alphabet: int) -> npt.NDArray[np.float64]:
    """How often each symbol stands in each column of ``q`` ``[tokens, channels]``: ``[channels, alphabet]``."""
    places = q + alphabet * np.arange(q.shape[1])
    return np.bincount(places.ravel(), minlength=alphabet * q.shape[1]).reshape(-1, alphabet).astype(np.float64)


def _ideal_bits(q: npt.NDArray[np.int64]) -> float:
    """Code length of the columns of ``q``, each by its own counts."""
    counts = _counts(q - q.min(), int(np.ptp(q)) + 1)
    return float(-(counts * np.log2(np.maximum(counts, 1) / len(q))).sum())


def cachegen_lmcache(k: Array, v: Array) -> Result:
    """CacheGen as LMCache ships it (default bins): one scale for each layer and token over all heads, no anchors, and
    with each chunk the counts of every channel as a table of 33 16-bit numbers, a stream of its own and its length."""
    layers, heads, tokens, dim = k.shape
    out, bits = [], 0.0
    for x, fine_layers in ((k, 10), (v, 2)):
        y = np.empty_like(x)
        for layer in range(layers):
            bins = 32 if layer < fine_layers or layers < 10 else 16
            merged = x[layer].swapaxes(0, 1).reshape(tokens, heads * dim)
            top = bf16(np.abs(merged).max(1, keepdims=True)) + 1e-9
            middle = bins // 2 - 1
            q = np.clip(np.round(merged * middle / top) + middle, 0, 2 * middle).astype(np.int64)
            y[layer] = ((q - middle) * top / middle).reshape(tokens, heads, dim).swapaxes(0, 1)
            for start in range(0, tokens, CHUNK):
                piece = q[start : start + CHUNK]
                counts = _counts(piece, 32)
                slots = np.round(counts / len(piece) * (65536 - 32)) + 1
                payload = np.ceil((-(counts * np.log2(slots / 65536)).sum(1) + 2) / 8)
                bits += 16 * len(piece) + heads * dim * 8 * (66 + 4) + 8 * payload.sum()
        out.append(y)
    return out[0], out[1], bits


def cachegen_paper(scale: float) -> Callable[[Array, Array], Result]:
    """CacheGen as the paper describes it: groups of ten tokens, the first an 8-bit anchor, the others as differences
    from it in bins of .5, 1 and 1.5 standard deviations by thirds of the layers (times ``scale``), ideal entropy coding
    by layer and channel with tables that cost nothing."""

    def code(k: Array, v: Array) -> Result:
        layers, heads, tokens, dim = k.shape
        out, bits = [], 0.0
        for x in (k, v):
            y = np.empty_like(x)
            for layer in range(layers):
                merged = x[layer].swapaxes(0, 1).reshape(tokens, heads * dim)
                for start in range(0, tokens, CHUNK):
                    piece = merged[start : start + CHUNK]
                    anchor_of = np.arange(len(piece)) // 10 * 10
                    step = np.abs(piece).max(0) / 127 + 1e-9
                    qa = np.round(piece[::10] / step).astype(np.int64)
                    anchors = (qa * step)[anchor_of // 10]
                    delta = piece - piece[anchor_of]
                    width = scale * (0.5, 1.0, 1.5)[3 * layer // layers] * (delta.std() + 1e-9)
                    rest = np.arange(len(piece)) % 10 != 0
                    qd = np.round((piece - anchors)[rest] / width).astype(np.int64)
                    found = anchors.copy()
                    found[rest] += qd * width
                    bits += _ideal_bits(qa) + _ideal_bits(qd)
                    y[layer, :, start : start + CHUNK] = found.reshape(-1, heads, dim).swapaxes(0, 1)
            out.append(y)
        return out[0], out[1], bits

    return code


BASELINES: dict[str, Callable[[Any, Any], Any]] = {
    "zstd -3": zstd,
    "int8": int8,
    "KIVI int4": kivi4,
    "TurboQuant 4 bit": turboquant4,
    "CacheGen (LMCache)": cachegen_lmcache,
    "CacheGen (paper)": cachegen_paper(1),
    "CacheGen (paper), bins x .5": cachegen_paper(0.5),
}
