"""``kvfs quality``: what each level of the codec costs on one's own model and texts, and which a store may use."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvfs.cli import render
from kvfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvfs import codec
    from kvfs.cli.probe import Effect, Probe
    from kvfs.identity import Manifest

__all__ = ["Row", "quality"]

PLOTS = (".png", ".svg")


@dataclass(frozen=True)
class Row:
    """Means over texts: bits of all files per element, KL divergence (nats) and the largest of a text, share of equal
    most likely tokens, perplexity."""

    bits: float
    ratio: float
    kl: float
    worst: float
    top1: float
    perplexity: float

    @classmethod
    def of(cls, results: Sequence[tuple[float, Effect]]) -> Row:
        """From bits per element and effect, text by text."""
        bits, effects = statistics.fmean(b for b, _ in results), [e for _, e in results]
        kl, nll = [e.kl for e in effects], statistics.fmean(e.nll for e in effects)
        return cls(
            bits, 16 / bits, statistics.fmean(kl), max(kl), statistics.fmean(e.top1 for e in effects), math.exp(nll)
        )


def measure(probe: Probe, texts: Mapping[str, str]) -> dict[str, Row]:
    """A row for each level, and for the KV as it is."""
    from kvfs import codec

    found: dict[str, list[tuple[float, Effect]]] = {}
    for text in render.progress(list(texts.values()), "texts", lambda _: 1):
        sample = probe.sample(text)
        elements = sum(k.size + v.size for k, v in sample.layers)
        found.setdefault("raw", []).append((16.0, probe.effect(sample, sample.layers)))
        for level in codec.LEVELS.values():
            layers, bits = probe.coded(sample, level)
            found.setdefault(level.name, []).append((bits / elements, probe.effect(sample, layers)))
    return {name: Row.of(results) for name, results in found.items()}


def passing(rows: Mapping[str, Row], max_kl: float, min_top1: float) -> codec.Level:
    """The coarsest level up to which all levels stay within both limits."""
    from kvfs import codec

    best = codec.LEVELS["lossless"]
    for level in codec.LEVELS.values():
        row = rows[level.name]
        if not (row.kl <= max_kl and row.top1 >= min_top1):  # a NaN passes nothing
            break
        best = level
    return best


def draw(rows: Mapping[str, Row], max_kl: float, title: str, path: Path) -> None:
    """Rate against distortion, as PNG or SVG by the suffix of ``path``.  ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"{path}: drawing needs matplotlib (pip install matplotlib)") from None
    from kvfs import codec

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="bits per element, all bytes counted", ylabel="KL divergence (nats)", title=title)
    lossy = [name for name, level in codec.LEVELS.items() if not level.lossless]
    axes.semilogy([rows[n].bits for n in lossy], [max(rows[n].kl, 1e-9) for n in lossy], "o-")
    for name in lossy:
        axes.annotate(name, (rows[name].bits, max(rows[name].kl, 1e-9)), xytext=(6, 4), textcoords="offset points")
    axes.axhline(max_kl, linestyle="--", linewidth=1, color="grey")
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, dpi=150)


def lossy_namespaces(store: Path, manifest: Manifest) -> tuple[Path, list[bytes]]:
    """The store's folder of derived files, and its lossy namespaces of the model's weights."""
    from kvfs.store import Store

    with Store.open(store) as opened:
        found = [ns for ns in opened.namespaces() if (m := opened.manifest(ns)).fidelity == "lossy"
                 and m.weights == manifest.weights]  # fmt: skip
        return opened.derived, found


@click.command(short_help="Measure what lossy compaction costs a model.")
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("store", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option(
    "--text", "text_files", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True, required=True,
    metavar="FILE", help="A text like those that the model will see; give several.",
)  # fmt: skip
@click.option("--prefix", default=1024, show_default=True, metavar="TOKENS", help="Tokens whose KV is coded.")
@click.option("--continuation", default=224, show_default=True, metavar="TOKENS", help="Tokens predicted from it.")
@click.option(
    "--max-kl", default=0.01, show_default=True, metavar="NATS", help="Largest mean KL divergence that passes."
)
@click.option("--min-top1", default=0.94, show_default=True, help="Smallest share of equal most likely tokens.")
@click.option(
    "--plot", "plots", type=click.Path(path_type=Path, dir_okay=False), multiple=True, metavar="FILE",
    help="Draw the curve; .png or .svg.",
)  # fmt: skip
@render.json_option
def quality(
    model: Path, store: Path | None, text_files: Sequence[Path], prefix: int, continuation: int, max_kl: float,
    min_top1: float, plots: Sequence[Path], as_json: bool,
) -> None:  # fmt: skip
    """Measure on MODEL, a Hugging Face folder, what each level of the codec costs.

    For each text the KV of its beginning is coded, and the predictions after it are compared with those from the exact
    KV. With STORE, the coarsest level within the limits is noted for the lossy namespaces of the model in it, and
    compaction goes no further. Needs torch and transformers.
    """
    for path in plots:
        if path.suffix not in PLOTS:
            raise ConfigError(f"{path}: a plot ends in {' or '.join(PLOTS)}")
    from kvfs.cli.probe import Probe
    from kvfs.codec import gate

    probe = Probe(model, prefix, continuation)
    derived, namespaces = lossy_namespaces(store, probe.manifest) if store else (None, [])
    rows = measure(probe, {str(path): path.read_text("utf-8", errors="replace") for path in text_files})
    level = passing(rows, max_kl, min_top1)
    for path in plots:
        draw(rows, max_kl, model.name, path)
    levels = {name: asdict(row) for name, row in rows.items()}
    if derived:
        for ns in namespaces:
            gate.record(derived, ns, level, levels)
    if as_json:
        render.emit({"levels": levels, "passes": level.name, "namespaces": [ns.hex() for ns in namespaces]})
        return
    render.table(
        ["level", "bits>", "ratio>", "KL>", "worst>", "top-1>", "perplexity>"],
        [[n, f"{r.bits:.3f}", f"{r.ratio:.2f}", f"{r.kl:.5f}", f"{r.worst:.5f}", f"{r.top1:.3f}", f"{r.perplexity:.3f}"]
         for n, r in rows.items()],
    )  # fmt: skip
    click.echo(f"coarsest level within the limits (KL {max_kl:g}, top-1 {min_top1:g}): {level.name}")
    if store:
        names = ", ".join(ns.hex()[: render.SHORT] for ns in namespaces)
        click.echo(f"noted for {names}" if names else "noted nowhere: the store has no lossy namespace of this model")
