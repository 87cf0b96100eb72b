"""Decoding on a GPU: coded streams in device memory straight into paged KV, a warp a stream, RoPE put back on the way.

The kernel (decode.cu, warp.h) is compiled by NVRTC at first use, through cupy, for the GPU at hand.  Its bytes are
those of the CPU's decoders.  Needs cupy; nothing else of kvfs imports this module.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfs.codec.shape import DTYPES, Shape
from kvfs.codec.tables import FIRST_LOSSLESS, LUT
from kvfs.errors import ChunkCorrupt

__all__ = ["TASK", "decode", "kernel_options", "kernel_source", "shape_struct", "warp_tables"]

_HERE = Path(__file__).parent
_NATIVE = _HERE.parent / "_native"
_REASONS = ("", "truncated", "parameters", "exceptions", "words", "states")
_LANES = 32

TASK = np.dtype([
    ("stream", "u8"), ("size", "u8"), ("turns", "u8"), ("out", "u8", 2), ("block", "i8", 2), ("token", "i8", 2),
    ("table", "u8"), ("block_size", "i4"), ("position", "i4"), ("first", "i4"), ("last", "i4"),
])  # fmt: skip
"""One stream to decode.  Device addresses: of the coded stream (at a multiple of 4), of its turns (what
`_native.codec_rotation` gives; 0: not turned), of token 0 of block 0 of each section, and of the block table (int64).
Bytes from a block and from a token to the next.  Rows ``first`` to ``last`` of the part are written; row r is token
``position + r`` of the block table.  Rows in block 0 are left out."""


def kernel_source() -> str:
    """The text of the kernel, which includes `warp.h` and `codec.h`."""
    return (_HERE / "decode.cu").read_text("utf-8")


def kernel_options() -> tuple[str, ...]:
    """What NVRTC needs to compile it."""
    return ("--std=c++17", "--fmad=false", f"-I{_HERE}", f"-I{_NATIVE}")


def shape_struct(shape: Shape) -> npt.NDArray[np.int32]:
    """CodecShape of codec.h."""
    numbers = [
        shape.lossless,
        *DTYPES[shape.dtype],
        shape.tokens,
        shape.raw_tokens,
        len(shape.sections),
        shape.channels,
    ]
    for s in shape.sections:
        numbers += [s.kind, s.channels, s.pitch, s.rope_first, s.rope_pairs, s.style]
    return np.array(numbers + [0] * (20 - len(numbers)), dtype=np.int32)


def warp_tables(lossless: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """The tables as warps use them: symbol + 128 by table and slot; frequency << 12 | first slot by table and that."""
    lut = LUT[FIRST_LOSSLESS:] if lossless else LUT[:FIRST_LOSSLESS]
    symbols = ((lut.view(np.int32) >> 24) + 128).astype(np.uint8)
    frequencies = np.zeros((len(lut), 256), np.uint32)
    slots = np.broadcast_to(np.arange(lut.shape[1], dtype=np.uint32), lut.shape)
    first = slots - (lut & 0xFFF)
    np.put_along_axis(frequencies, symbols.astype(np.int64), (lut & 0xFFF000) | first, axis=1)
    return symbols, frequencies


@functools.cache
def _kernel(device: int) -> Any:  # noqa: ARG001 - cupy compiles for the current device
    import cupy  # noqa: PLC0415

    return cupy.RawModule(code=kernel_source(), options=kernel_options()).get_function("kvfs_decode")


@functools.cache
def _device_tables(device: int, lossless: bool) -> tuple[Any, Any]:  # noqa: ARG001
    import cupy  # noqa: PLC0415

    symbols, frequencies = warp_tables(lossless)
    return cupy.asarray(symbols), cupy.asarray(frequencies)


def decode(shape: Shape, tasks: npt.NDArray[Any]) -> None:
    """Decode ``tasks`` (TASK) on the current device and stream, and wait for them.

    Raises ChunkCorrupt ``stream`` for the first damaged one; others, and rows before the damage, have been written.
    """
    import cupy  # noqa: PLC0415

    device = cupy.cuda.Device()
    kernel, (symbols, frequencies) = _kernel(device.id), _device_tables(device.id, shape.lossless)
    tables = symbols.nbytes + frequencies.nbytes
    room = device.attributes["MaxSharedMemoryPerBlockOptin"] - 1024
    warps = max(1, min(8, (room - tables) // (4 * shape.channels)))
    shared = tables + warps * 4 * shape.channels
    kernel.max_dynamic_shared_size_bytes = shared
    blocks = min(-(-len(tasks) // warps), 2 * device.attributes["MultiProcessorCount"])
    errors = cupy.zeros(len(tasks), cupy.int32)
    arguments = (
        cupy.asarray(shape_struct(shape)), cupy.asarray(np.ascontiguousarray(tasks).view(np.uint8)),
        np.int32(len(tasks)), symbols, frequencies, np.int32(len(symbols)), errors,
    )  # fmt: skip
    kernel((blocks,), (warps * _LANES,), arguments, shared_mem=shared)
    found = cupy.asnumpy(errors)
    if found.any():
        bad = int(np.flatnonzero(found)[0])
        raise ChunkCorrupt(f"task {bad}", "stream", _REASONS[found[bad]])
