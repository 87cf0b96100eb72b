"""The GPU kernel without a GPU: its text compiles for every architecture, and its lanes, run on the CPU one after the
other, give the bytes of the other decoders."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvfs import _native
from kvfs.codec import cuda, reference
from tests import codec_cases
from tests.codec_cases import Case, native_encode

if TYPE_CHECKING:
    from collections.abc import Callable

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
CASES = {c.name: c for c in codec_cases.cases()}
HARNESS = """
#include "warp.h"
int emulate(const CodecShape *shape, const CodecTask *task, const uint8_t *symbols, const uint32_t *frequencies,
            int32_t *row)
{
    const CodecWarpTables tables = {symbols, frequencies};
    return codec_warp(shape, task, &tables, row);
}
"""


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("warp")
    (folder / "harness.c").write_text(HARNESS)
    includes = [x for x in cuda.kernel_options() if x.startswith("-I")]
    subprocess.run(
        [compiler, "-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover", "-static-libubsan", "-std=c11",
         "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *includes, "harness.c",
         "-o", "warp.so"],
        cwd=folder, check=True,
    )  # fmt: skip
    function = ctypes.CDLL(str(folder / "warp.so")).emulate
    function.argtypes = [ctypes.c_void_p] * 5
    return function


def warp_decode(
    emulate: Callable[..., int], c: Case, stream: bytes, rows: range, position: int = 37
) -> tuple[int, list]:
    """Decode into paged memory of 16 tokens a block; returns the error, and each section's tokens in order.  Block 0 is
    null, and tokens outside ``rows`` must come back as they were."""
    block_size, nbytes = 16, c.arrays[0].itemsize
    blocks = -(-(position + c.shape.tokens) // block_size)
    table = np.random.default_rng(3).permutation(blocks).astype(np.int64) + 1
    table[(position + c.shape.tokens // 2) // block_size] = 0
    task, pages = np.zeros(1, cuda.TASK), []
    coded = np.frombuffer(stream + bytes(-len(stream) % 4), np.uint8).copy()
    turns = None if c.turns is None else np.ascontiguousarray(c.turns)
    for i, s in enumerate(c.shape.sections):
        pages.append(np.full((blocks + 1, block_size, s.channels + 8 // nbytes), 0xA5, f"u{nbytes}"))
        task["out"][0, i], task["block"][0, i], task["token"][0, i] = (
            pages[i].ctypes.data,
            pages[i].strides[0],
            pages[i].strides[1],
        )
    task["stream"], task["size"], task["table"] = coded.ctypes.data, len(stream), table.ctypes.data
    task["turns"] = 0 if turns is None else turns.ctypes.data
    task["block_size"], task["position"], task["first"], task["last"] = block_size, position, rows.start, rows.stop
    symbols, frequencies = cuda.warp_tables(c.shape.lossless)
    row, shape = np.zeros(c.shape.channels, np.int32), cuda.shape_struct(c.shape)
    error = emulate(*(x.ctypes.data for x in (shape, task, symbols, frequencies, row)))
    out = []
    for page, s in zip(pages, c.shape.sections, strict=True):
        at = position + np.arange(c.shape.tokens)
        block = table[at // block_size]
        found = page[block, at % block_size, : s.channels].astype(np.int64)
        found[block == 0] = -1
        out.append(found)
        written = np.zeros(page.shape, bool)
        inside = np.isin(np.arange(c.shape.tokens), rows) & (block != 0)
        written[block[inside], at[inside] % block_size, : s.channels] = True
        assert (page[~written] == 0xA5).all()
    return error, out


@pytest.mark.parametrize("name", CASES)
def test_a_warp_gives_the_bytes_of_the_others(name: str, emulate: Callable[..., int]) -> None:
    c = CASES[name]
    stream = native_encode(c)
    assert stream is not None
    tokens = c.shape.tokens
    for rows in (range(tokens), range(min(2, tokens - 1), tokens), range(tokens // 3, 2 * tokens // 3)):
        error, found = warp_decode(emulate, c, stream, rows)
        assert error == 0
        for a, b in zip(found, reference.decode(c.shape, stream, c.turns), strict=True):
            there = a[rows.start : rows.stop]
            assert np.array_equal(there, np.where(there < 0, -1, b[rows.start : rows.stop].astype(np.int64)))


@pytest.mark.parametrize("name", ["head 64 from position 0", "lossless", "latent"])
def test_a_warp_finds_damage_as_the_others_do(name: str, emulate: Callable[..., int]) -> None:
    c, rng, seen = CASES[name], np.random.default_rng(6), set()
    stream = native_encode(c)
    assert stream is not None
    for _ in range(300):
        bad = bytearray(stream[: len(stream) - 4 * rng.integers(0, 3)])
        for at in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        error, _ = warp_decode(emulate, c, bytes(bad), range(c.shape.tokens))
        expected = codec_cases.native_decode(c, bytes(bad))
        assert (error != 0) == isinstance(expected, str)
        seen.add(error)
    assert len(seen) > 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nvcc_compiles_the_kernel(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "decode.cu"
    source.write_text(cuda.kernel_source())
    options = [x for x in cuda.kernel_options() if x != "--fmad=false"]
    done = subprocess.run(
        [nvcc, "-cubin", f"-arch={arch}", "--Werror", "all-warnings", *options, source, "-o", tmp_path / "k.cubin"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def nvrtc() -> ctypes.CDLL | None:
    """The NVRTC library that pip or the system brought."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    for path in [p for folder in folders for p in folder.glob("*/lib/libnvrtc.so.*")]:
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # else it looks for them on the system's path alone
            ctypes.CDLL(str(builtins))
        return ctypes.CDLL(str(path))
    try:
        return ctypes.CDLL("libnvrtc.so")
    except OSError:
        return None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nvrtc_compiles_the_kernel(arch: str) -> None:
    library = nvrtc()
    if library is None:
        pytest.skip("no NVRTC")
    program, log = ctypes.c_void_p(), ctypes.create_string_buffer(1 << 16)
    assert (
        library.nvrtcCreateProgram(ctypes.byref(program), cuda.kernel_source().encode(), b"decode.cu", 0, None, None)
        == 0
    )
    options = [x.encode() for x in (*cuda.kernel_options(), f"--gpu-architecture={arch}")]
    result = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert result == 0, log.value.decode()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_the_bytes_of_the_others(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    c = CASES[name]
    stream = native_encode(c)
    assert stream is not None
    task = np.zeros(1, cuda.TASK)
    coded, table = (
        cupy.asarray(np.frombuffer(stream, np.uint8)),
        cupy.arange(1, 1 + -(-c.shape.tokens // 16), dtype="i8"),
    )
    turns = None if c.turns is None else cupy.asarray(np.ascontiguousarray(c.turns))
    pages = [cupy.zeros((len(table) + 1, 16, s.channels), c.arrays[0].dtype) for s in c.shape.sections]
    for i, page in enumerate(pages):
        task["out"][0, i], task["block"][0, i], task["token"][0, i] = page.data.ptr, page.strides[0], page.strides[1]
    task["stream"], task["size"], task["table"], task["block_size"] = coded.data.ptr, len(stream), table.data.ptr, 16
    task["turns"], task["last"] = 0 if turns is None else turns.data.ptr, c.shape.tokens
    cuda.decode(c.shape, task)
    for page, s, expected in zip(pages, c.shape.sections, reference.decode(c.shape, stream, c.turns), strict=True):
        found = cupy.asnumpy(page)[1:].reshape(-1, s.channels)[: c.shape.tokens]
        assert np.array_equal(found, expected)


def test_shape_and_task_are_laid_out_as_in_c(emulate: Callable[..., int]) -> None:
    assert cuda.TASK.itemsize == 8 * 3 + 8 * 6 + 8 + 16
    assert cuda.shape_struct(CASES["latent"].shape).nbytes == 80
    assert len(_native.ISAS) >= 1
