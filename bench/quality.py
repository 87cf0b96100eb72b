"""Rate and distortion of the codec beside its peers, on real models and texts: ``python -m bench.quality``.

For each model and text, the KV of 1,024 tokens is coded by each codec and 224 tokens are predicted from what is left of
it.  Bits count every byte of every file.  The last lines say which of the bounds of docs/benchmarks.md hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.baselines import BASELINES, bf16
from kvfs import codec
from kvfs.cli.probe import Effect, Layers, Probe, Sample
from kvfs.cli.quality import Row
from models import build, texts

if TYPE_CHECKING:
    from collections.abc import Callable

OUT = Path(__file__).parent / "out" / "quality.json"


def probe_texts() -> dict[str, str]:
    """Texts of four kinds, none of which made the codec's tables."""
    library = Path(sysconfig.get_path("stdlib"))
    manual = texts.long_texts()[0]
    return {
        "licence": (Path(__file__).parent.parent / "LICENSE").read_text(),
        "manual": manual[6000:],
        "source": (library / "dataclasses.py").read_text(),
        "docstrings": texts.docstrings((library / "_pydecimal.py").read_text()),
    }


def other(code: Callable, sample: Sample) -> tuple[Layers, float]:
    """KV after another codec, rounded to bfloat16."""
    k, v = ((np.stack([layer[i] for layer in sample.layers]).astype(np.uint32) << 16).view(np.float32) for i in (0, 1))
    k, v, bits = code(k, v)
    k, v = ((bf16(x).view(np.uint32) >> 16).astype(np.uint16) for x in (k, v))
    return list(zip(k, v, strict=True)), bits


def measure(folder: Path, chosen: dict[str, str]) -> dict[str, Row]:
    """A row for each codec."""
    probe, found = Probe(folder), dict[str, list[tuple[float, Effect]]]()
    for text in chosen.values():
        sample = probe.sample(text)
        elements = sum(k.size + v.size for k, v in sample.layers)
        trials = {f"kvfs {x.name}": partial(probe.coded, sample, x) for x in codec.LEVELS.values()}
        trials |= {name: partial(other, code, sample) for name, code in BASELINES.items()}
        found.setdefault("bfloat16", []).append((16.0, probe.effect(sample, sample.layers)))
        for name, trial in trials.items():
            layers, bits = trial()
            if name == "kvfs lossless":
                assert all(np.array_equal(x, y) for x, y in zip(layers, sample.layers, strict=True))
            found.setdefault(name, []).append((bits / elements, probe.effect(sample, layers)))
    return {name: Row.of(results) for name, results in found.items()}


def bounds(rows: dict[str, Row]) -> list[tuple[str, float, float]]:
    """What must hold, as (claim, value, bound): value at most bound."""
    kivi, lmcache = rows["KIVI int4"].kl, rows["CacheGen (LMCache)"].kl
    kvfs = {x: rows[f"kvfs {x}"] for x in codec.LEVELS}
    return [
        ("lossless: bits per element", kvfs["lossless"].bits, 16 / 1.5),
        ("medium: bits per element", kvfs["medium"].bits, 3.3),
        ("medium: KL / KIVI int4's", kvfs["medium"].kl / kivi, 1.25),
        ("low: bits per element", kvfs["low"].bits, 2.8),
        ("low: KL / KIVI int4's", kvfs["low"].kl / kivi, 2.5),
        ("low: KL / CacheGen's (LMCache)", kvfs["low"].kl / lmcache, 0.25),
        ("lowest: bits per element", kvfs["lowest"].bits, 2.1),
        ("lowest: KL / CacheGen's (LMCache)", kvfs["lowest"].kl / lmcache, 0.7),
    ]


def compare(count: int) -> tuple[str, dict[str, dict[str, dict[str, float]]]]:
    """Measure both models on so many texts. Return a report with the bounds, and the figures."""
    folders, report, found = build.Models.at(build.cache_dir()), list[str](), {}
    chosen = dict(list(probe_texts().items())[:count])
    for name, folder in (("SmolLM2-135M", folders.smollm2), ("Gemma-3-270M", folders.gemma)):
        start = time.monotonic()
        rows = measure(folder, chosen)
        found[name] = {codec_name: asdict(row) for codec_name, row in rows.items()}
        report.append(f"\n{name}, {len(chosen)} texts ({', '.join(chosen)}), {time.monotonic() - start:.0f} s\n")
        report.append(f"  {'':28}{'bits':>7}{'ratio':>7}{'KL':>10}{'worst':>10}{'top-1':>8}{'ppl':>8}")
        line = "  {:28}{bits:7.3f}{ratio:7.2f}{kl:10.5f}{worst:10.5f}{top1:8.3f}{perplexity:8.3f}"
        report += [line.format(codec_name, **asdict(row)) for codec_name, row in rows.items()]
        for claim, value, bound in bounds(rows):
            report.append(f"  {'holds' if value <= bound else 'FAILS'}  {claim}: {value:.3f}, at most {bound:.3f}")
    return "\n".join(report), found


def main() -> int:
    """Measure, print, and say by the exit status whether all bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=4, help="how many texts (all four by default)")
    report, found = compare(parser.parse_args().texts)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2) + "\n")
    print(report)
    return int("FAILS" in report)


if __name__ == "__main__":
    sys.exit(main())
