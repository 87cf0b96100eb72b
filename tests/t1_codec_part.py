"""Coded parts: what is written is read back, damage is found wherever it is, and lossy never passes for exact."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kvfs import _native, chunk, codec
from kvfs.errors import ChunkCorrupt, ConfigError, IdentityError, Unsupported
from kvfs.identity import GroupKind, PartId
from tests.codec_parts import FLOAT8, LATENT, Raw, raw_part, resealed

if TYPE_CHECKING:
    from pathlib import Path

PART = raw_part()
CODED = {name: PART.encode(name) for name in codec.LEVELS}


def parse(file: bytes) -> codec.CodedPart:
    return codec.CodedPart.parse(file, len(file))


def error(raw: Raw, data: bytes) -> float:
    """Relative to the standard deviation of everything, mean over the tensors."""
    a, b = ((np.frombuffer(x, np.uint16).astype(np.uint32) << 16).view(np.float32) for x in (raw.data, data))
    return float(np.sqrt(((a - b) ** 2).mean() / a.var()))


@pytest.mark.parametrize("name", codec.LEVELS)
def test_round_trip(name: str) -> None:
    part = parse(CODED[name])
    data = part.decode(CODED[name])
    assert part.layout == PART.header.layout
    assert (part.meta, part.fidelity, part.level.name) == (PART.header.meta, "lossy", name)
    assert part.sums == _native.sums(data, part.layout.bounds)
    assert (bytes(data) == PART.data) == (name == "lossless")
    header = chunk.encode_header(PART.manifest, part.meta, part.sums)
    assert chunk.parse_header(header, len(header) + len(data)).layout == part.layout


def test_levels_trade_size_for_error() -> None:
    sizes = [len(CODED[name]) for name in codec.LEVELS]
    errors = [error(PART, bytes(parse(f).decode(f))) for f in CODED.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] == 0
    assert errors[-1] < 0.5


@pytest.mark.parametrize(
    "raw",
    [
        raw_part(position=0),
        raw_part(tokens=16, position=0),
        raw_part(tokens=1, position=0),
        raw_part(GroupKind("swa512", (5,), 16, 96, 96), tokens=48),
        raw_part(GroupKind("full", (0, 1), 1, 192, 128), tokens=32),
        raw_part(dtype="F16"),
        raw_part(rope=False),
        raw_part(LATENT, tokens=64),
        raw_part(LATENT, tokens=64, rope=False),
        raw_part(GroupKind("full", tuple(range(40)), 1, 256, 256), tokens=32, position=(1 << 32) - 64),
    ],
    ids=["sink", "tail", "one token", "two heads", "192+128", "half", "no rope", "latent", "latent, no rope", "deep"],
)
@pytest.mark.parametrize("name", ["lossless", "medium"])
def test_every_shape(raw: Raw, name: str) -> None:
    file = raw.encode(name)
    part = parse(file)
    data = bytes(part.decode(file))
    assert part.layout == raw.header.layout
    assert part.sums == _native.sums(data, part.layout.bounds)
    assert name != "lossless" or data == raw.data


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F32"])
def test_other_types_are_coded_without_loss_only(dtype: str) -> None:
    raw = raw_part(dtype=dtype, tokens=64)
    file = raw.encode("lossless")
    assert bytes(parse(file).decode(file)) == raw.data
    with pytest.raises(Unsupported):
        raw.encode("medium")


@pytest.mark.parametrize("dim", [40, 72, 100, 576])
def test_head_sizes_that_do_not_fit_are_refused(dim: int) -> None:
    with pytest.raises(Unsupported):
        raw_part(GroupKind("full", (0,), 1, dim, dim), tokens=16, rope=False).encode("lossless")


def test_values_that_no_step_fits_become_lossless() -> None:
    data = bytearray(PART.data)
    data[1000:1002] = b"\x80\x7f"
    header = PART.header._replace(sums=_native.sums(data, PART.header.layout.bounds))
    file = codec.encode_part(header, data, codec.level("lowest"), PART.rope)
    assert parse(file).level.name == "lossless"
    assert parse(file).decode(file) == data


def test_an_exact_namespace_takes_no_lossy_form() -> None:
    exact = raw_part(fidelity="exact", tokens=32)
    assert parse(exact.encode("lossless")).fidelity == "exact"
    for name in list(codec.LEVELS)[1:]:
        with pytest.raises(IdentityError, match="lossy"):
            exact.encode(name)
    forged = CODED["medium"].replace(b'"kvfs.fidelity":"lossy"', b'"kvfs.fidelity":"exact"')
    size = 8 + int.from_bytes(forged[:8], "little")
    index = forged[size : parse(CODED["medium"]).data_start]
    with pytest.raises(ChunkCorrupt) as e:
        parse(resealed(forged, index))
    assert e.value.reason == "wrong-fidelity"


def test_data_that_is_not_what_the_header_says_is_not_coded() -> None:
    data = bytearray(PART.data)
    data[5] ^= 1
    with pytest.raises(ChunkCorrupt) as e:
        codec.encode_part(PART.header, data, codec.level("medium"), PART.rope)
    assert e.value.reason == "checksum"


def test_an_unknown_level_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="medium"):
        codec.level("middling")


def test_safetensors_reads_it_without_kvfs(tmp_path: Path) -> None:
    path = tmp_path / "p.cachegen.safetensors"
    path.write_bytes(CODED["medium"])
    with safe_open(path, "np") as f:
        assert f.metadata()["kvfs.form"] == "cachegen-medium"
        assert f.metadata()["kvfs.key"] == PART.header.meta.key.hex()
        part = parse(CODED["medium"])
        assert f.get_tensor("index").nbytes + f.get_tensor("layers").nbytes == len(
            CODED["medium"]
        ) - 8 - int.from_bytes(CODED["medium"][:8], "little")
        assert f.get_tensor("layers").tobytes() == CODED["medium"][part.data_start :]


def test_threads_change_nothing() -> None:
    big = raw_part(GroupKind("full", tuple(range(12)), 2, 128, 128))
    alone = big.encode("medium")
    with ThreadPoolExecutor(2) as pool:
        assert big.encode("medium", executor=pool) == alone
        part = parse(alone)
        assert len(part.index.batches()) > 1
        assert part.decode(alone, executor=pool) == part.decode(alone)


def test_layers_come_one_by_one() -> None:
    file = CODED["medium"]
    part, out = parse(file), bytearray(PART.header.layout.nbytes)
    whole, per_layer = part.decode(file), PART.header.layout.nbytes // 3
    for layer in range(3):
        part.decode_layers(file, out, layer, layer + 1, part.turns())
        done = (layer + 1) * per_layer
        assert out[:done] == whole[:done]
        assert not any(out[done:])


def test_every_bit_of_header_and_index_counts() -> None:
    file = bytearray(CODED["medium"])
    start = parse(bytes(file)).data_start
    for bit in range(start * 8):
        file[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChunkCorrupt):
            codec.CodedPart.parse(file, len(file))
        file[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("name", ["lossless", "low"])
def test_any_flipped_bit_of_the_streams_is_found(name: str) -> None:
    file, rng = bytearray(CODED[name]), np.random.default_rng(1)
    part = parse(bytes(file))
    for bit in rng.integers(part.data_start * 8, len(file) * 8, 200):
        file[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChunkCorrupt) as e:
            part.decode(file)
        assert e.value.reason == "checksum"
        file[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("size", [0, 7, 8, 63, 64, 512, 1000, 2000, -4, -1, 1, 4096])
def test_a_wrong_size_is_found(size: int) -> None:
    file = CODED["medium"]
    cut = file[:size] if size >= 8 or size == 0 else file[:size] if size < 0 else file + bytes(size)
    with pytest.raises(ChunkCorrupt):
        codec.CodedPart.parse(cut, len(cut))
    part = parse(file)
    with pytest.raises(ChunkCorrupt) as e:
        part.decode(cut)
    assert e.value.reason == "truncated"


def refused_or_harmless(forged: bytes) -> None:
    """Whoever can make checksums right can make numbers wrong: memory stays bounded and nothing is read outside."""
    tracemalloc.start()
    try:
        part = codec.CodedPart.parse(forged, len(forged))
        assert len(memoryview(part.decode(forged))) == part.layout.nbytes
    except ChunkCorrupt:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 * len(PART.data) + (8 << 20)


@pytest.mark.parametrize("name", ["medium", "lossless"])
def test_every_number_of_the_index_forged(name: str) -> None:
    file = CODED[name]
    size = 8 + int.from_bytes(file[:8], "little")
    index = file[size : parse(file).data_start]
    for at in range(0, len(index), 4):
        for value in (0, 1, 2, 3, 7, 8, 24, 31, 32, 64, 255, 4096, 65535, 1 << 31, (1 << 32) - 1):
            refused_or_harmless(resealed(file, index[:at] + value.to_bytes(4, "little") + index[at + 4 :]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_several_numbers_of_the_index_forged(data: st.DataObject) -> None:
    file = CODED[data.draw(st.sampled_from(["medium", "lossless"]))]
    size = 8 + int.from_bytes(file[:8], "little")
    index = bytearray(file[size : parse(file).data_start])
    for _ in range(data.draw(st.integers(2, 4))):
        at = data.draw(st.integers(0, len(index) // 4 - 1)) * 4
        index[at : at + 4] = data.draw(st.integers(0, 512) | st.integers(0, (1 << 32) - 1)).to_bytes(4, "little")
    refused_or_harmless(resealed(file, bytes(index)))


def attacks() -> dict[str, bytes]:
    """Headers that are not ours."""
    file = CODED["medium"]
    size = 8 + int.from_bytes(file[:8], "little")
    text = file[8:size].rstrip()

    def framed(body: bytes) -> bytes:
        length = -(-(8 + len(body)) // 64) * 64
        return (length - 8).to_bytes(8, "little") + body.ljust(length - 8) + file[size:]

    return {
        "length 2**63": (1 << 63).to_bytes(8, "little") + file[8:],
        "length 0": bytes(8) + file[8:],
        "not aligned": (size - 9).to_bytes(8, "little") + file[8:],
        "empty object": framed(b"{}"),
        "depth": framed(b"[" * 60000),
        "not ASCII": framed(text.replace(b"medium", "médium".encode())),
        "a hole": framed(text.replace(b'"data_offsets":[0,', b'"data_offsets":[1,')),
        "other codec": framed(text.replace(b'"kvfs.codec":"1"', b'"kvfs.codec":"2"')),
        "other transform": framed(text.replace(b'"kvfs.transform":"none"', b'"kvfs.transform":"pca"')),
        "unknown level": framed(text.replace(b"cachegen-medium", b"cachegen-middle")),
        "a field twice": framed(text.replace(b'"kvfs.codec":"1"', b'"kvfs.codec":"1","kvfs.codec":"1"')),
        "zeros after the text": framed(text + bytes(8)),
    }


@pytest.mark.parametrize("what", attacks())
def test_attacks(what: str) -> None:
    with pytest.raises(ChunkCorrupt):
        parse(attacks()[what])


def test_memory_stays_within_the_chunk_and_8_mib() -> None:
    big = raw_part(GroupKind("full", tuple(range(24)), 1, 256, 256))
    file = big.encode("medium")
    tracemalloc.start()
    part = parse(file)
    data = part.decode(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data) + (8 << 20)


def test_float8_in_an_exact_namespace() -> None:
    raw = raw_part(tokens=64, **FLOAT8)
    file = raw.encode("lossless")
    assert bytes(parse(file).decode(file)) == raw.data
    assert len(file) < len(raw.data)


def test_asking_for_another_part_names_the_field() -> None:
    part, meta = parse(CODED["medium"]), PART.header.meta
    part.expect(PART.manifest, meta.key, meta.part)
    fidelity = replace(PART.manifest, fidelity="exact")
    for manifest, key, name, reason in (
        (fidelity, meta.key, meta.part, "wrong-ns"),
        (PART.manifest, bytes(32), meta.part, "wrong-key"),
        (PART.manifest, meta.key, PartId("full", 1), "wrong-part"),
    ):
        with pytest.raises(ChunkCorrupt) as e:
            part.expect(manifest, key, name)
        assert e.value.reason == reason
    narrow = raw_part(GroupKind("full", (0, 1), 2, 64, 64))
    header = narrow.header._replace(meta=narrow.header.meta._replace(ns=PART.manifest.ns))
    with pytest.raises(ChunkCorrupt) as e:
        parse(replace(narrow, header=header).encode("low")).expect(PART.manifest, meta.key, meta.part)
    assert e.value.reason == "wrong-shape"


def test_unturned_layers_are_left_alone() -> None:
    """Dropping RoPE from one layer changes that layer's streams and no other."""
    assert PART.rope is not None
    none = replace(PART, rope=replace(PART.rope, layers=frozenset())).encode("medium")
    some = parse(CODED["medium"])
    bounds, size = some.index.bounds + some.data_start, len(CODED["medium"])
    last = CODED["medium"][bounds[-2] : size]
    assert none.endswith(last)
    assert not none.endswith(CODED["medium"][bounds[-3] : size])
