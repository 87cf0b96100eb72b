"""Damaged streams by the million, with sanitizers on; and damaged files whose checksums have been made right."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from kvfs import _native

CASES = 1_000_000
SOURCES = ("codec_tables.c", "codec_rope.c", "codec_encode.c", "codec_decode.c")


@pytest.mark.slow
def test_a_million_damaged_streams(tmp_path: Path) -> None:
    compiler, native = shutil.which("gcc") or shutil.which("cc"), Path(_native.__file__).parent
    if compiler is None or not (native / SOURCES[0]).exists():
        pytest.skip("no C compiler, or installed without sources")
    program = tmp_path / "codec_fuzz"
    subprocess.run(
        [compiler, "-O1", "-g", "-std=c11", "-ffp-contract=off", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all", f"-I{native}", f"-I{sysconfig.get_path('include')}",
         *(native / s for s in SOURCES), Path(__file__).parent / "fuzz" / "codec_fuzz.c", "-o", program],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program, str(CASES)], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = [int(word) for word in done.stdout.replace(",", "").split() if word.isdigit()]
    assert counts[0] == CASES
    assert all(counts[1:]), done.stdout
