"""What the hook makes of an engine's description: identity, refusals, settings, the gate, counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from safetensors.numpy import save_file
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from kvfs.errors import ConfigError, Unsupported
from kvfs.identity import Manifest, Salts, diff
from kvfs.vllm_hook.chain import Chain, chains_of
from kvfs.vllm_hook.connector import check_vllm
from kvfs.vllm_hook.fingerprint import Namespaces, manifest_of
from kvfs.vllm_hook.gate import Gate
from kvfs.vllm_hook.geometry import Shard, check_engine, describe
from kvfs.vllm_hook.saving import Retention, live
from kvfs.vllm_hook.settings import Settings
from kvfs.vllm_hook.stats import COUNTERS, Counts, HookMetrics
from tests.toy import HYBRID, config_of, wait_until

SHAPE = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def module(window: int | None = None, backend: str = "CPU_ATTN") -> Any:
    named = SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(sliding_window=window, attn_backend=CPUAttentionBackend if backend == "CPU_ATTN" else named)


def gemma() -> tuple[list[KVCacheGroupSpec], dict[str, Any]]:
    """Six layers as vLLM groups them: sliding ones over several groups."""
    name = "model.layers.{}.self_attn.attn".format
    sliding, full = SlidingWindowSpec(sliding_window=512, **SHAPE), FullAttentionSpec(**SHAPE)
    groups = [
        KVCacheGroupSpec([name(0), name(3)], sliding),
        KVCacheGroupSpec([name(1), name(4)], sliding),
        KVCacheGroupSpec([name(2), name(5)], full),
    ]
    return groups, {name(i): module(None if i in {2, 5} else 512) for i in range(6)}


def test_kinds_are_the_models_not_the_engines_grouping() -> None:
    groups, layers = gemma()
    found = describe(groups, layers, Shard(0, 1), 2, "auto")
    assert {k.name: k.layers for k in found.kinds} == {"full": (2, 5), "swa512": (0, 1, 3, 4)}
    regrouped = [KVCacheGroupSpec([n], g.kv_cache_spec) for g in groups for n in g.layer_names]
    again = describe(regrouped, layers, Shard(0, 1), 2, "auto")
    assert again.kinds == found.kinds
    assert [g.kind for g in found.groups] == ["swa512", "swa512", "full"]
    assert found.layers["model.layers.4.self_attn.attn"] == (4, 1)


def test_kinds_do_not_depend_on_tensor_parallelism() -> None:
    groups, layers = gemma()
    one = describe(groups, layers, Shard(0, 1), 2, "auto")
    halved = [KVCacheGroupSpec(g.layer_names, dataclasses.replace(g.kv_cache_spec, num_kv_heads=1)) for g in groups]
    for size in (2, 4):
        assert describe(halved, layers, Shard(1, size), 2, "auto").kinds == one.kinds
    with pytest.raises(Unsupported, match="2 KV heads on one of 2 ranks"):
        describe(groups, layers, Shard(0, 2), 2, "auto")


@pytest.mark.parametrize(
    ("spec", "attention", "reason"),
    [
        (FullAttentionSpec(**SHAPE), module(backend="TRITON_ATTN"), "attention backend TRITON_ATTN"),
        (FullAttentionSpec(**SHAPE), module(512), "leave the hybrid KV cache manager on"),
        (FullAttentionSpec(**SHAPE), None, "not an attention layer"),
        (FullAttentionSpec(attention_chunk_size=8192, **SHAPE), module(), "attention in chunks"),
        (FullAttentionSpec(**SHAPE | {"dtype": torch.uint8}), module(), "KV cache dtype auto"),
        (SlidingWindowSpec(sliding_window=256, **SHAPE), module(512), "a window of 512 kept as 256"),
        (SlidingWindowSpec(sliding_window=512, extra_retained_tokens=3, **SHAPE), module(512), "a window of 512"),
        (MLAAttentionSpec(**SHAPE | {"num_kv_heads": 1}), module(), "MLAAttentionSpec"),
        (MambaSpec(block_size=128, shapes=((4, 4),), dtypes=(torch.float32,)), module(), "MambaSpec"),
    ],
)
def test_what_has_no_exact_rule_is_refused_by_name(spec: Any, attention: Any, reason: str) -> None:
    name = "model.layers.0.self_attn.attn"
    with pytest.raises(Unsupported, match=reason):
        describe([KVCacheGroupSpec([name], spec)], {name: attention} if attention else {}, Shard(0, 1), 2, "auto")


def test_drafts_and_doubtful_layers_are_refused() -> None:
    groups, layers = gemma()
    drafts = KVCacheGroupSpec(groups[0].layer_names, groups[0].kv_cache_spec, is_eagle_group=True)
    with pytest.raises(Unsupported, match="draft model"):
        describe([drafts], layers, Shard(0, 1), 2, "auto")
    twice = {"model.layers.0.attn": module(), "draft.layers.0.attn": module()}
    with pytest.raises(Unsupported, match="two KV caches in layer 0"):
        describe([KVCacheGroupSpec(list(twice), FullAttentionSpec(**SHAPE))], twice, Shard(0, 1), 2, "auto")


def engine_config(**parallel: int) -> Any:
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1} | parallel
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes),
        model_config=SimpleNamespace(is_encoder_decoder=False),
        cache_config=SimpleNamespace(calculate_kv_scales=False),
    )


def test_engines_that_cannot_be_served() -> None:
    check_engine(engine_config())
    with pytest.raises(Unsupported, match="pipeline parallelism"):
        check_engine(engine_config(pipeline_parallel_size=2))
    with pytest.raises(Unsupported, match="decode context parallelism"):
        check_engine(engine_config(decode_context_parallel_size=2))


# --- identity ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": np.zeros(4, np.float32)}, model / "model.safetensors")
    return model


def test_manifest_names_what_changes_kv_and_nothing_else(folder: Path) -> None:
    base = manifest_of(config_of(folder), HYBRID, "w", 256, "exact")
    same = config_of(folder)
    same.model_config.model = same.model_config.served_model_name = "elsewhere"
    values = {"rope_theta": 1e4, "_name_or_path": "x", "transformers_version": "9"}
    same.model_config.hf_text_config.to_dict = lambda: values
    assert manifest_of(same, HYBRID, "w", 256, "exact") == base
    rope = manifest_of(config_of(folder, rope_theta=1e6), HYBRID, "w", 256, "exact")
    assert [d[0] for d in diff(base, rope)] == ["config.rope_theta"]
    fp8 = manifest_of(config_of(folder), dataclasses.replace(HYBRID, kv_dtype="F8_E4M3"), "w", 256, "exact")
    assert {d[0] for d in diff(base, fp8)} == {"kv_dtype", "kv_scales"}


def chain_of(manifest: Manifest, request: Any) -> Chain:
    (chain,) = chains_of((manifest,), request, Salts())
    return chain


def namespaces(config: Any, registered: list[Any], chunk: int = 64) -> Namespaces:
    return Namespaces(config, chunk, "exact", lambda manifest, info: registered.append((manifest, info)) or Salts())


def known(found: Namespaces, adapter: Any = None) -> Any:
    found.get(adapter)
    wait_until(lambda: found.get(adapter) is not None)
    return found.get(adapter)


def test_files_on_disk_are_shared_and_dummies_are_private(folder: Path) -> None:
    registered: list[Any] = []
    made = [namespaces(config_of(folder), registered) for _ in range(2)]
    assert made[0].get(None) is None  # nothing before the workers have told what their layers are
    for each in made:
        each.start(HYBRID)
    assert known(made[0]) == known(made[1])
    dummy = config_of(folder)
    dummy.load_config.load_format = "dummy"
    live_updates = config_of(folder)
    live_updates.weight_transfer_config = object()
    private = [namespaces(c, registered) for c in (dummy, dummy, live_updates)]
    for each in private:
        each.start(HYBRID)
    assert len({known(n).ns for n in (*made, *private)}) == 4
    assert sum(info.get("private", False) for _, info in registered) == 3
    made[0].renew()
    assert known(made[0]).weights.startswith("private:")


def test_adapters_count_by_content(folder: Path, tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2), ("copy-of-a", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": 8}))
        save_file({"lora": np.full(4, value, np.float32)}, tmp_path / name / "adapter_model.safetensors")
    found = namespaces(config_of(folder), [])
    found.start(HYBRID)
    adapters = [None, *((i, str(tmp_path / name)) for i, name in enumerate(("a", "b", "copy-of-a"), 1))]
    base, a, b, copy = (known(found, x) for x in adapters)
    assert len({base.ns, a.ns, b.ns}) == 3
    assert copy == a


def test_chunks_are_no_longer_than_the_shortest_window(folder: Path) -> None:
    found = namespaces(config_of(folder), [], chunk=256)
    found.start(HYBRID)
    assert known(found).chunk_tokens == 96


def request(tokens: list[int], **kwargs: Any) -> Request:
    return Request("r", tokens, SamplingParams(max_tokens=1), None, **kwargs)


def test_multimodal_items_and_embeddings_are_in_the_key(folder: Path) -> None:
    manifest = manifest_of(config_of(folder), HYBRID, "w", 64, "exact")
    tokens = list(range(200))

    def keys(**kwargs: Any) -> list[bytes]:
        return chain_of(manifest, request(tokens, **kwargs)).keys

    def image(digest: str, offset: int) -> dict[str, Any]:
        place = PlaceholderRange(offset=offset, length=20)
        return {"mm_features": [MultiModalFeatureSpec(None, "image", digest, place, mm_hash=digest)]}

    plain, a, b, moved = keys(), keys(**image("a", 70)), keys(**image("b", 70)), keys(**image("a", 71))
    assert plain[0] == a[0] == b[0]  # the first chunk holds nothing of the image
    assert len({plain[1], a[1], b[1], moved[1]}) == 4
    assert len({plain[2], a[2], b[2], moved[2]}) == 4  # what follows depends on it too
    embeds = [request([0] * 128, prompt_embeds=e) for e in (torch.zeros(128, 8), torch.ones(128, 8))]
    assert len({chain_of(manifest, r).keys[0] for r in embeds}) == 2


def test_chain_grows_with_its_request(folder: Path) -> None:
    manifest = manifest_of(config_of(folder), HYBRID, "w", 64, "exact")
    growing, whole = request(list(range(100))), request(list(range(140)))
    chain = chain_of(manifest, growing)
    growing.append_output_token_ids(list(range(100, 140)))
    assert chain.extend().keys == chain_of(manifest, whole).keys
    assert chain.tail_ends(2) == []
    assert chain.tail_ends(1) == [112, 96, 80]
    assert chain.tail_key(112) == chain_of(manifest, request(list(range(112)))).tail_key(112)
    assert len({chain.tail_key(e) for e in (80, 96, 112)}) == 3


# --- settings ---


def test_settings_name_the_nearest_key_and_the_line_to_write() -> None:
    assert Settings.parse({"mount": "/mnt/kvfs"}).chunk_tokens == 256
    for extra, message in [
        ({"store": "/s", "chunk_token": 128}, "nearest name is chunk_tokens"),
        ({}, "either mount"),
        ({"store": "/s", "mount": "/m"}, "either mount"),
        ({"store": "/s", "gate": "never"}, "auto or always"),
        ({"store": "/s", "chunk_tokens": 100}, "multiple of 16"),
        ({"store": "/s", "lookup_deadline": "soon"}, "cannot be 'soon'"),
        ({"store": "/s", "staging_bytes": 0}, "positive"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Settings.parse(extra)
    check_vllm((0, 32), SimpleNamespace(kv_load_failure_policy="recompute"))
    with pytest.raises(ConfigError, match=r'"kv_load_failure_policy": "recompute"'):
        check_vllm((0, 32), SimpleNamespace(kv_load_failure_policy="fail"))
    with pytest.raises(ConfigError, match=r"0\.29 is too old"):
        check_vllm((0, 29, 1), SimpleNamespace(kv_load_failure_policy="recompute"))


# --- decisions ---


def test_gate_opens_until_it_knows_and_forgives() -> None:
    gate = Gate("auto", ranks=2)
    assert gate.opens(10, 1 << 30)
    gate.prefilled(1000, 1.0)
    gate.loaded(100e6, 1.0)
    assert gate.opens(1000, 150_000_000)  # 75 MB a rank: 0.75 s against 1 s
    refused = 0
    while not gate.opens(1000, 250_000_000):
        refused += 1
    assert 1 <= refused <= 3
    assert all(Gate("always", 1).opens(1, 1 << 40) for _ in range(3))
    gate.loaded(10, 100.0)
    assert gate.bytes_per_s > 100e6  # too small a load says nothing


def test_retention_keeps_what_a_hit_may_need() -> None:
    manifest = manifest_of(config_of(Path("/nowhere")), HYBRID, "w", 64, "exact")
    swa = manifest.kind("swa96")
    rule = Retention(manifest, prompt=1000, align=16, interval=256)
    kept = [end for end in range(64, 1100, 64) if rule.keeps(swa, end)]
    assert {256, 512, 768} <= set(kept)
    assert {192, 448, 704} <= set(kept)  # the windows before them reach into the chunk before
    assert 320 not in kept
    assert all(end in kept for end in range(832, 1100, 64))
    assert all(rule.keeps(manifest.kind("full"), end) for end in range(64, 1100, 64))
    assert [i for i, _ in rule.completed(3, 400)] == [3, 4, 5]
    assert not live([0, 4, 5], 16, 0, 48)
    assert live([0, 4, 5], 16, 16, 48)
    assert not live([1, 2], 16, 0, 48)


def test_counts_travel_and_add_up() -> None:
    counts = Counts()
    assert counts.take() is None
    counts.add("load_failures", 1, "stall")
    counts.add("hit_tokens", 5)
    counts.add("hit_tokens", 0)
    total = counts.take()
    assert total is not None
    counts.add("hit_tokens", 7)
    other = counts.take()
    assert other is not None
    assert total.aggregate(other).reduce() == {"hit_tokens": 12, "load_failures:stall": 1}
    registry = CollectorRegistry()

    def counter(name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=registry)

    config = SimpleNamespace(kv_transfer_config=None)
    types = {Counter: counter, Gauge: None, Histogram: None}
    metrics = HookMetrics(config, types, ["model"], {0: ["m"]})
    metrics.observe(total.to_dict())
    assert registry.get_sample_value("kvfs_hook_hit_tokens_total", {"model": "m"}) == 12
    assert registry.get_sample_value("kvfs_hook_load_failures_total", {"model": "m", "reason": "stall"}) == 1
    assert all(text.endswith(".") for _, text in COUNTERS.values())
