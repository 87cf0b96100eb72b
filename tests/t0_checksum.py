"""Checksums of the native extension, with PyPI's xxhash as the oracle."""

from __future__ import annotations

import errno
import mmap
import os
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash

from kvfs import _native
from tests.paged import every_isa

if TYPE_CHECKING:
    from pathlib import Path


def test_xxh3_equals_the_reference_at_every_length() -> None:
    data = np.random.default_rng(0).bytes(40_000)
    for isa in every_isa():
        for length in [*range(2200), *range(2200, 40_000 - 64, 577)]:
            piece = memoryview(data)[length % 64 : length % 64 + length]
            assert _native.xxh3_64(piece) == xxhash.xxh3_64_intdigest(piece), (isa, length)


def test_an_unknown_instruction_set_is_refused() -> None:
    assert _native.isa() == _native.ISAS[-1]
    for name in ("sse9", "", 7):
        with pytest.raises((ValueError, TypeError)):
            _native.use_isa(name)  # type: ignore[arg-type]
    assert _native.isa() == _native.ISAS[-1]


def test_sums_are_the_checksums_of_the_pieces() -> None:
    data = np.random.default_rng(0).bytes(10_000)
    bounds = [0, 0, 7, 300, 300, 5000, 10_000]
    want = [xxhash.xxh3_64_intdigest(data[a:b]) for a, b in pairwise(bounds)]
    for dtype in (np.int64, np.uint64):
        assert _native.sums(data, np.array(bounds, dtype)) == np.array(want, "<u8").tobytes()
    assert _native.sums(data, bounds=np.array([4], np.int64)) == b""


@pytest.mark.parametrize(
    "bounds",
    [
        np.array([0, 11], np.int64),
        np.array([-1, 4], np.int64),
        np.array([5, 4], np.int64),
        np.array([0, 2**63 - 1], np.int64),
        np.array([0, 2**64 - 1], np.uint64),
        np.array([], np.int64),
        np.array([0, 5], np.int32),
        np.array([0, 5], np.float64),
        np.array([0, 5], ">i8"),
        np.array([[0, 5]], np.int64),
        np.arange(6, dtype=np.int64)[::2],
        b"12345678",
    ],
)
def test_sums_refuses_bounds_that_make_no_sense(bounds: object) -> None:
    with pytest.raises((ValueError, BufferError)):
        _native.sums(bytes(10), bounds)  # type: ignore[arg-type]


def test_populate_finds_a_file_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(5 * mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        _native.populate(pages)
        _native.populate(memoryview(pages)[100:101])
        _native.populate(b"")
        file.truncate(mmap.PAGESIZE)
        with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
            _native.populate(pages)
