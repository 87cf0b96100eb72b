"""How results are shown: JSON for programs; for people tables and units. Colours and bars only on a terminal."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes, seconds, full digests.")

SHORT = 12
"""Digits of a digest that people see; commands take any unique prefix."""


def emit(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def size(count: float) -> str:
    """Return bytes in the largest binary unit that leaves at least one: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def span(seconds: float) -> str:
    """Return a time span in its largest unit, to two digits: ``45 ms``, ``3.3 h``, ``12 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length:
            count = seconds / length
            return f"{count:.1f} {unit}" if count < 9.95 and unit != "s" else f"{count:.0f} {unit}"
    return f"{seconds * 1000:.0f} ms"


def ago(moment: float) -> str:
    """Return how long ago a Unix time was; ``never`` for 0."""
    return f"{span(max(0.0, time.time() - moment))} ago" if moment else "never"


def printable(text: str) -> str:
    """Return ``text`` without what could command a terminal: names come from whoever wrote the store."""
    return "".join(c if c.isprintable() else "?" for c in text)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under headings; a column whose heading ends in ``>`` is flush right."""
    cells = [[heading.removesuffix(">") for heading in headings], *([printable(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [heading.endswith(">") for heading in headings]
    for row in cells:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        click.echo("  ".join(padded).rstrip())


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print one ``name  value`` a line, the values under each other."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"{name:{width}}  {printable(value)}".rstrip())


def progress(items: Sequence[T], label: str, weight: Callable[[T], int]) -> Iterator[T]:
    """Yield ``items`` with a bar on stderr that moves by their weights, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    with click.progressbar(length=sum(map(weight, items)), label=label, file=sys.stderr) as bar:
        for item in items:
            yield item
            bar.update(weight(item))
