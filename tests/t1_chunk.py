"""The part file: what is written is read back, any damage is found, hostile headers cost nothing."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kvfs import chunk
from kvfs.errors import ChunkCorrupt, IdentityError, StoreFull
from kvfs.identity import PartId
from tests.attacks.headers import pad
from tests.samples import MANIFEST, new_key, payload

PART = PartId("swa512", 1)
KEY = bytes(range(32))


def write(path: Path, key: bytes = KEY, part: PartId = PART, tokens: int = 256) -> Path:
    with path.open("w+b") as f:
        meta = chunk.PartMeta(MANIFEST.ns, key, bytes(32), tokens, 512, part)
        chunk.write_part(f.fileno(), MANIFEST, meta, payload(key, part, tokens=tokens))
    return path


def open_(path: Path, key: bytes = KEY, part: PartId = PART) -> chunk.PartFile:
    return chunk.open_part(os.open(path, os.O_RDONLY), MANIFEST, key, part)


@pytest.mark.parametrize("tokens", [1, 16, 255, 256])
def test_round_trip(tmp_path: Path, tokens: int) -> None:
    with open_(write(tmp_path / "p", tokens=tokens)) as p:
        want = payload(KEY, PART, tokens=tokens)
        assert bytes(p.verify()) == bytes(p.map()) == want
        assert p.header.data_start % chunk.ALIGNMENT == 0
        assert p.header.meta == (MANIFEST.ns, KEY, bytes(32), tokens, 512, PART)
        per = len(want) // 4
        assert [bytes(p.tensor(f"layers.{i}.{x}")) for i in (0, 1) for x in "kv"] == [
            want[i * per : (i + 1) * per] for i in range(4)
        ]


def test_safetensors_reads_it_without_kvfs(tmp_path: Path) -> None:
    import torch

    path = write(tmp_path / "p")
    want = np.frombuffer(payload(KEY, PART), dtype=np.uint16).reshape(4, 1, 256, 64)
    with safe_open(path, "pt") as f:
        assert f.metadata()["kvfs.key"] == KEY.hex()
        for i, name in enumerate(["layers.0.k", "layers.0.v", "layers.1.k", "layers.1.v"]):
            got = f.get_tensor(name).view(torch.uint16).numpy()
            assert np.array_equal(got, want[i])


def test_asking_for_another_chunk_names_the_field(tmp_path: Path) -> None:
    path = write(tmp_path / "p")
    for key, part, reason in ((new_key(), PART, "wrong-key"), (KEY, PartId("swa512", 0), "wrong-part")):
        with pytest.raises(ChunkCorrupt) as e:
            open_(path, key, part)
        assert e.value.reason == reason


def test_every_bit_of_the_header_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "p")
    raw = path.read_bytes()
    start = chunk.read_header(fd := os.open(path, os.O_RDONLY)).data_start
    os.close(fd)
    for bit in range(start * 8):
        bad = bytearray(raw[:start])
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChunkCorrupt):
            chunk.parse_header(bytes(bad), len(raw))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_payload_bit_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as d:
        path = write(Path(d) / "p")
        raw = bytearray(path.read_bytes())
        at = data.draw(st.integers(4096 * 8, len(raw) * 8 - 1))
        raw[at // 8] ^= 1 << at % 8
        path.write_bytes(raw)
        with open_(path) as p, pytest.raises(ChunkCorrupt) as e:
            p.verify()
        assert e.value.reason == "checksum"


@pytest.mark.parametrize("size", [0, 5, 8, 4095, 4096, 4097, 40000, "extended"])
def test_a_wrong_size_is_found(tmp_path: Path, size: int | str) -> None:
    path = write(tmp_path / "p")
    os.truncate(path, path.stat().st_size + 1 if isinstance(size, str) else size)
    with pytest.raises(ChunkCorrupt):
        open_(path)


def test_a_file_cut_after_it_was_opened_is_a_miss_not_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "p")
    with open_(path) as p:
        os.truncate(path, 10000)
        with pytest.raises(ChunkCorrupt) as e:
            p.verify()
        assert e.value.reason == "truncated"


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 200000))
def test_random_bytes_never_raise_anything_else(tail: bytes, size: int) -> None:
    for raw in (tail, pad(b'{"__metadata__":{' + tail), pad(tail)):
        with pytest.raises(ChunkCorrupt):
            chunk.parse_header(raw, size)


def test_a_full_disk_is_a_store_full(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    meta = chunk.PartMeta(MANIFEST.ns, KEY, bytes(32), 256, 0, PART)
    try:
        with pytest.raises((StoreFull, OSError)) as e:
            chunk.write_part(fd, MANIFEST, meta, payload(KEY, PART))
        assert isinstance(e.value, StoreFull)
    finally:
        os.close(fd)


def test_a_payload_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "p").open("w+b") as f, pytest.raises(IdentityError):
        chunk.write_part(f.fileno(), MANIFEST, chunk.PartMeta(MANIFEST.ns, KEY, bytes(32), 256, 0, PART), b"abc")
