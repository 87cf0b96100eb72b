"""Paged KV caches in the layouts engines use, and parts to move in and out of them, modelled with numpy indexing."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kvfs import _native

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS = 9
LAYOUTS = ("heads-tokens", "tokens-heads", "interleaved", "transposed", "transposed-odd", "scattered")
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Array = np.ndarray[Any, np.dtype[Any]]


def every_isa() -> Iterator[str]:
    """Put each instruction set of this CPU in use, one after the other."""
    best = _native.isa()
    try:
        for name in _native.ISAS:
            _native.use_isa(name)
            yield name
    finally:
        _native.use_isa(best)


def scatter(
    data: Any, ops: Array, tables: Array, first: int, last: int, position: int, token: _native.CancelToken
) -> int:
    """`_native.load` of a part that is in memory."""
    fd = os.memfd_create("kvfs-part")
    try:
        os.write(fd, data)
        return _native.load(fd, ops, tables, first, last, position, None, token)
    finally:
        os.close(fd)


@dataclass
class Cache:
    """A paged KV cache in one of the layouts engines use: `view` is [blocks, heads, block_size, dim] over `memory`."""

    memory: Array
    view: Array

    @classmethod
    def make(cls, layout: str, heads: int, block: int, dim: int, itemsize: int, misalign: int = 0) -> Cache:
        shape, axes = {
            "heads-tokens": ((BLOCKS, heads, block, dim), (0, 1, 2, 3)),
            "tokens-heads": ((BLOCKS, block, heads, dim), (0, 2, 1, 3)),
            "interleaved": ((BLOCKS, heads, block, 2 * dim), (0, 1, 2, 3)),  # K, then V of each token
            "transposed": ((BLOCKS, heads, dim, block), (0, 1, 3, 2)),  # K of vLLM's CPU backend
            "transposed-odd": ((BLOCKS, heads, dim, block + 3), (0, 1, 3, 2)),
            "scattered": ((BLOCKS, heads, block, dim, 3), (0, 1, 2, 3, 4)),
        }[layout]
        size = int(np.prod(shape)) * itemsize
        memory = np.frombuffer(np.random.default_rng(1).bytes(size + 128), np.uint8).copy()
        start = -memory.ctypes.data % 64 + misalign * itemsize
        view = memory[start : start + size].view(UINT[itemsize]).reshape(shape).transpose(axes)
        return cls(memory, view[..., 0] if layout == "scattered" else view[:, :, :block, :dim])

    def op(self, file_off: int, tokens: int, table: int = 0) -> list[int]:
        _, heads, block, dim = self.view.shape
        address = self.view.__array_interface__["data"][0]
        return [file_off, heads, tokens, dim, self.view.itemsize, address, *self.view.strides, table, block]


@dataclass
class Case:
    """A part of two tensors, caches for them, and the block table of a text."""

    caches: list[Cache]
    tensors: list[Array]
    ops: Array
    tables: Array
    position: int

    @classmethod
    def make(cls, layout: str, itemsize: int, seed: int, tokens: int = 0) -> Case:
        rng = np.random.default_rng(seed)
        heads, block, dim = int(rng.integers(1, 4)), int(rng.choice([1, 16, 40, 128])), int(rng.choice([1, 8, 36, 64]))
        tokens = tokens or int(rng.integers(1, min(4 * block, 200) + 1))
        position = int(rng.integers(0, 3 * block))
        caches = [Cache.make(layout, heads, block, dim, itemsize, misalign=int(rng.integers(0, 3))) for _ in range(2)]
        tensors = [np.frombuffer(rng.bytes(heads * tokens * dim * itemsize), UINT[itemsize]) for _ in range(2)]
        width = -(-(position + tokens) // block)
        tables = np.stack([rng.permutation(np.arange(1, BLOCKS)).repeat(-(-width // 8))[:width] for _ in range(2)])
        ops = [c.op(64 + i * tensors[0].nbytes, tokens, i) for i, c in enumerate(caches)]
        return cls(caches, [t.reshape(heads, tokens, dim) for t in tensors], np.array(ops, np.int64), tables, position)

    @property
    def tokens(self) -> int:
        return int(self.tensors[0].shape[1])

    @property
    def payload(self) -> bytes:
        return bytes(64) + b"".join(t.tobytes() for t in self.tensors)

    @property
    def sums(self) -> bytes:
        digests = [xxhash.xxh3_64_intdigest(head.tobytes()) for t in self.tensors for head in t]
        return np.array(digests, "<u8").tobytes()

    @contextmanager
    def file(self, path: Path) -> Iterator[int]:
        path.write_bytes(self.payload)
        fd = os.open(path, os.O_RDONLY)
        yield fd
        os.close(fd)

    def expect(self, first: int, last: int) -> list[Array]:
        """The caches' memory after rows first..last were written, row by row."""
        images = []
        for cache, tensor, table in zip(self.caches, self.tensors, self.tables, strict=True):
            before = cache.memory.copy()
            for r in range(first, last):
                block, offset = divmod(self.position + r, cache.view.shape[2])
                if table[block]:
                    cache.view[table[block], :, offset, :] = tensor[:, r, :]
            images.append(cache.memory.copy())
            cache.memory[:] = before
        return images

    def gathered(self, first: int, last: int, filler: int) -> Array:
        """The payload with only rows first..last of each tensor, and filler around them."""
        out = np.full(len(self.payload), filler, np.uint8)
        for tensor, op in zip(self.tensors, self.ops, strict=True):
            rows = out[op[0] : op[0] + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)
            rows[:, first:last] = tensor[:, first:last]
        return out

    def images(self) -> list[Array]:
        return [c.memory.copy() for c in self.caches]

    def restore(self, images: list[Array]) -> None:
        for cache, image in zip(self.caches, images, strict=True):
            cache.memory[:] = image

    def assert_images(self, images: list[Array]) -> None:
        for cache, image in zip(self.caches, images, strict=True):
            np.testing.assert_array_equal(cache.memory, image)
