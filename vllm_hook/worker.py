"""The worker half of one rank: it holds the KV cache, loads into it and stores from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from kvfs.errors import Unsupported
from kvfs.vllm_hook.copying import Copy, DeviceCopy, HostCopy
from kvfs.vllm_hook.geometry import Geometry, Shard, check_engine, describe
from kvfs.vllm_hook.jobs import Load, StepJobs
from kvfs.vllm_hook.layout import CPU_ISAS, PagedKV
from kvfs.vllm_hook.loader import Loader
from kvfs.vllm_hook.saver import Saver
from kvfs.vllm_hook.settings import Settings
from kvfs.vllm_hook.stats import Counts

if TYPE_CHECKING:
    from kvfs.identity import Manifest

__all__ = ["Greeting", "WorkerHalf"]

LAST_WRITES = 5.0
"""Seconds an engine's end waits for what is on its way to the store."""
BRIEF = 0.02
"""Seconds that an idle step waits for loads. vLLM would ask again and again, by a thread that never sleeps: it takes
the interpreter from those that load, and may lose its core while it has it."""


@dataclass
class Greeting(KVConnectorHandshakeMetadata):
    """What a rank tells the scheduler half once, before the first request: its geometry, or why it cannot work."""

    geometry: Geometry | None
    refusal: str = ""


class WorkerHalf:
    """Built when the engine has allocated its KV cache. Raises Unsupported, naming what it has no exact way for."""

    loader_class, saver_class = Loader, Saver

    def __init__(
        self,
        settings: Settings,
        client: Any,
        counts: Counts,
        config: Any,
        kv_cache_config: Any,
        caches: Mapping[str, torch.Tensor],
    ) -> None:
        check_engine(config)
        layers = config.compilation_config.static_forward_context
        own = {name: cache for name, cache in caches.items() if not _shares(layers.get(name))}
        shard = Shard(_tensor_parallel_rank(), config.parallel_config.tensor_parallel_size)
        self.geometry = describe(
            kv_cache_config.kv_cache_groups,
            layers,
            shard,
            config.model_config.get_total_num_kv_heads(),
            config.cache_config.cache_dtype,
        )
        for name, (_, group) in self.geometry.layers.items():
            if self.geometry.backend == "CPU_ATTN":
                _check_isa(own[name], self.geometry.groups[group].block_size, config.cache_config.cache_dtype)
        self.kv = PagedKV(self.geometry, shard, own, kv_cache_config.num_blocks)
        self.copy: Copy = HostCopy(self.kv) if self.kv.device.type == "cpu" else DeviceCopy(self.kv)
        self.loader = self.loader_class(
            client, self.kv, self.copy, counts, settings.stall_deadline, settings.load_deadline
        )
        self.saver = self.saver_class(client, self.kv, self.copy, counts, settings.staging_bytes)
        self._manifests: dict[bytes, Manifest] = {}
        self._held: set[str] = set()
        self._idle = False

    def begin(self, jobs: StepJobs) -> None:
        """A step begins."""
        self._held |= jobs.held
        self._idle = jobs.idle
        for manifest in jobs.manifests:
            self._manifests[manifest.ns] = manifest

    def submit(self, load: Load) -> None:
        """Start a load, before the forward pass: vLLM's own time for it comes after that on a CPU."""
        self.loader.submit(load, self._manifests)

    def order(self) -> None:
        """Before a step writes to blocks: let earlier gathers go first."""
        self.copy.order()

    def end(self, jobs: StepJobs) -> None:
        """A step's KV is in its blocks, all of it for the last time: take what is to be stored."""
        for save in jobs.saves:
            self.saver.gather(save, self._manifests[save.ns])

    def results(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose blocks may go, requests whose loads have ended, and those of them that failed."""
        held, self._held = self._held, set()
        return held, *self.loader.take(BRIEF if self._idle and not held else 0.0)

    def close(self) -> None:
        """End the threads; what is gathered is still written, if the store takes it soon."""
        self.loader.close()
        self.saver.close(LAST_WRITES)


def _shares(module: Any) -> bool:
    """Whether an attention layer reads the KV of an earlier one and has none of its own."""
    return getattr(module, "kv_sharing_target_layer_name", None) is not None


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank  # noqa: PLC0415 - needs the engine's process groups

    return int(get_tensor_model_parallel_rank())


def _check_isa(cache: torch.Tensor, block_size: int, cache_dtype: str) -> None:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: PLC0415 - exists in CPU builds only

    isa = _get_attn_isa(cache.dtype, block_size, cache.shape[3] // 2, cache_dtype)
    if isa not in CPU_ISAS or cache.element_size() < 2:
        known = " and ".join(CPU_ISAS)
        raise Unsupported(f"CPU_ATTN with {isa} packing of {cache.dtype}; supported: {known}, not quantized")
