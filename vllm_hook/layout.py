"""Paged KV of an engine as strided views in the canonical axes, and as address tables for the native copies.

Every adapter gives, for one layer, K ``[B, H, N, D]`` and V ``[B, H, N, Dv]``: views of the engine's own memory (never
copies) with B blocks of N tokens and H KV heads of this rank. How a backend lays them out was read from its source in
vLLM 0.32 and is proven on bits by tests/t5_hook_layout.py.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvfs.chunk import layout as part_layout
from kvfs.errors import Unsupported
from kvfs.identity import Manifest, PartId
from kvfs.vllm_hook.geometry import Geometry, Shard

__all__ = ["ADAPTERS", "PagedKV", "PagedLayer", "cpu_attention", "split_content"]

Views = tuple[torch.Tensor, torch.Tensor]

CPU_ISAS = ("vec", "vec16")
"""Kernels of CPU_ATTN whose packing is known; AMX, NEON and the others pack K in other ways."""


def cpu_attention(cache: torch.Tensor, head_dim: int, head_dim_v: int) -> Views:
    """CPU_ATTN on x86 without AMX: a (block, head) page is K as ``[D, N]``, then V as ``[N, D]``.

    ``cache`` is nominally ``[B, H, N, 2D]``, but its last axis does not separate K from V.
    """
    blocks, heads, tokens, content = cache.shape
    if head_dim != head_dim_v or content != 2 * head_dim:
        raise Unsupported(f"CPU_ATTN pages of {content} values a token for heads of {head_dim} + {head_dim_v}")
    if cache.stride()[1:] != (tokens * content, content, 1):
        raise Unsupported(f"CPU_ATTN pages that are not contiguous: strides {cache.stride()}")
    pages = cache.view(blocks, heads, 2, tokens * head_dim)
    k = pages[:, :, 0].view(blocks, heads, head_dim, tokens).transpose(2, 3)
    return k, pages[:, :, 1].view(blocks, heads, tokens, head_dim)


def split_content(cache: torch.Tensor, head_dim: int, head_dim_v: int) -> Views:
    """FLASH_ATTN and FLASHINFER: ``[B, H, N, D + Dv]`` in any physical order, K and V side by side in the last axis."""
    if cache.shape[3] != head_dim + head_dim_v:
        raise Unsupported(f"pages of {cache.shape[3]} values a token for heads of {head_dim} + {head_dim_v}")
    return cache[..., :head_dim], cache[..., head_dim:]


ADAPTERS: Mapping[str, Callable[[torch.Tensor, int, int], Views]] = {
    "CPU_ATTN": cpu_attention,
    "FLASH_ATTN": split_content,
    "FLASHINFER": split_content,
}


@dataclass(frozen=True)
class PagedLayer:
    """One layer: the block table it uses, and its K and V (see the module's head)."""

    group: int
    k: torch.Tensor
    v: torch.Tensor


class PagedKV:
    """The KV cache of one rank: ``caches`` are its tensors by layer name, ``blocks`` the size of the engine's pool.

    ``loads`` are the parts that lie in this rank, ``stores`` those it writes to the store. Raises Unsupported for a
    cache that is not laid out as its backend should, and if the heads of this rank are not whole head slices.
    """

    def __init__(self, geometry: Geometry, shard: Shard, caches: Mapping[str, torch.Tensor], blocks: int):
        self.geometry = geometry
        self.layers: dict[int, PagedLayer] = {}
        self._ratio = [1] * len(geometry.groups)
        kinds = {k.name: k for k in geometry.kinds}
        for name, (layer, group) in geometry.layers.items():
            cache, kind = caches[name], kinds[geometry.groups[group].kind]
            k, v = ADAPTERS[geometry.backend](cache, kind.head_dim, kind.head_dim_v)
            ratio, rest = divmod(cache.shape[0], blocks)
            if rest or ratio * cache.shape[2] != geometry.groups[group].block_size:
                raise Unsupported(f"{name}: {cache.shape[0]} blocks of {cache.shape[2]} tokens for a pool of {blocks}")
            self._ratio[group] = ratio
            self.layers[layer] = PagedLayer(group, k, v)
        self.device = k.device
        self._first: dict[str, int] = {}
        loads, stores = [], []
        for kind in geometry.kinds:
            heads, each = self.layers[kind.layers[0]].k.shape[1], kind.kv_heads // kind.head_slices
            first = shard.first_head(kind.kv_heads)
            if first % each or heads % each:
                raise Unsupported(
                    f"tensor parallelism {shard.size} with {kind.kv_heads} KV heads: it cuts through the "
                    f"{kind.head_slices} head slices they are stored in"
                )
            self._first[kind.name] = first
            mine = [PartId(kind.name, s) for s in range(first // each, (first + heads) // each)]
            loads += mine
            stores += mine if shard.stores(kind.kv_heads) else []
        self.loads, self.stores = tuple(loads), tuple(stores)
        self.ops = functools.lru_cache(maxsize=1024)(self._ops)

    def tables(self, block_ids: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
        """Block tables in the kernels' blocks, ``[groups, blocks]``, padded with the null block 0."""
        rows = []
        for ids, ratio in zip(block_ids, self._ratio, strict=True):
            row = np.asarray(ids, dtype=np.int64)
            if ratio > 1:
                row = np.where(row[:, None] == 0, 0, row[:, None] * ratio + np.arange(ratio)).reshape(-1)
            rows.append(row)
        out = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    def views(self, part: PartId) -> list[PagedLayer]:
        """The layers of a part, K and V narrowed to its heads, in the order of the part's tensors."""
        kind = next(k for k in self.geometry.kinds if k.name == part.kind)
        heads = kind.kv_heads // kind.head_slices
        at = part.slice * heads - self._first[part.kind]
        layers = [self.layers[i] for i in kind.layers]
        return [PagedLayer(x.group, x.k.narrow(1, at, heads), x.v.narrow(1, at, heads)) for x in layers]

    def _ops(self, manifest: Manifest, part: PartId, tokens: int, data_start: int = 0) -> npt.NDArray[np.int64]:
        """The native plan of one part: a row for each of its tensors (columns: `kvfs._native`).

        ``data_start`` is where the data begins in what is read or written: 0 for a buffer of data alone.
        """
        rows = []
        sides = [(x.group, view) for x in self.views(part) for view in (x.k, x.v)]
        for spec, (group, view) in zip(part_layout(manifest, part, tokens).tensors, sides, strict=True):
            heads, _, dim = spec.shape
            if (view.shape[1], view.shape[3]) != (heads, dim):
                raise Unsupported(f"{spec.name}: {tuple(view.shape)} in the engine, {spec.shape} in the store")
            size = view.element_size()
            paged = (view.data_ptr(), *(s * size for s in view.stride()), group, view.shape[2])
            rows.append((data_start + spec.start, heads, tokens, dim, size, *paged))
        ops = np.array(rows, dtype=np.int64)
        ops.flags.writeable = False
        return ops
