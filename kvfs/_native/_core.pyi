"""The native extension. Every function releases the GIL while it works; wrong arguments raise, never crash
(but addresses in `ops` are believed: they must be memory of the caller's that outlives the call).

A transfer moves rows of the tensors of one part between its file (or a buffer laid out like it) and paged KV.

`ops` is a C-contiguous int64 array [n_ops, 12]; a row is one tensor `[heads, tokens, dim]`, contiguous in the file:

    0 file_off      byte offset of the tensor           6 stride_block   bytes from a block to the next
    1 heads                                             7 stride_head    ... from a head to the next
    2 tokens        rows a head of the tensor has       8 stride_token   ... from a token to the next
    3 dim                                               9 stride_dim     ... from an element to the next
    4 itemsize      1, 2, 4 or 8                       10 table          row of `tables`
    5 dst           address of block 0, head 0,        11 block_size     tokens a block holds
                    token 0, element 0

`tables` is a C-contiguous int64 array [n_tables, width] of block ids; 0 is the null block, which holds nothing.
Rows `first..last` (half open) of every tensor move; row r is token `position + r` of the text: it lies in block
`tables[table][(position + r) // block_size]` at offset `(position + r) % block_size`.

All of them raise ValueError for arrays or values that make no sense, and IndexError if a row's block index is outside
its table, before anything is written.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, final

import numpy as np
from typing_extensions import Buffer

# Before Python 3.12, type checkers do not know that an array is a buffer.
Bytes: TypeAlias = Buffer | np.ndarray[Any, Any]
Integers: TypeAlias = Buffer | np.ndarray[Any, np.dtype[np.int64 | np.uint64]]

ISAS: tuple[str, ...]
"""Instruction sets this CPU can run the kernels with, the best one last: of generic, neon, avx2, avx512."""

def isa() -> str:
    """The instruction set in use: the best of ISAS unless use_isa() chose another."""

def use_isa(name: str, /) -> None:
    """Use another of ISAS in this process; for tests and benchmarks. ValueError if this CPU lacks it."""

def xxh3_64(data: Bytes, /) -> int:
    """XXH3-64 of the data: seed 0, default secret, as the public specification of xxHash has it."""

def sums(data: Bytes, bounds: Integers) -> bytes:
    """XXH3-64 of each piece `data[bounds[i]:bounds[i + 1]]` as little-endian u64.

    bounds: n + 1 byte offsets (int64 or uint64), not decreasing. ValueError if they are or leave the data.
    """

def populate(data: Bytes, /) -> None:
    """Fault in all pages of a map for reading (MADV_POPULATE_READ, Linux 5.14), so that a later read cannot raise
    SIGBUS. OSError otherwise: EFAULT if the file is now shorter than its map, EINVAL on older kernels."""

@final
class CancelToken:
    """Stands between a load and memory that its owner may take back at any time.

    Every scatter enters the token and leaves it; several threads may be inside at once. Once cancel() has returned,
    nobody is inside and nobody can enter: the memory is its owner's again.
    """

    def __init__(self) -> None: ...
    @property
    def cancelled(self) -> bool:
        """Whether cancel() was called."""
    @property
    def progress(self) -> int:
        """Bytes landed so far; may be read at any time."""
    def cancel(self) -> None:
        """Let no scatter enter any more, and return when none is inside. Deadlocks if the caller is inside itself."""
    def acquire(self) -> bool:
        """Enter a scatter done outside this module. False if cancelled: then write nothing, and do not release()."""
    def release(self) -> None:
        """Leave a scatter entered by acquire(), on any thread. RuntimeError if there is none."""
    def add_progress(self, nbytes: int, /) -> None:
        """Add bytes that have landed. ValueError if negative."""

def load(
    fd: int,
    ops: Integers,
    tables: Integers,
    first: int,
    last: int,
    position: int,
    sums: Bytes | None,
    token: CancelToken,
) -> int:
    """Read rows of a part file into paged KV; returns the bytes written.

    Works in pieces of at most 4 MiB: pread into a buffer of this thread, then scatter inside the token; so a read that
    hangs holds nothing that cancel() waits for, and never writes into the caller's memory. Null blocks are skipped.

    sums: one u64 for every (op, head) in order, or None. If given, each head is read whole and verified before any of
    its rows is written, and before any row of its tensor is if the tensor is at most 4 MiB;
    `ValueError("checksum", op, head)` names the first bad one.
    Raises OSError as pread does (EIO if the file ends early), and InterruptedError once the token is cancelled.
    Whatever it raises, token.progress says how many bytes have been written.
    """

def gather(ops: Integers, tables: Integers, first: int, last: int, position: int, out: Bytes) -> int:
    """The reverse of load(): rows of paged KV into `out`, laid out as the file is. Returns the bytes written.

    Rows outside first..last of `out` stay as they are. Raises ValueError if a tensor ends beyond `out` or a row lies
    in the null block, which holds no KV.
    """

# --- the codec: docs/codec-format.md; kvfs.codec is the way to use it ---

def codec_rotation(inv_freq: Bytes, position: int, tokens: int, /) -> bytearray:
    """Cosines and sines by which RoPE turns tokens, float32 `[tokens, 2, pairs]`; the same bits on every host.

    inv_freq: float32 `[pairs]`, radians a token. ValueError unless 0 <= position < 2**32 and 0 < tokens <= 4096.
    """

def codec_encode(
    shape: Integers, steps: tuple[int, int], turns: Bytes | None, data: Bytes, places: Integers, /
) -> list[bytes] | None:
    """Streams of KV, or None if one cannot be coded with loss (values not finite, or too far apart).

    shape: `kvfs.codec.shape.Shape.array()`. steps: 256 log2 of the steps of sections by channel and by token, relative
    to the standard deviation. turns: what codec_rotation() gave, or None. places: int64 `[streams, 1 + sections]`:
    whether RoPE turns the stream, and the offset in `data` where each section starts.
    Raises ValueError for what does not fit together.
    """

def codec_decode(
    shape: Integers, turns: Bytes | None, coded: Bytes, data: Bytes, streams: Integers, /
) -> tuple[int, str] | None:
    """The reverse, into `data`. streams: int64 `[streams, 3 + sections]`: the offset in `coded` and the size of each,
    and its places.

    Returns None, or the index of the first damaged stream and what is wrong with it: truncated, parameters, exceptions,
    words or states. Whatever `coded` holds, nothing outside it is read and nothing outside the streams' places written.
    """

CodedArguments: TypeAlias = tuple[int, int, Integers, Bytes, Integers, Bytes | None, Integers, Integers, int, int, int]
"""A coded part file for load_coded(): fd, start, bounds, sums, shape, turns, streams, ops, first, last, position.

start: where the streams begin in the file. bounds: layers + 1 offsets from there. sums: one u64 for the streams of each
layer. shape, turns, streams: as codec_decode() has them, in the order of layers and heads, the streams relative to
start and their places to the data of the raw form. ops: the tensors of each layer, file_off relative to that data too.
"""

def load_coded(parts: Sequence[CodedArguments], tables: Integers, token: CancelToken) -> int:
    """As load(), from coded part files, one after the other: layer by layer, so that the first is in its blocks before
    the last is read. The streams of a layer are verified before any of them is decoded.

    Raises `ValueError("checksum", layer, 0, part)` or `ValueError("stream", layer, head, part, reason)` for the first
    that is bad, `part` counted in `parts`; else as load(). What comes before it has been written.
    """
