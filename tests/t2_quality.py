"""``kvfs quality`` and the gate it keeps: what is measured, what passes, and what compaction may then do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from kvfs import codec
from kvfs.cli.quality import Row, passing, quality
from kvfs.codec import gate
from kvfs.errors import ConfigError
from kvfs.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from kvfs.cli.probe import Probe
    from kvfs.identity import Manifest
    from models.build import Models

NS = bytes(range(32))


def rows(*kl: float) -> dict[str, Row]:
    return {name: Row(4, 4, k, k, 1 - k, 10) for name, k in zip(codec.LEVELS, kl, strict=True)}


@pytest.mark.parametrize(
    ("kl", "level"),
    [
        ((0, 0.001, 0.004, 0.009, 0.02), "low"),
        ((0, 0.001, 0.004, 0.009, 0.01), "lowest"),
        ((0, 0.02, 0.004, 0.009, 0.001), "lossless"),  # a level counts only if all finer ones pass
        ((0, float("nan"), 0, 0, 0), "lossless"),
    ],
)
def test_the_coarsest_level_within_the_limits(kl: tuple[float, ...], level: str) -> None:
    assert passing(rows(*kl), max_kl=0.01, min_top1=0.94).name == level
    assert passing(rows(*kl), max_kl=1, min_top1=1).name == "lossless"


def test_the_gate_allows_nothing_lossy_until_told(tmp_path: Path) -> None:
    assert gate.allowed(tmp_path / "none", NS) == (codec.LEVELS["lossless"], False)
    gate.record(tmp_path, NS, codec.level("medium"), {"medium": {"kl": 0.004}})
    gate.record(tmp_path, NS[::-1], codec.level("low"), None)
    assert gate.allowed(tmp_path, NS) == (codec.LEVELS["medium"], False)
    assert gate.allowed(tmp_path, NS[::-1]) == (codec.LEVELS["low"], True)
    wrong: list[object] = [[], {NS.hex(): 1}, {NS.hex(): {"level": "none"}}, {NS.hex(): {"level": 3}}]
    for damage in ("", "{", *map(json.dumps, wrong)):
        (tmp_path / "quality.json").write_text(damage)
        assert gate.allowed(tmp_path, NS) == (codec.LEVELS["lossless"], False)


def test_a_gate_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        gate.record(tmp_path / "file", NS, codec.level("low"), None)


@pytest.mark.slow
def test_a_model_is_measured_and_its_namespaces_noted(tmp_path: Path, models: Models, long_texts: list[str]) -> None:
    from kvfs.cli.probe import Probe

    texts = [tmp_path / f"{i}.txt" for i in (0, 1)]
    for path, text in zip(texts, long_texts, strict=False):
        path.write_text(text[:2000])
    probe = Probe(models.llama, prefix=256, continuation=32)
    store = Store.init(tmp_path / "store")
    lossy, exact = (store.register(m, {"name": "llama", "revision": "1"}) for m in (probe.manifest, exact_twin(probe)))
    store.close()
    arguments = [
        models.llama,
        tmp_path / "store",
        "--prefix",
        256,
        "--continuation",
        32,
        "--max-kl",
        0.5,
        "--min-top1",
        0.1,
    ]
    arguments += [x for path in texts for x in ("--text", path)]
    arguments += ["--plot", tmp_path / "curve.svg", "--plot", tmp_path / "curve.png"]
    done = CliRunner().invoke(quality, [*map(str, arguments), "--json"], catch_exceptions=False)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    levels = report["levels"]
    bits = [levels[name]["bits"] for name in ("raw", *codec.LEVELS)]
    assert bits == sorted(bits, reverse=True)
    assert levels["lossless"]["kl"] == levels["raw"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < levels["high"]["kl"] < levels["lowest"]["kl"]
    assert report["namespaces"] == [lossy.hex()]
    assert gate.allowed(tmp_path / "store" / ".kvfs", lossy) == (codec.level(report["passes"]), False)
    assert gate.allowed(tmp_path / "store" / ".kvfs", exact)[0].lossless
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def exact_twin(probe: Probe) -> Manifest:
    from dataclasses import replace

    return replace(probe.manifest, fidelity="exact")


def test_what_the_model_gets_back_is_what_was_coded(models: Models, long_texts: list[str]) -> None:
    """Chunks, parts and heads go back to where they came from."""
    from kvfs.cli.probe import Probe

    probe = Probe(models.llama, prefix=512, continuation=2)
    sample = probe.sample(long_texts[0])
    for name, limit in (("lossless", 0.0), ("high", 0.1)):
        layers, _ = probe.coded(sample, codec.level(name))
        for (k, v), (k2, v2) in zip(sample.layers, layers, strict=True):
            for a, b in ((k, k2), (v, v2)):
                x, y = ((z.astype(np.uint32) << 16).view(np.float32) for z in (a, b))
                assert np.sqrt(((x - y) ** 2).mean() / x.var()) <= limit


def test_mistakes_are_said(tmp_path: Path, models: Models) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(ConfigError, match="tokens"):
        CliRunner().invoke(quality, [str(models.llama), "--text", str(text), "--prefix", "256"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="svg"):
        CliRunner().invoke(quality, [str(models.llama), "--text", str(text), "--plot", "x.gif"], catch_exceptions=False)
