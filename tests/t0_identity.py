"""Identity: what must change the namespace, what must not change a key, and vectors that hold for ever."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import IdentityError
from kvfs.identity import Extra, GroupKind, Manifest, PartId, chunk_keys, diff, next_key, root_key, salt32

GOLDEN = json.loads((Path(__file__).parent / "golden" / "identity.json").read_text())
KINDS = (GroupKind("swa512", (0, 1, 2, 3, 4), 1, 256, 256), GroupKind("full", (5,), 1, 256, 256))
BASE = Manifest(
    weights="ab" * 32,
    config={"rope_theta": 1e6, "sliding_window": 512, "hidden_size": 640},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=KINDS,
)
IN_IDENTITY = {
    "weights": "cd" * 32,
    "config": {"rope_theta": 1e4, "sliding_window": 512, "hidden_size": 640},
    "model_dtype": "float16",
    "kv_dtype": "F8_E4M3",
    "kv_scales": "static",
    "quantization": {"method": "fp8"},
    "kinds": KINDS[::-1],
    "chunk_tokens": 128,
    "adapter": "ef" * 32,
    "fidelity": "lossy",
    "layer_slices": 2,
}


@pytest.mark.parametrize("field", IN_IDENTITY)
def test_changing_an_identity_field_changes_the_namespace_and_diff_names_it(field: str) -> None:
    other = dataclasses.replace(BASE, **{field: IN_IDENTITY[field]})
    assert other.ns != BASE.ns
    assert all(path.split(".")[0].split("[")[0] == field for path, _, _ in diff(BASE, other))
    assert diff(BASE, other)


def test_diff_names_the_config_field() -> None:
    other = dataclasses.replace(BASE, config=IN_IDENTITY["config"])
    assert diff(BASE, other) == [("config.rope_theta", 1e6, 1e4)]


def test_every_manifest_field_is_covered_above() -> None:
    fixed = {"layout", "key_domain"}
    assert {f.name for f in dataclasses.fields(Manifest)} == IN_IDENTITY.keys() | fixed


def test_json_round_trip_and_order_do_not_matter() -> None:
    d = json.loads(json.dumps(BASE.to_json(), sort_keys=True))
    assert Manifest.from_json(d) == BASE
    reordered = dataclasses.replace(BASE, config=dict(reversed(list(BASE.config.items()))))
    assert reordered.ns == BASE.ns


@pytest.mark.parametrize(
    "damage", [{"kinds": []}, {"kv_dtype": "BF17"}, {"more": 1}, {"chunk_tokens": 100}, {"kinds": 7}]
)
def test_a_malformed_manifest_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(IdentityError):
        Manifest.from_json(BASE.to_json() | damage)


def test_head_slices_are_the_largest_divisor_up_to_eight() -> None:
    got = {h: GroupKind("full", (0,), h, 64, 64).head_slices for h in (1, 2, 3, 8, 10, 12, 16, 7, 96)}
    assert got == {1: 1, 2: 2, 3: 3, 8: 8, 10: 5, 12: 6, 16: 8, 7: 7, 96: 8}


def test_golden_vectors() -> None:
    assert BASE.ns_hex == GOLDEN["ns"]
    salt = salt32(b"secret", "tenant-a")
    assert salt.hex() == GOLDEN["salt"]
    root = root_key(BASE.ns, salt)
    tokens = np.arange(600) * 7 % 262144
    keys = chunk_keys(root, tokens, 256, {1: [Extra(Extra.MULTIMODAL, b"image")]})
    assert [k.hex() for k in keys] == GOLDEN["keys"]
    assert next_key(keys[-1], tokens[512:592].astype(np.uint32)).hex() == GOLDEN["tail"]


def test_salts_are_framed() -> None:
    assert salt32(b"ab", "c") != salt32(b"a", "bc")
    assert salt32(b"", None) != salt32(b"", "")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.binary(max_size=40), st.integers(0, 255))
def test_tokens_cannot_imitate_extras(tokens: list[int], data: bytes, kind: int) -> None:
    parent = bytes(32)
    plain = next_key(parent, np.array(tokens, dtype=np.uint32))
    assert plain != next_key(parent, np.array(tokens, dtype=np.uint32), [Extra(kind, data)])
    padded = data + bytes(-len(data) % 4)
    longer = np.concatenate([np.array(tokens, dtype=np.uint32), np.frombuffer(padded, dtype="<u4")])
    assert (next_key(parent, longer) == plain) == (len(longer) == len(tokens))


@given(st.lists(st.integers(0, 1000), min_size=32, max_size=200))
def test_known_keys_are_kept_and_extended(tokens: list[int]) -> None:
    root = root_key(bytes(32), bytes(32))
    whole = chunk_keys(root, tokens, 16)
    assert chunk_keys(root, tokens, 16, known=whole[:1]) == whole
    assert len(whole) == len(tokens) // 16


@pytest.mark.parametrize("bad", [[-1], [2**32], [1.5], [[1]], ["a"]])
def test_bad_token_ids_are_refused(bad: list[object]) -> None:
    with pytest.raises(IdentityError):
        chunk_keys(bytes(32), bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["full", "full.h", "full.h64", "swa0.h1", "swa512.h01", "../full.h0", "full.h0\n", ""])
def test_part_names_have_a_closed_grammar(text: str) -> None:
    with pytest.raises(IdentityError):
        PartId.parse(text)
    assert str(PartId.parse("swa512.h7")) == "swa512.h7"
