"""The codec's streams: the reference and the native codec at every instruction set write and read the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs import _native
from kvfs.codec import reference, reference_encode, tables
from kvfs.codec.shape import DTYPES, Kind, Section, Shape
from kvfs.errors import ChunkCorrupt
from tests import codec_cases
from tests.codec_cases import Case, case, native_decode, native_encode

if TYPE_CHECKING:
    from collections.abc import Iterator

CASES = {c.name: c for c in codec_cases.cases()}


@pytest.fixture(params=_native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[bytes, list[np.ndarray]]]:
    """What the reference makes of every case, and what it makes of that."""
    found = {}
    for c in CASES.values():
        stream = reference_encode.encode(c.shape, c.steps, c.arrays, c.turns)
        assert stream is not None
        found[c.name] = stream, reference.decode(c.shape, stream, c.turns)
    return found


@pytest.mark.parametrize("name", CASES)
def test_native_and_reference_agree(name: str, isa: str, expected: dict[str, tuple[bytes, list[np.ndarray]]]) -> None:
    c, (stream, arrays) = CASES[name], expected[name]
    assert native_encode(c) == stream
    found = native_decode(c, stream)
    assert not isinstance(found, str)
    for a, b, original in zip(found, arrays, c.arrays, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a[: c.shape.raw_tokens], original[: c.shape.raw_tokens])
        assert not c.shape.lossless or np.array_equal(a, original)


@pytest.mark.parametrize("c", codec_cases.refused(), ids=lambda c: c.name)
def test_what_cannot_be_coded_with_loss_is_refused(c: Case, isa: str) -> None:
    assert native_encode(c) is None
    assert reference_encode.encode(c.shape, c.steps, c.arrays, c.turns) is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_bits_survive_lossless(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    tokens, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 1 << 30))
    shape = Shape(True, dtype, tokens, 0, (Section(Kind.BY_CHANNEL, 24, 24), Section(Kind.BY_TOKEN, 40, 40)))
    kind = np.dtype(f"u{DTYPES[dtype][0]}")
    rng = np.random.default_rng(seed)
    top = 1 << data.draw(st.integers(1, 8 * kind.itemsize))
    arrays = [rng.integers(0, top, (tokens, s.channels), dtype=np.uint64).astype(kind) for s in shape.sections]
    c = Case("any", shape, arrays, None)
    stream = native_encode(c)
    assert stream is not None
    found = native_decode(c, stream)
    assert not isinstance(found, str)
    assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))


def test_two_streams_side_by_side_are_decoded_like_one(isa: str) -> None:
    shape = case("pair").shape
    many = [case("pair", seed=i) for i in range(5)]
    streams = [native_encode(c) for c in many]
    assert all(streams)
    size, at, rows, blob = codec_cases.nbytes(shape), 0, [], b""
    for i, s in enumerate(streams):
        rows.append([at, len(s or b""), 1, i * size, i * size + size // 2])
        blob, at = blob + (s or b""), at + len(s or b"")
    out = bytearray(5 * size)
    turns = np.ascontiguousarray(many[0].turns)
    assert _native.codec_decode(shape.array(), turns, blob, out, np.array(rows)) is None
    for i, (c, s) in enumerate(zip(many, streams, strict=True)):
        alone = reference.decode(shape, s or b"", turns)
        both = codec_cases.separate(shape, out[i * size : (i + 1) * size], c.arrays)
        assert all(np.array_equal(a, b) for a, b in zip(alone, both, strict=True))
    broken = bytearray(blob)
    broken[rows[3][0] + rows[3][1] // 2] ^= 4
    found = _native.codec_decode(shape.array(), turns, broken, out, np.array(rows))
    assert found is not None
    assert found[0] == 3


def damaged(stream: bytes) -> dict[str, bytes]:
    """A stream with each of its fields made wrong."""
    shape = CASES["head 64 from position 0"].shape
    side = 8 + 4 * 128 * 2
    states = side + 4 * 64 + 64 + 4 + 4 * 3
    n_words, n_exceptions = np.frombuffer(stream, np.uint32, 2).tolist()
    exception = states + 128
    words = exception + 6 * n_exceptions
    assert shape.rows == 36
    assert -(-(words + 2 * n_words) // 4) * 4 == len(stream)

    def put(at: int, raw: bytes) -> bytes:
        return stream[:at] + raw + stream[at + len(raw) :]

    return {
        "empty": b"",
        "cut in its counts": stream[:7],
        "cut in its words": stream[:-4],
        "extended": stream + bytes(4),
        "more words than there are": put(0, np.uint32(n_words + 2).tobytes()),
        "2**32 - 1 words": put(0, b"\xff" * 4),
        "fewer words": put(0, np.uint32(n_words - 2).tobytes())[:-4],
        "2**32 - 1 exceptions": put(4, b"\xff" * 4),
        "an infinite mean": put(side, b"\x80\x7f"),
        "a table that is not": put(side + 3 * 64, b"\x18"),
        "table 255": put(side + 4 * 64, b"\xff"),
        "a state too low": put(states, np.uint32(0x7FFF).tobytes()),
        "a state too high": put(states, np.uint32(1 << 31).tobytes()),
        "another state": put(states, np.uint32(0x12345678).tobytes()),
        "a word flipped": put(words + 20, bytes([stream[words + 20] ^ 1])),
        "an exception in no row": put(4, np.uint32(n_exceptions + 2).tobytes())[:exception]
        + np.array([9999, 0, 1] * 2, np.uint16).tobytes() + stream[exception:],
        "an exception in no channel": put(4, np.uint32(n_exceptions + 2).tobytes())[:exception]
        + np.array([0, 128, 1] * 2, np.uint16).tobytes() + stream[exception:],
    }  # fmt: skip


def test_every_kind_of_damage_is_found(isa: str) -> None:
    c = CASES["head 64 from position 0"]
    stream = native_encode(c)
    assert stream is not None
    for what, bad in damaged(stream).items():
        assert isinstance(native_decode(c, bad), str), what
        with pytest.raises(ChunkCorrupt):
            reference.decode(c.shape, bad, c.turns)


@pytest.mark.parametrize("name", ["head 64 from position 0", "lossless", "latent"])
def test_random_damage_never_reaches_outside(name: str, isa: str) -> None:
    """Most damage to words is found; whatever is not, stays in place: the memory around the output keeps its bytes."""
    c, rng = CASES[name], np.random.default_rng(5)
    stream = native_encode(c)
    assert stream is not None
    memory, places = codec_cases.interleave(c.shape, c.arrays)
    guarded = bytearray(b"\x5a" * (len(memory) + 8192))
    rows = np.array([[0, len(stream), 1, *(4096 + p for p in places)]])
    for _ in range(2000):
        bad = bytearray(stream)
        for at in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        _native.codec_decode(c.shape.array(), c.turns, bad, guarded, rows)
    assert guarded[:4096] == guarded[-4096:] == b"\x5a" * 4096


def test_arguments_that_do_not_fit_are_refused() -> None:
    c = CASES["head 64 from position 0"]
    stream = native_encode(c)
    assert stream is not None
    memory, places = codec_cases.interleave(c.shape, c.arrays)
    good = [0, len(stream), 1, *places]
    for column, value in (
        (0, -1),
        (0, 4),
        (1, -4),
        (1, len(stream) + 4),
        (3, -2),
        (3, 1),
        (3, len(memory)),
        (4, 1 << 62),
    ):
        row = good.copy()
        row[column] = value
        with pytest.raises(ValueError, match="stream"):
            _native.codec_decode(c.shape.array(), c.turns, stream, memory, np.array([row]))
    array = c.shape.array()
    for i, value in ((1, 9), (2, 0), (2, 5000), (3, 41), (4, 2), (5, 63), (5, 4096), (6, 8), (7, 60), (8, 40), (9, 7)):
        wrong = array.copy()
        wrong[i] = value
        with pytest.raises(ValueError, match=r"shape|rotation|lie outside"):
            _native.codec_decode(wrong, c.turns, stream, memory, np.array([good]))
    with pytest.raises(ValueError, match="rotation"):
        _native.codec_decode(
            array, c.turns[:-1].copy() if c.turns is not None else None, stream, memory, np.array([good])
        )
    with pytest.raises(ValueError, match="columns"):
        _native.codec_decode(array, c.turns, stream, memory, np.array([good[:-1]]))


# --- what the coders are made of -----------------------------------------------------------------


def test_tables_are_distributions() -> None:
    for i in range(len(tables.LUT)):
        low, freq = tables.frequencies(i)
        assert freq.sum() == tables.SLOTS
        assert freq.min() >= 1
        assert low == (1 - len(tables.LOSSY[i]) if i < tables.FIRST_LOSSLESS else 0)
    assert list(tables.THRESHOLDS) == sorted(tables.THRESHOLDS)


def test_the_c_header_holds_the_tables() -> None:
    from pathlib import Path

    header = Path(_native.__file__).with_name("codec_tables.h")
    assert header.read_text() == tables.c_header()


@pytest.mark.parametrize("position", [0, 1000, 123_456_789, (1 << 32) - 1])
def test_turns_are_those_of_the_reference_and_nearly_exact(position: int) -> None:
    inv_freq = (5e5 ** (-np.arange(48) / 48)).astype(np.float32)
    found = np.frombuffer(_native.codec_rotation(inv_freq, position, 100), np.float32).reshape(100, 2, 48)
    assert np.array_equal(found, reference.rotation(inv_freq, position, 100))
    if position < 1e6:
        angle = np.multiply.outer(position + np.arange(100.0), inv_freq.astype(np.float64))
        assert np.abs(found - np.stack([np.cos(angle), np.sin(angle)], axis=1)).max() < 1e-7


def test_steps_are_eighths_of_octaves() -> None:
    codes = np.arange(257)
    assert np.allclose(reference.step(codes), 2.0 ** ((codes - 128) / 8), rtol=1e-6)
