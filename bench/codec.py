"""Speed of the codec on real KV, beside memcpy and zstd: ``python -m bench.codec``.

A part's file lies in the page cache and is decoded to bfloat16 tensors in memory, RoPE put back, checksums of its
streams verified.  GB/s are those of the raw form, in CPU time of one thread, the best of many runs; two threads are
timed by the clock.  The last lines say which of the bounds of docs/benchmarks.md hold.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from bench.quality import probe_texts
from kvfs import _native, codec
from kvfs.cli.probe import Probe
from models import build

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfs.chunk import PartHeader

OUT = Path(__file__).parent / "out" / "codec.json"
DECODE = {"generic": 0.45, "avx2": 2.2, "avx512": 2.6}
"""GB/s that decoding must reach."""
ENCODE = 0.45
SCALING = 1.8


def best(f: Callable[[], object], seconds: float, clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds of the fastest run."""
    least, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end:
        start = clock()
        f()
        least = min(least, clock() - start)
    return least


def raw_part(folder: Path) -> tuple[PartHeader, bytes, codec.Rope | None]:
    """The second chunk of a text: of the largest part of a model."""
    probe = Probe(folder, prefix=512, continuation=2)
    sample = probe.sample(next(iter(probe_texts().values())))
    header, data = max((p for p in probe.parts(sample.layers) if p[0].meta.position), key=lambda p: len(p[1]))
    return header, data, codec.rope_of(probe.manifest.config, probe.manifest.kind(header.meta.part.kind))


def measure(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """GB/s of everything, by what and how."""
    header, data, rope = raw_part(folder)
    found: dict[str, dict[str, float]] = {"peers": peers(data, seconds)}
    for level in (codec.LEVELS["medium"], codec.LEVELS["lossless"]):
        file = codec.encode_part(header, data, level, rope)
        with tempfile.TemporaryFile() as f:
            f.write(file)
            f.flush()
            with mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as coded:
                found[level.name] = {"ratio": len(data) / len(file)} | speeds(coded, data, seconds)
    return found


def speeds(coded: mmap.mmap, data: bytes, seconds: float) -> dict[str, float]:
    """GB/s of a coded part at every instruction set, and what a second thread brings."""
    part, found, gigabytes, out = codec.CodedPart.parse(coded, len(coded)), {}, len(data) / 1e9, bytearray(len(data))
    shape, steps, places = part.index.shape.array(), part.level.steps or (0, 0), part.index.places

    def encode() -> None:  # as encode_part() does, without the decoding that checks it
        _native.codec_encode(shape, steps, part.turns(), data, places)

    for isa in _native.ISAS:
        _native.use_isa(isa)
        found[f"decode {isa}"] = gigabytes / best(lambda: part.decode(coded, out), seconds)
        found[f"encode {isa}"] = gigabytes / best(encode, seconds)
    return found | {"threads": scaling(part, coded, seconds)}


def scaling(part: codec.CodedPart, coded: mmap.mmap, seconds: float) -> float:
    """How much faster two threads decode than one, each on parts of its own."""

    def several(buffer: bytearray) -> None:
        for _ in range(8):
            part.decode(coded, buffer)

    outs = [bytearray(part.layout.nbytes) for _ in range(2)]
    one = best(lambda: several(outs[0]), seconds, time.perf_counter)
    with ThreadPoolExecutor(2) as pool:
        two = best(lambda: list(pool.map(several, outs)), seconds, time.perf_counter)
    return 2 * one / two


def peers(data: bytes, seconds: float) -> dict[str, float]:
    """memcpy, and zstd at its two common levels, on the same bytes."""
    import zstandard

    out = bytearray(len(data))

    def copy() -> None:
        out[:] = data

    found = {"memcpy": len(data) / 1e9 / best(copy, seconds)}
    for level in (1, 3):
        coder, decoder = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        packed = coder.compress(data)
        found[f"zstd -{level} ratio"] = len(data) / len(packed)
        found[f"zstd -{level} encode"] = len(data) / 1e9 / best(lambda coder=coder: coder.compress(data), seconds)
        found[f"zstd -{level} decode"] = (
            len(data) / 1e9 / best(lambda decoder=decoder, packed=packed: decoder.decompress(packed), seconds)
        )
    return found


def bounds(found: dict[str, dict[str, float]]) -> list[tuple[str, float, float]]:
    """What must hold, as (claim, value, bound): value at least bound."""
    medium, fastest = found["medium"], _native.ISAS[-1]
    claims = [(f"decode {isa}", medium[f"decode {isa}"], DECODE[isa]) for isa in _native.ISAS if isa in DECODE]
    # Not the baseline: what it makes of the lossless level is the compiler's.
    claims += [
        (f"decode lossless {isa}", found["lossless"][f"decode {isa}"], DECODE[isa])
        for isa in DECODE.keys() & set(_native.ISAS[1:])
    ]
    claims += [(f"encode {x}", found[x][f"encode {fastest}"], ENCODE) for x in ("medium", "lossless")]
    return [*claims, ("two threads / one", medium["threads"], SCALING)]


def compare(seconds: float) -> tuple[str, dict[str, dict[str, dict[str, float]]]]:
    """Measure both models, each figure for so many seconds. Return a report with the bounds, and the figures."""
    folders, report, found = build.Models.at(build.cache_dir()), list[str](), {}
    for name, folder in (("SmolLM2-135M", folders.smollm2), ("Gemma-3-270M", folders.gemma)):
        found[name] = measure(folder, seconds)
        report += ["", f"{name}: GB/s of raw KV per core", ""]
        for what, row in found[name].items():
            report.append(f"  {what:9} " + "  ".join(f"{k} {v:.2f}" for k, v in row.items()))
        for claim, value, bound in bounds(found[name]):
            report.append(f"  {'holds' if value >= bound else 'FAILS'}  {claim}: {value:.2f}, at least {bound:.2f}")
    return "\n".join(report), found


def main() -> int:
    """Measure, print, and say by the exit status whether all bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    report, found = compare(parser.parse_args().seconds)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2) + "\n")
    print(report)
    return int("FAILS" in report)


if __name__ == "__main__":
    sys.exit(main())
