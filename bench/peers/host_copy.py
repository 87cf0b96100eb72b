"""Lets vLLM's first-party tiering offload run on the CPU platform, to be measured beside kvfs without a GPU.

vLLM refuses it there, because its worker copies with CUDA streams. This specification keeps everything else of it (the
managers, the shared primary tier, the ``fs`` tier with its files) and replaces that copy by ``memcpy``. Named in
``kv_connector_extra_config`` as ``spec_name`` and ``spec_module_path``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.kv_offload.base import BlockIDsLoadStoreSpec, CanonicalKVCaches, GPULoadStoreSpec


class HostCopyWorker(OffloadingWorker):
    """Copies whole pages between the engine's blocks and the primary tier, at once and in the calling thread."""

    def __init__(self, caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self.region = region
        self.blocks_per_chunk = blocks_per_chunk
        self.references = caches.group_data_refs
        self.engine_pages = [c.tensor.view(torch.int8).view(-1, c.page_size_bytes) for c in caches.tensors]
        self.tier_pages = [
            region.create_next_worker_view(c.page_size_bytes * blocks_per_chunk).unflatten(1, (blocks_per_chunk, -1))
            for c in caches.tensors
        ]
        self.finished: list[TransferResult] = []

    def pairs(
        self, engine: GPULoadStoreSpec, tier: BlockIDsLoadStoreSpec
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (page of the engine, page of the tier) for each layer reference of each block of a transfer.

        The first block of a group may lie in the middle of its chunk.
        """
        first_block = first_chunk = 0
        for group, (count, index) in enumerate(zip(engine.group_sizes, engine.block_indices, strict=True)):
            skip = index % self.blocks_per_chunk if count else 0
            for i in range(count):
                chunk, within = divmod(skip + i, self.blocks_per_chunk)
                for reference in self.references[group]:
                    page = self.engine_pages[reference.tensor_idx][engine.block_ids[first_block + i]]
                    slot = self.tier_pages[reference.tensor_idx][tier.block_ids[first_chunk + chunk], within]
                    yield page, slot
            first_block += count
            first_chunk += -(-(skip + count) // self.blocks_per_chunk) if count else 0

    def finish(self, job_id: int, start: float, nbytes: int) -> bool:
        """Note a transfer as done."""
        self.finished.append(TransferResult(job_id, True, nbytes, time.perf_counter() - start))
        return True

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec) -> bool:
        start = time.perf_counter()
        return self.finish(job_id, start, sum(slot.copy_(page).nbytes for page, slot in self.pairs(src_spec, dst_spec)))

    def submit_load(self, job_id: int, src_spec: BlockIDsLoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        start = time.perf_counter()
        return self.finish(job_id, start, sum(page.copy_(slot).nbytes for page, slot in self.pairs(dst_spec, src_spec)))

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Return at once: a submitted transfer is done."""

    def shutdown(self) -> None:
        self.region.cleanup()


class HostCopySpec(TieringOffloadingSpec):
    """vLLM's ``TieringOffloadingSpec`` with the worker above."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> HostCopyWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = HostCopyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
