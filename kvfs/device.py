"""KV in a device's memory: where the rows of a part lie in paged views, and copies of them by index.

The functions are the same for CPU and CUDA tensors; the CPU has a faster way in `kvfs._native`. Views are
``[B, H, N, D]``: blocks, KV heads, tokens in a block, head dimension, with any strides.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DTYPES", "Rows", "from_bytes", "gather_rows", "pinned", "place", "rows_of", "scatter_rows", "to_bytes"]

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""torch's names of the dtypes a part may have."""


class Rows(NamedTuple):
    """Rows of a part and where they lie: row ``rows[i]`` is in block ``blocks[i]`` at ``offsets[i]`` (int64, equal
    lengths, on the device of the views)."""

    rows: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor


def rows_of(
    table: npt.NDArray[np.int64], block_size: int, position: int, first: int, last: int, device: torch.device
) -> Rows:
    """The rows [first, last) of a part whose row 0 is token ``position``, but for those in the null block 0.

    ``table`` is the request's block table, in blocks of ``block_size`` tokens.
    """
    rows = np.arange(first, last, dtype=np.int64)
    blocks = table[(position + rows) // block_size]
    kept = blocks != 0
    host = np.stack((rows[kept], blocks[kept], (position + rows[kept]) % block_size))
    return Rows(*torch.from_numpy(host).to(device, non_blocking=True))


def scatter_rows(view: torch.Tensor, src: torch.Tensor, rows: Rows) -> None:
    """Copy ``src`` ``[H, tokens, D]`` into a paged view; other rows of the view stay as they are."""
    view[rows.blocks, :, rows.offsets] = src.index_select(1, rows.rows).transpose(0, 1)


def gather_rows(view: torch.Tensor, out: torch.Tensor, rows: Rows) -> None:
    """Copy rows of a paged view into ``out`` ``[H, tokens, D]``."""
    out.index_copy_(1, rows.rows, view[rows.blocks, :, rows.offsets].transpose(0, 1))


def pinned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Page-locked host memory, from which a GPU copies asynchronously."""
    array: npt.NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return array


def to_bytes(tensors: Sequence[torch.Tensor]) -> bytearray:
    """The contents of tensors, contiguous, one after the other: the data region of a part."""
    out = bytearray(sum(t.numel() * t.element_size() for t in tensors))
    at = 0
    for t in tensors:
        size = t.numel() * t.element_size()
        torch.frombuffer(out, dtype=torch.uint8, count=size, offset=at).copy_(t.contiguous().view(-1).view(torch.uint8))
        at += size
    return out


def from_bytes(data: "Buffer", dtype: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    """A tensor of a part's data region, sharing its (writable) memory."""
    count = int(np.prod(shape))
    return torch.frombuffer(data, dtype=DTYPES[dtype], count=count, offset=offset).view(shape)


def place(shape: tuple[int, ...], dtype: str, pieces: Sequence[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    """A tensor ``[heads, tokens, dim]`` of zeros with ``pieces`` ``(first head, first token, tensor)`` in it."""
    out = torch.zeros(shape, dtype=DTYPES[dtype])
    for head, token, t in pieces:
        out[head : head + t.shape[0], token : token + t.shape[1]] = t
    return out
