"""What an engine's layers are, in kvfs' terms: group kinds by layer, and which block table each layer uses.

The kinds are the model's, taken from its attention modules: an engine may split equal layers over several groups
(vLLM gives Gemma-3 five sliding groups of three layers), and that must not change what is stored. Whatever has no exact
rule here is refused by name; the hook then stays off and the engine runs on without it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvfs.errors import Unsupported
from kvfs.identity import GroupKind

__all__ = ["BACKENDS", "Geometry", "Group", "Shard", "check_engine", "describe"]

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER")
"""vLLM's attention backends whose cache layout `kvfs.vllm_hook.layout` knows."""

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_FP8 = {"fp8": "F8_E4M3", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """One block table of the engine: the kind of its layers, and tokens in a block of the scheduler."""

    kind: str
    block_size: int


@dataclass(frozen=True)
class Geometry:
    """The whole model's group kinds, and the engine's groups in the order of its block tables.

    ``layers`` maps a layer's name in the engine to its index in the model and its group.
    """

    backend: str
    kinds: tuple[GroupKind, ...]
    kv_dtype: str
    groups: tuple[Group, ...]
    layers: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Shard:
    """A tensor-parallel rank's place. Where ranks outnumber KV heads, neighbours hold copies of one head."""

    rank: int
    size: int

    def first_head(self, kv_heads: int) -> int:
        """Which of the model's KV heads is the first of this rank."""
        return self.rank * kv_heads // self.size

    def stores(self, kv_heads: int) -> bool:
        """Whether this rank is the lowest of those that hold its heads."""
        return self.rank % max(1, self.size // kv_heads) == 0


def check_engine(config: Any) -> None:
    """Refuse by name the kinds of engine that the hook cannot serve. ``config`` is a VllmConfig."""
    parallel, model = config.parallel_config, config.model_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "an encoder-decoder model": bool(model.is_encoder_decoder),
        "calculate_kv_scales (scales that depend on the first request)": bool(
            getattr(config.cache_config, "calculate_kv_scales", False)
        ),
    }
    for name, present in refused.items():
        if present:
            raise Unsupported(name)


def describe(groups: Any, layers: Mapping[str, Any], shard: Shard, kv_heads: int, cache_dtype: str) -> Geometry:
    """Describe an engine from its ``kv_cache_groups`` and its attention modules by layer name.

    ``kv_heads`` is the whole model's. Raises Unsupported naming the first thing that has no exact rule.
    """
    kinds: dict[str, dict[int, tuple[int, int, int]]] = {}
    index: dict[str, tuple[int, int]] = {}
    found, dtypes, backends = [], set(), set()
    for number, group in enumerate(groups):
        if getattr(group, "is_eagle_group", False):
            raise Unsupported("speculative decoding with a draft model's own KV cache")
        names = set()
        for name in group.layer_names:
            spec, module = _spec_of(group.kv_cache_spec, name), layers.get(name)
            if module is None:
                raise Unsupported(f"layer {name}: it is not an attention layer")
            kind = _kind(name, spec, module)
            backends.add(module.attn_backend.get_name())
            heads = _total_heads(name, spec.num_kv_heads, shard, kv_heads)
            layer = _layer_index(name)
            if any(layer in members for members in kinds.values()):
                raise Unsupported(f"two KV caches in layer {layer} ({name})")
            kinds.setdefault(kind, {})[layer] = (heads, spec.head_size, spec.head_size_v)
            index[name] = (layer, number)
            dtypes.add(_dtype(spec.dtype, cache_dtype))
            names.add(kind)
        if len(names) != 1:
            raise Unsupported(f"group {number} mixes {', '.join(sorted(names))} (is the hybrid KV cache manager off?)")
        found.append(Group(names.pop(), group.kv_cache_spec.block_size))
    if len(dtypes) != 1 or len(backends) != 1:
        raise Unsupported(f"layers with different KV dtypes or backends ({', '.join(sorted(dtypes | backends))})")
    merged = tuple(_merge(name, members) for name, members in sorted(kinds.items()))
    return Geometry(backends.pop(), merged, dtypes.pop(), tuple(found), index)


def _spec_of(spec: Any, name: str) -> Any:
    per_layer = getattr(spec, "kv_cache_specs", None)
    return spec if per_layer is None else per_layer[name]


def _kind(name: str, spec: Any, module: Any) -> str:
    """Name a layer's kind, after checking that its group keeps just the tokens its attention sees."""
    backend = module.attn_backend.get_name()
    if backend not in BACKENDS:
        raise Unsupported(f"attention backend {backend} (layer {name}); supported: {', '.join(BACKENDS)}")
    rule = type(spec).__name__
    if rule not in {"FullAttentionSpec", "SlidingWindowSpec"}:
        raise Unsupported(f"{rule} (layer {name})")
    if getattr(spec, "attention_chunk_size", None) or getattr(spec, "non_causal", False):
        raise Unsupported(f"attention in chunks, or in both directions (layer {name})")
    if getattr(spec, "state_content_bytes", None) is not None or getattr(spec, "num_head_slots", None) is not None:
        raise Unsupported(f"a packed KV cache (layer {name})")
    window = module.sliding_window
    if rule == "FullAttentionSpec":
        if window is not None:
            raise Unsupported(f"sliding layer {name} kept in full; leave the hybrid KV cache manager on")
        return "full"
    if window != spec.sliding_window or getattr(spec, "extra_retained_tokens", 0):
        raise Unsupported(f"layer {name}: a window of {window} kept as {spec.sliding_window}")
    return f"swa{window}"


def _total_heads(name: str, local: int, shard: Shard, kv_heads: int) -> int:
    if shard.size == 1:
        return local
    if local != max(1, kv_heads // shard.size):
        raise Unsupported(f"layer {name}: {local} KV heads on one of {shard.size} ranks, the model has {kv_heads}")
    return kv_heads


def _layer_index(name: str) -> int:
    numbers = _INDEX.findall(name)
    if len(numbers) != 1:
        raise Unsupported(f"layer {name}: its place in the model cannot be told from its name")
    return int(numbers[0])


def _dtype(dtype: torch.dtype, cache_dtype: str) -> str:
    found = _DTYPES.get(dtype) or _FP8.get(cache_dtype)
    if found is None:
        raise Unsupported(f"KV cache dtype {cache_dtype} ({dtype})")
    return found


def _merge(kind: str, members: Mapping[int, tuple[int, int, int]]) -> GroupKind:
    shapes = set(members.values())
    if len(shapes) != 1:
        raise Unsupported(f"{kind} layers of different shapes (heads, head_dim, head_dim_v): {sorted(shapes)}")
    return GroupKind(kind, tuple(sorted(members)), *shapes.pop())
