"""Hot parts into an engine's blocks on one core: kvfs' native load beside torch copies (``python -m bench.hook_copy``).

A load reads a part file that is in the page cache and fills blocks in the layout of vLLM's CPU attention (K transposed)
or of its GPU backends (K and V side by side). Torch does what connectors do today: it maps the file and copies block by
block (``copy_``), or all blocks at once by index (``index_put``). Figures are GB/s, medians of interleaved rounds.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvfs import _native
from kvfs.chunk import PartMeta, layout, open_part, write_part
from kvfs.device import scatter_rows
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.vllm_hook.copying import HostCopy, move_part
from kvfs.vllm_hook.geometry import Geometry, Group, Shard
from kvfs.vllm_hook.layout import PagedKV

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS, ROUNDS, CHUNK = 8, 15, 256
PART = PartId("full", 0)
SHAPES = {
    "Gemma-3-270M, block 128": (15, 1, 256, 128),
    "Llama-3.2-1B, block 128": (16, 8, 64, 128),
    "Llama-3.1-8B, block 16": (8, 8, 128, 16),
    "Llama-3.1-8B, block 128": (8, 8, 128, 128),
}
"""Layers, KV heads, head dimension, tokens in a block."""


@dataclass
class Case:
    """Part files of one head slice, and blocks to fill."""

    manifest: Manifest
    kv: PagedKV
    files: list[int]
    table: np.ndarray

    @classmethod
    def make(cls, backend: str, shape: tuple[int, int, int, int]) -> Case:
        layers, heads, dim, block = shape
        kind = GroupKind("full", tuple(range(layers)), heads, dim, dim)
        names = {f"l.{i}": (i, 0) for i in range(layers)}
        geometry = Geometry(backend, (kind,), "BF16", (Group("full", block),), names)
        manifest = Manifest(weights="bench", config={}, model_dtype="bfloat16", kv_dtype="BF16", kinds=(kind,))
        blocks = PARTS * CHUNK // block + 1
        caches = {name: torch.zeros(blocks, heads, block, 2 * dim, dtype=torch.bfloat16) for name in names}
        order = np.random.default_rng(0).permutation(np.arange(1, blocks, dtype=np.int64))
        payload = np.random.default_rng(1).bytes(layout(manifest, PART, CHUNK).nbytes)
        files = []
        for i in range(PARTS):
            fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)
            write_part(fd, manifest, PartMeta(manifest.ns, bytes(32), bytes(32), CHUNK, i * CHUNK, PART), payload)
            files.append(fd)
        return cls(manifest, PagedKV(geometry, Shard(0, 1), caches, blocks), files, order[None])

    @property
    def nbytes(self) -> int:
        return PARTS * layout(self.manifest, PART, CHUNK).nbytes

    def native(self, verify: bool) -> None:
        copy, token = HostCopy(self.kv), _native.CancelToken()
        for fd in self.files:
            with open_part(os.dup(fd), self.manifest, bytes(32), PART) as file:
                sums = file.header.sums if verify else None
                copy.load(file, self.manifest, self.table, 0, CHUNK, sums, token)

    def mapped(self) -> list[torch.Tensor]:
        out = []
        for fd in self.files:
            start = os.fstat(fd).st_size - self.nbytes // PARTS
            populated = mmap.mmap(fd, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # read-only memory: nothing writes to it
                out.append(torch.frombuffer(populated, dtype=torch.uint8)[start:])
        return out

    def by_block(self) -> None:
        tensors = layout(self.manifest, PART, CHUNK).tensors
        for i, data in enumerate(self.mapped()):
            views = (view for layer in self.kv.views(PART) for view in (layer.k, layer.v))
            for view, spec in zip(views, tensors, strict=True):
                rows = data[spec.start : spec.start + spec.nbytes].view(view.dtype).view(spec.shape)
                block = view.shape[2]
                for at in range(0, CHUNK, block):
                    view[self.table[0, (i * CHUNK + at) // block]].copy_(rows[:, at : at + block])

    def by_index(self) -> None:
        for i, data in enumerate(self.mapped()):
            move_part(self.kv, self.manifest, PART, CHUNK, i * CHUNK, self.table, 0, CHUNK, data, scatter_rows)

    def close(self) -> None:
        for fd in self.files:
            os.close(fd)


def speeds(case: Case) -> dict[str, float]:
    """GB/s of each way."""
    ways: dict[str, Callable[[], None]] = {
        "kvfs": lambda: case.native(verify=False),
        "kvfs, verified": lambda: case.native(verify=True),
        "torch copy_": case.by_block,
        "torch index_put": case.by_index,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    return {name: case.nbytes / statistics.median(t) / 1e9 for name, t in times.items()}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(f"native kernels: {_native.isa()}, load average {os.getloadavg()[0]:.1f}")
    for backend in ("CPU_ATTN", "FLASH_ATTN"):
        for name, shape in SHAPES.items():
            case = Case.make(backend, shape)
            row = speeds(case)
            case.close()
            print(f"{backend:10} {name:24} " + "  ".join(f"{way} {speed:5.1f}" for way, speed in row.items()))


if __name__ == "__main__":
    main()
