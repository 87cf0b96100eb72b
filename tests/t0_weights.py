"""The weights fingerprint: content counts, names and places do not."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from kvfs import weights
from kvfs.errors import IdentityError
from kvfs.weights import adapter_fingerprint, weights_fingerprint


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvfs" / "weights.json"


def model(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    return folder


def test_a_copy_under_another_name_is_the_same_model(tmp_path: Path) -> None:
    a = model(tmp_path / "a", one=b"1", two=b"2")
    b = model(tmp_path / "b", eins=b"1", zwei=b"2")
    assert weights_fingerprint(a) == weights_fingerprint(b)


def test_one_changed_byte_is_another_model_even_with_its_old_mtime(tmp_path: Path) -> None:
    a = model(tmp_path / "a", one=b"1234", two=b"2")
    f = a / "one.safetensors"
    before, st = weights_fingerprint(a), f.stat()
    f.write_bytes(b"1235")
    os.utime(f, ns=(st.st_atime_ns, st.st_mtime_ns))
    assert weights_fingerprint(a) != before


def test_hugging_face_blobs_are_taken_at_their_word_and_others_hashed(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / hashlib.sha256(b"w").hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(b"w")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    assert weights_fingerprint(snapshot) == weights_fingerprint(model(tmp_path / "plain", model=b"w"))


def test_a_file_is_hashed_once(tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = model(tmp_path / "a", one=b"1")
    want = weights_fingerprint(a)
    assert len(json.loads(cache_home.read_text())) == 1
    monkeypatch.setattr(weights.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert weights_fingerprint(a) == want


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": 1}'])
def test_a_damaged_cache_is_made_again(tmp_path: Path, cache_home: Path, damage: bytes) -> None:
    a = model(tmp_path / "a", one=b"1")
    want = weights_fingerprint(a)
    cache_home.write_bytes(damage)
    assert weights_fingerprint(a) == want


def test_no_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(IdentityError, match="no weight files"):
        weights_fingerprint(tmp_path)
    with pytest.raises(IdentityError, match="no adapter"):
        adapter_fingerprint(tmp_path)


def test_adapters_count_their_config(tmp_path: Path) -> None:
    for name, alpha in (("a", 8), ("b", 16)):
        d = tmp_path / name
        d.mkdir()
        (d / "adapter_model.safetensors").write_bytes(b"same")
        (d / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
    assert adapter_fingerprint(tmp_path / "a") != adapter_fingerprint(tmp_path / "b")
