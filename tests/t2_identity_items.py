"""Each item of the identity list makes a miss that `explain` names; no item of the out-list does."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfs.client import StoreClient, connect
from kvfs.identity import Extra, GroupKind, Manifest, chunk_keys, root_key, salt32
from tests.samples import MANIFEST, new_store, put

TOKENS = [i * 31 % 50000 for i in range(1024)]
CHANGES: dict[str, Any] = {
    "weights": "cd" * 32,
    "config.rope_theta": {"model_type": "sample", "rope_theta": 5e5},
    "config.sliding_window": {"model_type": "sample", "sliding_window": 1024},
    "model_dtype": "float16",
    "quantization": "awq",
    "kv_dtype": "F8_E4M3",
    "kv_scales": "checkpoint",
    "kinds": (GroupKind("full", (0, 1, 2), 2, 64, 64),),
    "chunk_tokens": 512,
    "adapter": "ef" * 32,
    "fidelity": "lossy",
    "layer_slices": 2,
}


def keys_of(manifest: Manifest, salt: bytes = salt32(), extras: Any = None) -> list[bytes]:
    return chunk_keys(root_key(manifest.ns, salt), TOKENS, manifest.chunk_tokens, extras)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[StoreClient]:
    with new_store(tmp_path / "kv") as store:
        for i, key in enumerate(keys_of(MANIFEST)):
            put(store, key, position=256 * i)
    with connect(store=tmp_path / "kv") as c:
        yield c


def test_the_text_itself_hits(client: StoreClient) -> None:
    assert client.lookup(MANIFEST.ns, keys_of(MANIFEST), timeout=5) == [MANIFEST.all_parts] * 4


@pytest.mark.parametrize("item", CHANGES)
def test_another_identity_misses_and_explain_names_the_item(client: StoreClient, item: str) -> None:
    other = dataclasses.replace(MANIFEST, **{item.partition(".")[0]: CHANGES[item]})
    told = client.explain(other.ns, keys_of(other), other)
    assert told["verdict"] == "unknown-namespace"
    assert item in " ".join(field for field, _, _ in told["near"][0]["differs"])
    client.register(other, {"name": "other"})
    assert client.lookup(other.ns, keys_of(other), timeout=5) == [0] * len(keys_of(other))
    assert set(keys_of(other)).isdisjoint(keys_of(MANIFEST))


@pytest.mark.parametrize("extra", [Extra(Extra.MULTIMODAL, b"image"), Extra(Extra.EMBEDS, b"digest")])
def test_what_else_the_kv_depends_on_misses_from_there_on(client: StoreClient, extra: Extra) -> None:
    found = client.lookup(MANIFEST.ns, keys_of(MANIFEST, extras={2: [extra]}), timeout=5)
    assert found == [MANIFEST.all_parts, MANIFEST.all_parts, 0, 0]


def test_salts_miss(client: StoreClient) -> None:
    for salt in (salt32(b"", "tenant"), salt32(b"secret"), salt32(b"", "")):
        assert client.lookup(MANIFEST.ns, keys_of(MANIFEST, salt), timeout=5) == [0] * 4


def test_names_paths_and_hosts_do_not_count(client: StoreClient, tmp_path: Path) -> None:
    assert client.register(MANIFEST, {"name": "served under another name", "revision": "r2"}) == MANIFEST.ns
    (tmp_path / "kv").rename(tmp_path / "elsewhere")
    with connect(store=tmp_path / "elsewhere") as moved:
        assert moved.lookup(MANIFEST.ns, keys_of(MANIFEST), timeout=5) == [MANIFEST.all_parts] * 4


def test_python_hash_seeds_do_not_count() -> None:
    code = "from tests.t2_identity_items import *; print(MANIFEST.ns_hex, *(k.hex() for k in keys_of(MANIFEST)))"
    here = Path(__file__).parent.parent
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=here,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(told) == 1
    assert told.pop().split() == [MANIFEST.ns_hex, *(k.hex() for k in keys_of(MANIFEST))]
