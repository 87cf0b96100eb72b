"""Coded parts into paged KV by one native call: the bits of decoding and scattering, and nothing that is damaged."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvfs import _native
from kvfs.codec import CodedPart
from kvfs.identity import GroupKind
from tests.codec_parts import KIND, LATENT, Raw, raw_part
from tests.paged import BLOCKS, Cache, every_isa, scatter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 64
LONG = GroupKind("full", tuple(range(8)), 1, 128, 128)
"""Several reads if lossless."""
SHAPES = {
    "plain": (KIND, {}), "long": (LONG, {}), "three heads": (GroupKind("swa128", (2, 5), 24, 80, 80), {}),
    "one head": (GroupKind("full", (2, 5, 6), 1, 64, 64), {}),
    "latent": (LATENT, {}), "latent without RoPE": (LATENT, {"rope": False}),
    "half": (KIND, {"dtype": "F16"}), "first tokens": (KIND, {"position": 0}), "short": (KIND, {"tokens": 40}),
}  # fmt: skip


class Bed:
    """Paged KV for a part, K transposed as vLLM's CPU backend has it, and the part's file."""

    def __init__(self, raw: Raw, level: str, path: Path) -> None:
        self.raw, self.blob = raw, raw.encode(level)
        path.write_bytes(self.blob)
        self.path, self.part = path, CodedPart.parse(self.blob, len(self.blob))
        self.caches, rows = [], []
        for i, t in enumerate(raw.header.layout.tensors):
            shape = t.shape if len(t.shape) == 3 else (1, *t.shape)
            cache = Cache.make(
                "heads-tokens" if i % 2 else "transposed", shape[0], BLOCK, shape[2], t.nbytes // np.prod(shape)
            )
            self.caches.append(cache)
            rows.append(cache.op(t.start, shape[1]))
        self.ops = np.array(rows)
        self.position = raw.header.meta.position
        blocks = np.random.default_rng(0).permutation(np.arange(1, BLOCKS))
        self.tables = np.zeros((1, self.position // BLOCK + len(blocks)), np.int64)
        self.tables[0, self.position // BLOCK :] = blocks
        self.clear()

    def clear(self) -> None:
        for cache in self.caches:
            cache.memory[:] = 0xA5

    def images(self) -> list[bytes]:
        return [cache.memory.tobytes() for cache in self.caches]

    @contextlib.contextmanager
    def arguments(self, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            yield self.part.arguments(fd, self.ops, first, last)
        finally:
            os.close(fd)

    def load(self, first: int, last: int, token: _native.CancelToken | None = None) -> int:
        with self.arguments(first, last) as part:
            return _native.load_coded([part], self.tables, token or _native.CancelToken())

    def expected(self, first: int, last: int) -> list[bytes]:
        """What decoding and scattering leave."""
        self.clear()
        data = self.part.decode(self.blob)
        scatter(data, self.ops, self.tables, first, last, self.position, _native.CancelToken())
        found = self.images()
        self.clear()
        return found


@pytest.mark.parametrize("level", ["lossless", "medium", "lowest"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_bits_are_those_of_decoding_and_scattering(name: str, level: str, tmp_path: Path) -> None:
    kind, more = SHAPES[name]
    bed = Bed(raw_part(kind, **more), level, tmp_path / "part")
    tokens = bed.raw.header.meta.tokens
    for _ in every_isa():
        for first, last in ((0, tokens), (3, tokens - 7), (tokens - 1, tokens), (5, 5)):
            images = bed.expected(first, last)
            token = _native.CancelToken()
            assert bed.load(first, last, token) == token.progress == (last - first) * len(bed.raw.data) // tokens
            assert bed.images() == images


def test_several_parts_in_a_call(tmp_path: Path) -> None:
    beds = [Bed(raw_part(KIND, seed=i), "medium", tmp_path / str(i)) for i in range(3)]
    images = [bed.expected(0, 256) for bed in beds]
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(bed.arguments(0, 256)) for bed in beds]
        assert _native.load_coded(parts, beds[0].tables, _native.CancelToken()) == 3 * len(beds[0].raw.data)
    assert [bed.images() for bed in beds] == images
    assert _native.load_coded([], beds[0].tables, _native.CancelToken()) == 0


def test_what_is_damaged_is_named_and_what_comes_before_it_is_there(tmp_path: Path) -> None:
    good, bad = (Bed(raw_part(LONG, seed=i, fidelity="exact"), "lossless", tmp_path / str(i)) for i in range(2))
    layer, start = 6, bad.part.data_start
    damaged = bytearray(bad.blob)
    damaged[start + int(bad.part.index.bounds[layer]) + 100] ^= 1
    bad.path.write_bytes(damaged)
    images = good.expected(0, 256), bad.expected(0, 256)
    with (
        good.arguments(0, 256) as one,
        bad.arguments(0, 256) as two,
        pytest.raises(ValueError, match="checksum") as caught,
    ):
        _native.load_coded([one, two, one], good.tables, _native.CancelToken())
    assert caught.value.args == ("checksum", layer, 0, 1)
    assert good.images() == images[0]
    assert bad.images()[0] == images[1][0]  # layers that were read before it
    assert bad.images()[2 * layer :] == [b"\xa5" * len(c.memory) for c in bad.caches[2 * layer :]]


def test_a_stream_that_cannot_be(tmp_path: Path) -> None:
    """Its checksum is right, so only the decoder sees it."""
    bed = Bed(raw_part(GroupKind("full", tuple(range(5)), 24, 64, 64)), "medium", tmp_path / "part")
    index, x = bed.part.index, bytearray(bed.blob)
    stream = 4 * index.heads + 1
    at = bed.part.data_start + int(index.streams[stream][0])
    x[at : at + 4] = b"\xff\xff\xff\x00"
    bed.path.write_bytes(x)
    with bed.arguments(0, 256) as part:
        sums = _native.sums(bytes(x[bed.part.data_start :]), index.bounds)
        with pytest.raises(ValueError, match="stream") as caught:
            _native.load_coded([(*part[:3], sums, *part[4:])], bed.tables, _native.CancelToken())
    assert caught.value.args == ("stream", 4, 1, 0, "truncated")


def test_the_first_layers_are_there_before_the_last_are_read(tmp_path: Path) -> None:
    bed = Bed(raw_part(LONG), "lossless", tmp_path / "part")
    images = bed.expected(0, 256)
    os.truncate(bed.path, len(bed.blob) - 100)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        bed.load(0, 256)
    assert bed.images()[:2] == images[:2]
    assert bed.images()[-1] == b"\xa5" * len(bed.caches[-1].memory)


def test_a_cancelled_load_writes_nothing(tmp_path: Path) -> None:
    bed = Bed(raw_part(), "medium", tmp_path / "part")
    token = _native.CancelToken()
    token.cancel()
    before = bed.images()
    with pytest.raises(InterruptedError):
        bed.load(0, 256, token)
    assert bed.images() == before


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    bed = Bed(raw_part(), "medium", tmp_path / "part")
    index, before = bed.part.index, bed.images()
    with bed.arguments(0, 256) as good:
        streams = index.streams.copy()
        wrong: list[tuple[int, Any]] = [
            (1, -1), (1, 1 << 62), (2, index.bounds[:-1].copy()), (2, index.bounds[::-1].copy()), (2, -index.bounds),
            (3, index.layer_sums[8:]), (4, index.shape.array()[:-1]), (5, b"1234"), (6, streams[:-1].copy()),
            (6, changed(streams, 0, 0, -4)), (6, changed(streams, 0, 1, 1 << 40)), (6, changed(streams, 1, 3, 0)),
            (6, changed(streams, 0, 3, 1 << 40)), (6, changed(streams, 0, 4, int(streams[0, 4]) + 2)),
            (7, bed.ops[:-1].copy()), (7, changed(bed.ops, 0, 2, 255)), (7, changed(bed.ops, 0, 4, 4)),
            (8, 200), (9, 1 << 20), (10, -1),
        ]  # fmt: skip
        for where, value in wrong:
            first = 257 if where == 8 else good[8]
            part = (*good[:where], value, *good[where + 1 :])
            part = (*part[:8], first, *part[9:]) if where == 8 else part
            with pytest.raises((ValueError, IndexError)):
                _native.load_coded([good, part], bed.tables, _native.CancelToken())
            assert bed.images() == before, where
        for parts in (7, [good[:-1]], [list(good)], [None]):
            with pytest.raises((TypeError, ValueError)):
                _native.load_coded(parts, bed.tables, _native.CancelToken())


def changed(array: np.ndarray[Any, Any], row: int, column: int, value: int) -> np.ndarray[Any, Any]:
    out = array.copy()
    out[row, column] = value
    return out
