"""The native extension beside PyPI's xxhash and torch on one core (``python -m bench.native``).

The parts are those of a Gemma-3-270M text: 18 layers, 1 head, 256 tokens, 256 elements of 2 bytes, hot in the page
cache; the KV cache is laid out as vLLM's CPU backend does, in blocks of its default size and in small ones. Both are
larger than the processor's caches, as in real use. What is checksummed starts on a page, as parts do. What is compared
is measured in turns; the medians are printed.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from kvfs import _native

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, TOKENS, DIM, ITEMSIZE = 18, 256, 256, 2
BLOCKS = (128, 16)
TENSOR_BYTES = TOKENS * DIM * ITEMSIZE
PART_BYTES = 2 * LAYERS * TENSOR_BYTES
PARTS = 24
CHECKSUM_BYTES = 128 << 20
ROUNDS = 15
"""Measurements of each kind; the median counts."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Parts:
    """A file of parts, the KV cache they belong in, and both ways to copy between the two."""

    fd: int
    block: int  # tokens
    mapped: torch.Tensor  # [parts, layers, 2, tokens, dim]
    keys: torch.Tensor  # [layers, blocks, dim, block]: K as vLLM's CPU backend keeps it
    values: torch.Tensor  # [layers, blocks, block, dim]
    ops: list[Array]
    tables: list[Array]
    sums: list[bytes]
    out: torch.Tensor

    @classmethod
    def make(cls, fd: int, block: int) -> Parts:
        """Fill the file and number the blocks of ``block`` tokens at random, as a busy engine would."""
        rng = np.random.default_rng(0)
        for _ in range(PARTS):
            os.write(fd, rng.bytes(PART_BYTES))
        pages = mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE)
        mapped = torch.frombuffer(pages, dtype=torch.bfloat16).view(PARTS, LAYERS, 2, TOKENS, DIM)
        blocks = 1 + PARTS * TOKENS // block
        pages_of_layers = torch.zeros(LAYERS, blocks, 2, block * DIM, dtype=torch.bfloat16)
        keys = pages_of_layers[:, :, 0].view(LAYERS, blocks, DIM, block)
        values = pages_of_layers[:, :, 1].view(LAYERS, blocks, block, DIM)
        page_bytes = 2 * block * DIM * ITEMSIZE
        rows = []
        for layer in range(LAYERS):
            at = 2 * layer * TENSOR_BYTES
            to = [page_bytes, 0, ITEMSIZE, block * ITEMSIZE, 0, block]
            rows.append([at, 1, TOKENS, DIM, ITEMSIZE, keys[layer].data_ptr(), *to])
            to = [page_bytes, 0, DIM * ITEMSIZE, ITEMSIZE, 0, block]
            rows.append([at + TENSOR_BYTES, 1, TOKENS, DIM, ITEMSIZE, values[layer].data_ptr(), *to])
        moved = np.array([PART_BYTES] + [0] * 11)
        ops = [np.array(rows, np.int64) + i * moved for i in range(PARTS)]
        tables = list((1 + rng.permutation(blocks - 1)).reshape(PARTS, 1, -1))
        bounds = np.arange(0, PART_BYTES + 1, TENSOR_BYTES, dtype=np.int64)
        sums = [_native.sums(memoryview(pages)[a : a + PART_BYTES], bounds) for a in range(0, len(pages), PART_BYTES)]
        return cls(fd, block, mapped, keys, values, ops, tables, sums, torch.empty_like(mapped))

    def load(self, verify: bool) -> None:
        """Every part into its blocks by the native extension."""
        for ops, table, sums in zip(self.ops, self.tables, self.sums, strict=True):
            _native.load(self.fd, ops, table, 0, TOKENS, 0, sums if verify else None, _native.CancelToken())

    def gather(self) -> None:
        """Every part from its blocks by the native extension."""
        out = self.out.view(torch.uint8).numpy()
        for ops, table in zip(self.ops, self.tables, strict=True):
            _native.gather(ops, table, 0, TOKENS, 0, out)

    def torch_load(self) -> None:
        """Every part into its blocks by copies of tensors over the mapped file."""
        for part, table in zip(self.mapped, self.tables, strict=True):
            for layer, (k, v) in enumerate(part.unbind(0)):
                for block, rows in zip(table[0].tolist(), range(0, TOKENS, self.block), strict=True):
                    self.keys[layer, block].copy_(k[rows : rows + self.block].T)
                    self.values[layer, block].copy_(v[rows : rows + self.block])

    def torch_gather(self) -> None:
        """Every part from its blocks by copies of tensors."""
        for part, table in zip(self.out, self.tables, strict=True):
            for layer, (k, v) in enumerate(part.unbind(0)):
                for block, rows in zip(table[0].tolist(), range(0, TOKENS, self.block), strict=True):
                    k[rows : rows + self.block].copy_(self.keys[layer, block].T)
                    v[rows : rows + self.block].copy_(self.values[layer, block])

    def check(self) -> None:
        """What came back through the blocks must be what the file holds."""
        assert torch.equal(self.out.view(torch.int16), self.mapped.view(torch.int16))


def on(isa: str, work: Callable[[], object]) -> Callable[[], object]:
    """The work, done with one of the processor's instruction sets."""

    def chosen() -> object:
        _native.use_isa(isa)
        return work()

    return chosen


def compare(what: str, ours: Callable[[], object], peer: str, theirs: Callable[[], object], nbytes: int) -> None:
    """Print a row for each instruction set: GB/s of ours and of the peer, measured in turns."""
    cases = {isa: on(isa, ours) for isa in _native.ISAS} | {peer: theirs}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, work in cases.items():
            begun = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begun)
    rate = {name: nbytes / statistics.median(taken) / 1e9 for name, taken in seconds.items()}
    for isa in _native.ISAS:
        ratio = rate[isa] / rate[peer]
        print(f"| {what:30} | {isa:7} | {rate[isa]:6.2f} | {peer:6} | {rate[peer]:6.2f} | {ratio:5.2f} |")


def repeat(work: Callable[[mmap.mmap], object], data: mmap.mmap, total: int) -> Callable[[], object]:
    """The work on the same data until it has seen ``total`` bytes."""
    return lambda: [work(data) for _ in range(total // len(data))]


def main() -> None:
    """Measure and print one table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("| what                           | kernel  |   GB/s | peer   |   GB/s | ratio |")
    print("|--------------------------------|---------|-------:|--------|-------:|------:|")
    for size, where in ((TENSOR_BYTES, "in cache"), (CHECKSUM_BYTES, "from memory")):
        data = mmap.mmap(-1, size)
        data.write(np.random.default_rng(0).bytes(size))
        hashes = repeat(_native.xxh3_64, data, CHECKSUM_BYTES), repeat(xxhash.xxh3_64_intdigest, data, CHECKSUM_BYTES)
        compare(f"XXH3-64 {where}", hashes[0], "xxhash", hashes[1], CHECKSUM_BYTES)
    for block in BLOCKS:
        with tempfile.TemporaryFile() as file:
            parts, nbytes = Parts.make(file.fileno(), block), PARTS * PART_BYTES
            where = f"blocks of {block}"
            compare(f"load, {where}", partial(parts.load, verify=False), "torch", parts.torch_load, nbytes)
            compare(f"load, verified, {where}", partial(parts.load, verify=True), "torch", parts.torch_load, nbytes)
            compare(f"gather, {where}", parts.gather, "torch", parts.torch_gather, nbytes)
            parts.check()


if __name__ == "__main__":
    main()
