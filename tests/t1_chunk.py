"""The part file: what is written is read back, any damage is found, hostile headers cost nothing."""

import os
import re
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kvfs import _native, chunk
from kvfs.errors import ChunkCorrupt, IdentityError, StoreFull
from kvfs.identity import PartId
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


def _raw(body: bytes, n: int | None = None) -> bytes:
    size = -(-(8 + len(body)) // 4096) * 4096
    return struct.pack("<Q", size - 8 if n is None else n) + body.ljust(size - 8)


def attacks() -> dict[str, bytes]:
    """Headers that have hurt some reader of safetensors."""
    meta_of = chunk.PartMeta(MANIFEST.ns, KEY, bytes(32), 256, 512, PART)
    raw = chunk.encode_header(MANIFEST, meta_of, bytes(8 * 4))
    body = raw[8:4096].rstrip()
    table = body.index(b'"layers.0.k"')
    meta, tensors = body[:table], body[table:]

    def t(old: bytes, new: bytes) -> bytes:
        assert old in tensors
        return _raw(meta + tensors.replace(old, new, 1))

    return {
        "length 2**63": struct.pack("<Q", 1 << 63) + raw[8:4096],
        "length beyond the file": struct.pack("<Q", 1 << 20) + raw[8:4096],
        "length 0": struct.pack("<Q", 0) + raw[8:4096],
        "not aligned": struct.pack("<Q", 4000) + raw[8:4096],
        "empty object": _raw(b"{}"),
        "no metadata": _raw(b"{" + tensors),
        "depth": _raw(b"[" * 60000),
        "nested metadata": _raw(b'{"__metadata__":{"a":{"b":{}}},' + tensors),
        "many tensors": _raw(meta + b",".join(b'"layers.%d.k":{"dtype":"U8"}' % i for i in range(2000)) + b"}"),
        "negative offset": t(b"[0,", b"[-4,"),
        "overlap": t(b"[32768,65536]", b"[0,32768]"),
        "hole": t(b"[32768,65536]", b"[32769,65537]"),
        "reversed": t(b"[0,32768]", b"[32768,0]"),
        "huge shape": t(b"[1,256,64]", b"[9999999,9999999,9999999]"),
        "shape of zero": t(b"[1,256,64]", b"[0,256,64]"),
        "float shape": t(b"[1,256,64]", b"[1,256,6.4e1]"),
        "four dimensions": t(b"[1,256,64]", b"[1,1,256,64]"),
        "no shape": t(b"[1,256,64]", b"[]"),
        "unknown dtype": t(b'"BF16"', b'"BF17"'),
        "wrong width": t(b'"BF16"', b'"F32"'),
        "string offsets": t(b"[0,32768]", b'["0","32768"]'),
        "duplicate tensor": t(b"layers.0.v", b"layers.0.k"),
        "foreign tensor": t(b"layers.0.k", b"../../etc/x"),
        "non-ascii name": t(b"layers.0.k", "layers.０.k".encode()),
        "surrogate": t(b"layers.0.k", b"\\ud800yers.0.k"),
        "byte order mark": _raw(b"\xef\xbb\xbf" + body),
        "trailing text": _raw(body + b"x"),
        "trailing object": _raw(body + b"{}"),
        "NUL padding": struct.pack("<Q", 4088) + body.ljust(4088, b"\0"),
        "duplicate metadata": _raw(body.replace(b'"kvfs.tokens":"256"', b'"kvfs.tokens":"256","kvfs.tokens":"16"', 1)),
        "duplicate __metadata__": _raw(meta + tensors[:-1] + b',"__metadata__":{}}'),
        "number metadata": _raw(body.replace(b'"kvfs.tokens":"256"', b'"kvfs.tokens":256', 1)),
        "other tokens": _raw(body.replace(b'"kvfs.tokens":"256"', b'"kvfs.tokens":"128"', 1)),
        "utf-16": _raw(body[:1500].decode().encode("utf-16")),
    }


ATTACKS = attacks()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("sealed", [False, True])
def test_hostile_headers_are_refused_quickly(name: str, sealed: bool) -> None:
    """Also when the attacker computes the header's checksum as we do."""
    raw = ATTACKS[name]
    if sealed:
        zeroed = re.sub(rb'"kvfs.header_sum":"[0-9a-f]{16}"', b'"kvfs.header_sum":"' + b"0" * 16 + b'"', raw)
        raw = zeroed.replace(b'header_sum":"' + b"0" * 16, b'header_sum":"%016x' % _native.xxh3_64(zeroed), 1)
    start = time.perf_counter()
    with pytest.raises(ChunkCorrupt):
        chunk.parse_header(raw, 4096 + 131072)
    assert time.perf_counter() - start < 0.1


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 200000))
def test_random_bytes_never_raise_anything_else(tail: bytes, size: int) -> None:
    for raw in (tail, _raw(b'{"__metadata__":{' + tail), _raw(tail)):
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
