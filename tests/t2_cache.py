"""put, lookup and get on torch tensors: exact bytes back, on full and sliding layers, and on a real model."""

import os
from pathlib import Path

import pytest
import torch

import kvfs
from kvfs.cache import TextCache
from kvfs.errors import ChunkCorrupt, IdentityError
from kvfs.identity import GroupKind, Manifest
from kvfs.names import part_path
from kvfs.store import Store

MANIFEST = Manifest(
    weights="ab" * 32,
    config={},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("swa64", (0, 2), 2, 16, 16), GroupKind("full", (1,), 2, 16, 8)),
    chunk_tokens=64,
)
TEXT = [7 * i % 1000 for i in range(300)]


def kv(tokens: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    dims = [(16, 16), (16, 8), (16, 16)]
    return [tuple(torch.randn(2, tokens, d, generator=g).bfloat16() for d in pair) for pair in dims]


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    Store.init(tmp_path / "store").close()
    with kvfs.open(tmp_path / "store", MANIFEST) as c:
        yield c


def test_a_text_comes_back_bit_for_bit(cache: TextCache) -> None:
    whole = kv(300)
    assert cache.lookup(TEXT) == 0
    assert cache.put(TEXT, whole) == 288
    n, got = cache.get(TEXT)
    assert n == cache.lookup(TEXT) == 288
    assert all(torch.equal(a, b[:, :n]) for a, b in zip(got[1], whole[1], strict=True))
    for layer in (0, 2):  # sliding: what a query at n can see
        for a, b in zip(got[layer], whole[layer], strict=True):
            assert torch.equal(a[:, n - 63 :], b[:, n - 63 : n])
            assert not a[:, : (n - 63) // 64 * 64].any()


def test_the_last_token_is_left_to_the_model(cache: TextCache) -> None:
    cache.put(TEXT[:256], kv(256))
    assert cache.lookup(TEXT[:256]) == 255
    assert cache.get(TEXT[:256])[1][1][0].shape == (2, 255, 16)


def test_a_text_that_goes_on_hits_to_its_last_sixteen(cache: TextCache) -> None:
    cache.put(TEXT[:150], kv(150))
    assert cache.lookup(TEXT) == 144
    assert cache.lookup([*TEXT[:130], 5, 5, 5]) == 128
    assert cache.lookup([5, *TEXT]) == 0


def test_caches_that_kept_only_a_window_are_stored_as_far_as_they_go(cache: TextCache) -> None:
    whole = kv(300)
    cut = [tuple(t[:, -150:] for t in pair) if i != 1 else pair for i, pair in enumerate(whole)]
    cache.put(TEXT, cut)
    n, got = cache.get(TEXT)
    assert n == 288
    assert torch.equal(got[0][0][:, n - 63 :], whole[0][0][:, n - 63 : n])
    assert cache.lookup(TEXT[:100]) == 0


def test_salts_and_models_do_not_meet(cache: TextCache, tmp_path: Path) -> None:
    cache.put(TEXT, kv(300))
    with kvfs.open(tmp_path / "store", MANIFEST, cache_salt="other") as salted:
        assert salted.lookup(TEXT) == 0
    with kvfs.open(tmp_path / "store", MANIFEST.with_adapter("cd" * 32)) as adapted:
        assert adapted.lookup(TEXT) == 0


def test_kv_of_another_shape_is_refused(cache: TextCache) -> None:
    with pytest.raises(IdentityError, match="layer 0"):
        cache.put(TEXT, [(k[:1], v) for k, v in kv(300)])
    with pytest.raises(IdentityError, match="float32"):
        cache.put(TEXT, [(k.float(), v.float()) for k, v in kv(300)])


def test_a_damaged_part_is_reported_put_away_and_then_a_shorter_hit(cache: TextCache, tmp_path: Path) -> None:
    cache.put(TEXT, kv(300))
    store = Store.open(tmp_path / "store")
    key = cache._keys(torch.tensor(TEXT).numpy())[192]
    part = MANIFEST.parts[-1]
    path = store.path / cache.ns.hex() / part_path(key, part)
    os.chmod(path, 0o640)
    with path.open("r+b") as f:
        f.seek(-5, os.SEEK_END)
        f.write(b"\0\1\2\3\4")
    with pytest.raises(ChunkCorrupt, match="checksum"):
        cache.get(TEXT)
    assert cache.lookup(TEXT) == 128
    assert len(list((store.path / "lost+found").iterdir())) == 2
    store.close()


@pytest.mark.slow
def test_a_transformers_model_goes_on_from_the_store(models: object, tmp_path: Path) -> None:
    """The README's example: SmolLM2 prefills a text, another cache continues it from the store, same tokens."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(models.smollm2, dtype=torch.bfloat16)
    text = torch.arange(1000, 1300)[None]
    with torch.no_grad():
        past = DynamicCache()
        want = model(text, past_key_values=past).logits[0, -1]
        Store.init(tmp_path / "s").close()
        with kvfs.open(tmp_path / "s", model) as cache:
            assert cache.put(text[0].tolist(), [(x.keys[0], x.values[0]) for x in past.layers]) == 288
            n, layers = cache.get(text[0].tolist())
        again = DynamicCache()
        for i, (k, v) in enumerate(layers):
            assert torch.equal(k, past.layers[i].keys[0, :, :n])
            again.update(k[None], v[None], i)
        got = model(text[:, n:], past_key_values=again).logits[0, -1]
    assert n == 288
    assert torch.topk(got, 1).indices == torch.topk(want, 1).indices
    assert (got.float().log_softmax(0) - want.float().log_softmax(0)).abs().max() < 0.5
