"""Copies of the native extension between files and paged KV, with numpy indexing as the oracle."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs import _native
from tests.paged import BLOCKS, LAYOUTS, Cache, Case, every_isa, scatter

if TYPE_CHECKING:
    from pathlib import Path

# -------------------------------------------------------------------------------------------------------- copies


def check_transfers(case: Case, first: int, last: int, path: Path) -> None:
    """Rows first..last by load() with and without checksums, and back by gather()."""
    before, images = case.images(), case.expect(first, last)
    moved = sum(t[:, first:last].nbytes for t in case.tensors)
    where = (case.ops, case.tables, first, last, case.position)
    with case.file(path) as fd:
        for sums in (None, case.sums):
            token = _native.CancelToken()
            assert _native.load(fd, *where, sums, token) == moved == token.progress
            case.assert_images(images)
            if sums is None:
                case.restore(before)
    out = np.full(len(case.payload), 0xA5, np.uint8)
    assert _native.gather(*where, out) == moved
    np.testing.assert_array_equal(out, case.gathered(first, last, 0xA5))


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_and_gather_equal_numpy(layout: str, itemsize: int, tmp_path: Path) -> None:
    for _ in every_isa() if itemsize == 2 else "x":  # only 2-byte elements are copied by SIMD
        for seed in range(8):
            case = Case.make(layout, itemsize, seed)
            check_transfers(case, 0, case.tokens, tmp_path / "part")
            check_transfers(case, case.tokens // 3, case.tokens - case.tokens // 4, tmp_path / "part")
            check_transfers(case, 0, 0, tmp_path / "part")


def test_every_alignment_of_a_transpose_is_written_and_nothing_else() -> None:
    for block, dim in ((128, 40), (96, 64), (33, 9), (16, 36), (16, 9), (8, 40)):
        cache = Cache.make("transposed", 1, block, dim, 2)
        tensor = np.random.default_rng(0).integers(0, 2**16, (1, block, dim), np.uint16)
        case = Case([cache], [tensor], np.array([cache.op(0, block)]), np.array([[3]]), 0)
        for _ in every_isa():
            for first in range(0, block, 5):
                for last in (first + 1, (first + block) // 2, block):
                    images = case.expect(first, last)
                    scatter(tensor, case.ops, case.tables, first, last, 0, _native.CancelToken())
                    case.assert_images(images)


@pytest.mark.parametrize("tokens", [11_000, 70_000])
def test_tensors_larger_than_the_buffer_come_in_pieces(tokens: int, tmp_path: Path) -> None:
    """11,000 rows of 256 bytes: one head a piece; 70,000: more than the buffer holds, also to verify."""
    rng = np.random.default_rng(0)
    cache = Cache.make("transposed", 3, 8192, 128, 2)
    tensor = rng.integers(0, 2**16, (3, tokens, 128), np.uint16)
    ops, tables = np.array([cache.op(64, tokens)], np.int64), np.arange(1, BLOCKS + 1, dtype=np.int64)[None] % BLOCKS
    case = Case([cache], [tensor], ops, tables, 1000)
    last = min(tokens, 8 * 8192 - 1000)
    with case.file(tmp_path / "part") as fd:
        for first, sums in ((0, None), (0, case.sums), (77, None), (77, case.sums)):
            cache.memory[:] = 0
            moved = _native.load(fd, ops, tables, first, last, 1000, sums, _native.CancelToken())
            assert moved == (last - first) * 3 * 256
            flat = cache.view[1:].transpose(1, 0, 2, 3).reshape(3, -1, 128)
            np.testing.assert_array_equal(flat[:, 1000 + first : 1000 + last], tensor[:, first:last])
            assert not flat[:, : 1000 + first].any()
            assert not flat[:, 1000 + last :].any()


def test_null_blocks_are_skipped_by_load_and_refused_by_gather(tmp_path: Path) -> None:
    case = Case.make("transposed", 2, seed=3, tokens=100)
    case.tables[1, case.tables.shape[1] // 2] = 0
    images = case.expect(0, case.tokens)
    where = (case.ops, case.tables, 0, case.tokens, case.position)
    with case.file(tmp_path / "part") as fd:
        moved = _native.load(fd, *where, case.sums, _native.CancelToken())
    case.assert_images(images)
    assert 0 < moved < sum(t.nbytes for t in case.tensors)
    out = bytearray(len(case.payload))
    with pytest.raises(ValueError, match="op 1: rows to gather lie in the null block"):
        _native.gather(*where, out)
    assert not any(out)


# ------------------------------------------------------------------------------------------------------ failures


def test_a_bad_checksum_names_the_head_and_nothing_of_its_tensor_is_written(tmp_path: Path) -> None:
    case = Case.make("transposed", 2, seed=5)
    heads = case.tensors[0].shape[0]
    assert heads > 1
    sums = bytearray(case.sums)
    sums[8 * (2 * heads - 1)] ^= 1
    images = [case.expect(0, case.tokens)[0], case.images()[1]]
    token = _native.CancelToken()
    with case.file(tmp_path / "part") as fd, pytest.raises(ValueError, match="checksum") as caught:
        _native.load(fd, case.ops, case.tables, 0, case.tokens, case.position, sums, token)
    assert caught.value.args == ("checksum", 1, heads - 1)
    case.assert_images(images)
    assert token.progress == case.tensors[0].nbytes


def test_a_file_cut_short_is_an_io_error_and_its_last_tensor_stays_unwritten(tmp_path: Path) -> None:
    case = Case.make("heads-tokens", 2, seed=2)
    images = [case.expect(0, case.tokens)[0], case.images()[1]]
    where = (case.ops, case.tables, 0, case.tokens, case.position)
    for sums in (None, case.sums):
        with case.file(tmp_path / "part") as fd:
            os.truncate(tmp_path / "part", len(case.payload) - 1)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                _native.load(fd, *where, sums, _native.CancelToken())
        case.assert_images(images)


def test_errors_of_the_read_come_through(tmp_path: Path) -> None:
    case = Case.make("heads-tokens", 2, seed=2)
    pipe = os.pipe()
    folder = os.open(tmp_path, os.O_RDONLY)
    for fd, code in ((-1, errno.EBADF), (folder, errno.EISDIR), (pipe[0], errno.ESPIPE)):
        with pytest.raises(OSError, match=os.strerror(code)):
            _native.load(fd, case.ops, case.tables, 0, 1, case.position, None, _native.CancelToken())
    for fd in (*pipe, folder):
        os.close(fd)


def test_a_block_index_outside_the_table_stops_everything() -> None:
    case = Case.make("heads-tokens", 2, seed=4)
    images = case.images()
    where = (case.ops, np.ascontiguousarray(case.tables[:, :-1]), 0, case.tokens, case.position)
    with pytest.raises(IndexError):
        scatter(case.payload, *where, _native.CancelToken())
    with pytest.raises(IndexError):
        _native.gather(*where, bytearray(len(case.payload)))
    case.assert_images(images)


BEYOND = [(0, 10_000_000), (1, 2**40), (2, 2**40), (3, 2**40)]
"""Beyond the end of memory, while a file may be so long: that it is not shows when it is read."""
HOSTILE = {
    "negative": [(column, -1) for column in range(12)],
    "zero": [(column, 0) for column in (1, 2, 3, 4, 5, 11)],
    "huge": [(column, value) for column in range(12) for value in (2**63 - 1, 2**57) if column not in {7, 8, 9}],
    "odd": [*BEYOND, (4, 3), (6, 2**56), (7, 2**57), (10, 2)],
}


@pytest.mark.parametrize(("column", "value"), [pair for pairs in HOSTILE.values() for pair in pairs])
def test_absurd_ops_are_refused(column: int, value: int) -> None:
    case = Case.make("transposed", 2, seed=6)
    images = case.images()
    case.ops[1, column] = value
    where = (case.ops, case.tables, 0, case.tokens, case.position)
    if (column, value) not in BEYOND:
        with pytest.raises(ValueError, match="op 1: "):
            scatter(case.payload, *where, _native.CancelToken())
    with pytest.raises(ValueError, match="op 1: "):
        _native.gather(*where, bytearray(len(case.payload)))
    case.assert_images(images)


@pytest.mark.parametrize(
    "change",
    [
        {"ops": np.zeros((1, 11), np.int64)},
        {"ops": np.zeros(12, np.int64)},
        {"ops": np.zeros((1, 12), np.float64)},
        {"ops": np.zeros((1, 24), np.int64)[:, ::2]},
        {"ops": [[0] * 12]},
        {"tables": np.zeros(4, np.int64)},
        {"tables": np.full((2, 40), -1, np.int64)},
        {"tables": np.full((2, 40), 2**62, np.int64)},
        {"tables": np.ones((2, 40), np.int32)},
        {"tables": np.zeros((0, 0), np.int64)},
        {"first": -1},
        {"first": 10},
        {"last": 10**6},
        {"last": 5000, "tables": np.zeros((2, 5000), np.int64)},
        {"last": 2**63 - 1},
        {"last": 2**64},
        {"position": -1},
        {"position": 2**62},
        {"sums": b"short"},
        {"sums": 7},
        {"token": None},
        {"fd": "name"},
    ],
)
def test_absurd_arguments_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    case = Case.make("transposed", 2, seed=6)
    images = case.images()
    with case.file(tmp_path / "part") as fd:
        arguments = {"fd": fd, "ops": case.ops, "tables": case.tables, "first": 0, "last": 1, "sums": None}
        arguments |= {"position": case.position, "token": _native.CancelToken()} | change
        with pytest.raises((ValueError, TypeError, BufferError, OverflowError, IndexError)):
            _native.load(**arguments)  # type: ignore[arg-type]
    case.assert_images(images)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_numbers_crash_it(data: st.DataObject) -> None:
    """With all blocks null no address is used, so any numbers may be tried."""
    number = st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**53, 2**56, 2**63 - 1, -1, -(2**63)]))
    ops = np.array(data.draw(st.lists(st.lists(number, min_size=12, max_size=12), max_size=3)), np.int64)
    tables = np.zeros((data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))), np.int64)
    fd = os.memfd_create("kvfs-empty")
    ops = ops.reshape(-1, 12)
    first, last, position = data.draw(number), data.draw(number), data.draw(number)
    sums = data.draw(st.sampled_from([None, b"", bytes(8), bytes(800)]))
    token = _native.CancelToken()
    for call in (
        lambda: scatter(bytes(1000), ops, tables, first, last, position, token),
        lambda: _native.gather(ops, tables, first, last, position, bytearray(1000)),
        lambda: _native.load(fd, ops, tables, first, last, position, sums, token),
    ):
        try:
            assert call() == 0  # type: ignore[no-untyped-call]
        except (ValueError, IndexError, OSError, MemoryError):
            pass
    os.close(fd)


# ------------------------------------------------------------------------------------------------------ cancelling


def test_a_token_counts_who_is_inside() -> None:
    token = _native.CancelToken()
    assert (token.cancelled, token.progress) == (False, 0)
    with pytest.raises(RuntimeError):
        token.release()
    assert token.acquire()
    assert token.acquire()
    token.release()
    thread = threading.Thread(target=token.cancel)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert token.cancelled
    assert not token.acquire()
    token.release()
    thread.join()
    token.cancel()
    token.add_progress(5)
    with pytest.raises(ValueError, match="progress"):
        token.add_progress(-1)
    assert token.progress == 5
    with pytest.raises(TypeError):
        _native.CancelToken(1)  # type: ignore[call-arg]


def test_nothing_is_read_or_written_after_cancel(tmp_path: Path) -> None:
    case = Case.make("transposed", 2, seed=7)
    images = case.images()
    token = _native.CancelToken()
    token.cancel()
    where = (case.ops, case.tables, 0, case.tokens, case.position)
    with pytest.raises(InterruptedError):
        scatter(case.payload, *where, token)
    with pytest.raises(InterruptedError):
        _native.load(-1, *where, None, token)
    case.assert_images(images)


@pytest.mark.parametrize("verified", [False, True])
def test_no_byte_lands_after_cancel_returned(verified: bool, tmp_path: Path) -> None:
    """A load that takes long is cancelled at a random moment; a canary written then must survive."""
    case = Case.make("transposed", 2, seed=8, tokens=150)
    ops, sums = np.tile(case.ops, (20_000, 1)), case.sums * 20_000 if verified else None
    rng = np.random.default_rng()
    with case.file(tmp_path / "part") as fd:
        for _ in range(10):
            token, raised = _native.CancelToken(), threading.Event()

            def loop(token: _native.CancelToken = token, raised: threading.Event = raised) -> None:
                try:
                    _native.load(fd, ops, case.tables, 0, case.tokens, case.position, sums, token)
                except InterruptedError:
                    raised.set()

            thread = threading.Thread(target=loop)
            thread.start()
            while token.progress == 0:
                time.sleep(0)
            time.sleep(rng.random() / 100)
            token.cancel()
            progress = token.progress
            for cache in case.caches:
                cache.memory[:] = 0xA5
            thread.join()
            assert raised.is_set()
            assert token.progress == progress
            assert all((cache.memory == 0xA5).all() for cache in case.caches)
