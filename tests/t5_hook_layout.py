"""Adapters against what vLLM's own kernels and views do, bit for bit; native copies against copies by index."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, compute_layout_strides, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvfs import _native
from kvfs.chunk import layout
from kvfs.device import gather_rows, rows_of, scatter_rows
from kvfs.errors import Unsupported
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.vllm_hook.copying import HostCopy, move_part
from kvfs.vllm_hook.geometry import Geometry, Group, Shard
from kvfs.vllm_hook.layout import CPU_ISAS, PagedKV, cpu_attention, split_content
from tests.paged import scatter

BLOCKS = 12


def manifest(geometry: Geometry, chunk: int = 256) -> Manifest:
    return Manifest("w", {}, "bfloat16", geometry.kv_dtype, geometry.kinds, chunk_tokens=chunk)


def one_layer(backend: str, heads: int, block: int, dim: int, dtype: str = "BF16") -> Geometry:
    kind = GroupKind("full", (0,), heads, dim, dim)
    return Geometry(backend, (kind,), dtype, (Group("full", block),), {"l.0": (0, 0)})


def random_bits(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return torch.randint(0, 1 << 14, shape, dtype=bits).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_cpu_attention_is_read_as_its_kernel_writes_it(dtype: torch.dtype, block: int, dim: int) -> None:
    isa = _get_attn_isa(dtype, block, dim)
    if isa not in CPU_ISAS:
        pytest.skip(f"this CPU packs as {isa}, which the hook refuses")
    heads, tokens = 2, 3 * block - 5
    cache = torch.zeros(BLOCKS, heads, block, 2 * dim, dtype=dtype)
    key, value = random_bits(tokens, heads, dim, dtype=dtype), random_bits(tokens, heads, dim, dtype=dtype)
    table = torch.tensor([7, 2, 9])
    position = torch.arange(tokens)
    k_cache, v_cache = cache.view(BLOCKS, heads, 2 * block, dim).chunk(2, dim=2)
    slots = table[position // block] * block + position % block
    ops.cpu_attn_reshape_and_cache(key, value, k_cache, v_cache, slots, isa)
    k, v = cpu_attention(cache, dim, dim)
    assert torch.equal(k[table[position // block], :, position % block], key)
    assert torch.equal(v[table[position // block], :, position % block], value)


@pytest.mark.parametrize("order", list(KVCacheLayout), ids=lambda o: o.name)
def test_gpu_backends_are_read_as_they_split_their_cache(order: KVCacheLayout) -> None:
    """FLASH_ATTN and FLASHINFER write through ``kv_cache.transpose(1, 2).split(head_size, dim=-1)`` in any order."""
    heads, block, dim, layers = 3, 16, 64, 2
    spec = FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=dim, dtype=torch.bfloat16)
    size = spec.page_size_bytes * BLOCKS * layers
    layer_stride, block_stride = compute_layout_strides(spec, BLOCKS, layers, order)[:2]
    place = KVCacheTensor(
        layers=["l.0", "l.1"], size=size, offset=0, layer_stride=layer_stride, block_stride=block_stride
    )
    raw = torch.zeros(size, dtype=torch.int8)
    for view in create_kv_cache_views(raw, spec, BLOCKS, order, place):
        theirs_k, theirs_v = view.transpose(1, 2).split(dim, dim=-1)  # [B, N, H, D]
        fresh = random_bits(BLOCKS, block, heads, dim), random_bits(BLOCKS, block, heads, dim)
        theirs_k.copy_(fresh[0])
        theirs_v.copy_(fresh[1])
        k, v = split_content(view, dim, dim)
        assert torch.equal(k, fresh[0].transpose(1, 2))
        assert torch.equal(v, fresh[1].transpose(1, 2))


@pytest.mark.parametrize("backend", ["CPU_ATTN", "FLASH_ATTN"])
@pytest.mark.parametrize(("first", "last", "position"), [(0, 256, 0), (0, 40, 256), (17, 201, 512), (5, 6, 0)])
def test_native_copies_equal_copies_by_index(backend: str, first: int, last: int, position: int) -> None:
    heads, block, dim, tokens = 4, 32, 64, 256
    geometry = one_layer(backend, heads, block, dim)
    model, part = manifest(geometry), PartId("full", 2)
    table = np.array([[0, 3, *range(4, 26)]], dtype=np.int64)  # the first block is null
    source = random_bits(30, heads, block, 2 * dim)
    kv = PagedKV(geometry, Shard(0, 1), {"l.0": source.clone()}, 30)
    data = random_bits(layout(model, part, tokens).nbytes // 2).view(torch.uint8)
    token = _native.CancelToken()
    moved = scatter(data.numpy(), kv.ops(model, part, tokens), table, first, last, position, token)
    other = PagedKV(geometry, Shard(0, 1), {"l.0": source.clone()}, 30)
    assert move_part(other, model, part, tokens, position, table, first, last, data, scatter_rows) == moved
    assert torch.equal(kv.layers[0].k.view(torch.int16), other.layers[0].k.view(torch.int16))
    assert torch.equal(kv.layers[0].v.view(torch.int16), other.layers[0].v.view(torch.int16))
    if position:
        out, by_index = np.zeros(data.nbytes, np.uint8), torch.zeros(data.nbytes, dtype=torch.uint8)
        HostCopy(kv).gather(model, part, tokens, position, table, out)
        move_part(other, model, part, tokens, position, table, 0, tokens, by_index, gather_rows)
        np.testing.assert_array_equal(out, by_index.numpy())


def test_rows_in_the_null_block_are_left_out() -> None:
    rows = rows_of(np.array([0, 5]), 16, 8, 0, 20, torch.device("cpu"))
    assert rows.rows.tolist() == list(range(8, 20))
    assert set(rows.blocks.tolist()) == {5}
    assert rows.offsets.tolist() == [*range(12)]


def test_blocks_that_the_kernels_cut_up() -> None:
    geometry = one_layer("FLASH_ATTN", 1, 64, 32)
    kv = PagedKV(geometry, Shard(0, 1), {"l.0": torch.zeros(4 * 8, 1, 16, 64, dtype=torch.bfloat16)}, 8)
    assert kv.tables([[0, 3]]).tolist() == [[0, 0, 0, 0, 12, 13, 14, 15]]
    with pytest.raises(Unsupported, match="pool of 9"):
        PagedKV(geometry, Shard(0, 1), {"l.0": torch.zeros(32, 1, 16, 64, dtype=torch.bfloat16)}, 9)


@pytest.mark.parametrize(("kv_heads", "size"), list(itertools.product([1, 2, 4, 8, 16], [1, 2, 4, 8])))
def test_ranks_own_whole_slices_and_each_is_stored_once(kv_heads: int, size: int) -> None:
    geometry = one_layer("FLASH_ATTN", kv_heads, 16, 32)
    local = max(1, kv_heads // size)
    cache = torch.zeros(BLOCKS, local, 16, 64, dtype=torch.bfloat16)
    ranks = [PagedKV(geometry, Shard(r, size), {"l.0": cache}, BLOCKS) for r in range(size)]
    every = set(manifest(geometry).parts)
    assert {p for kv in ranks for p in kv.loads} == every
    assert sorted(p for kv in ranks for p in kv.stores) == sorted(every)
    for kv in ranks:
        assert all(view.k.shape[1] == kv_heads // geometry.kinds[0].head_slices for view in kv.views(kv.loads[0]))


def test_slices_that_ranks_would_cut_are_refused() -> None:
    geometry = one_layer("FLASH_ATTN", 20, 16, 32)  # stored in 5 slices of 4
    cache = torch.zeros(BLOCKS, 10, 16, 64, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="tensor parallelism 2 with 20"):
        PagedKV(geometry, Shard(0, 2), {"l.0": cache}, BLOCKS)


@pytest.mark.gpu
def test_device_copy_moves_the_same_bits(tmp_path: object) -> None:
    from kvfs.vllm_hook.copying import DeviceCopy

    geometry = one_layer("FLASH_ATTN", 2, 16, 64)
    model, part = manifest(geometry), PartId("full", 1)
    cache = random_bits(20, 2, 16, 128).cuda()
    kv = PagedKV(geometry, Shard(0, 1), {"l.0": cache}, 20)
    table = np.arange(1, 17, dtype=np.int64)[None]
    copy = DeviceCopy(kv)
    out = copy.allocate(layout(model, part, 256).nbytes)
    ready = copy.gather(model, part, 256, 0, table, out)
    assert ready is not None
    ready()
    host = PagedKV(geometry, Shard(0, 1), {"l.0": cache.cpu()}, 20)
    expected = np.zeros(out.nbytes, np.uint8)
    HostCopy(host).gather(model, part, 256, 0, table, expected)
    np.testing.assert_array_equal(out, expected)
