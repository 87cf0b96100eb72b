"""``compact``: chunks become smaller now, not when they have grown cold. Without a daemon it does the work itself."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvfs import config
from kvfs.cli import render
from kvfs.cli.target import Target, at_option, resolve
from kvfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SLICE = 2
"""Seconds of work between two moves of the bar."""

Row = dict[str, Any]


class Work(NamedTuple):
    """Who does it: the daemon, or this process. See `kvfs.daemon.compact.Compactor`."""

    plan: Callable[[bytes | None, int | None, str | None], list[Row]]
    sweep: Callable[[bytes | None, int | None, int], Row]
    force: Callable[[bytes, str], None]


@click.command(short_help="Make chunks smaller that nobody uses.")
@click.argument("namespace", required=False, metavar="[NS]")
@click.option("--level", metavar="LEVEL", help="Use this level for NS from now on, whatever `kvfs quality` found.")
@click.option("--now", is_flag=True, help="All chunks that nobody holds, however lately they were used.")
@click.option("--dry-run", is_flag=True, help="Tell what it is expected to save, change nothing.")
@at_option
@render.json_option
def compact(namespace: str | None, level: str | None, now: bool, dry_run: bool, at: Path | None, as_json: bool) -> None:
    """Bring chunks (of the namespace NS, or of all) that were not used for `compact_after` to their coded form.

    Exact namespaces are coded losslessly. A lossy one goes as far as `kvfs quality` recorded for it, or to LEVEL: one
    of lossless, high, medium, low, lowest.
    """
    if level is not None and namespace is None:
        raise ConfigError("--level is the word for one namespace; name it: kvfs compact NS --level medium")
    target = resolve(at)
    ns = target.find_namespace(namespace) if namespace else None
    idle = 0 if now else None
    with worker(target) as work:
        if ns is not None and level is not None and not dry_run:
            work.force(ns, level)
        rows = work.plan(ns, idle, level)
        done = None if dry_run else run(work, ns, idle, sum(row["chunks"] for row in rows))
    if as_json:
        render.emit({"planned": rows, "done": done})
    elif done is None:
        show_plan(target, rows)
    else:
        saved = done["before"] - done["after"]
        click.echo(
            f"compacted {done['chunks']:,} chunks, {render.size(done['before'])}: saved {render.size(max(0, saved))}"
        )


def run(work: Work, ns: bytes | None, idle: int | None, expected: int) -> Row:
    """Compact everything, with a bar on a terminal; return the sums."""
    total = {"chunks": 0, "before": 0, "after": 0}
    with contextlib.ExitStack() as stack:
        bar = None
        if sys.stderr.isatty():
            bar = stack.enter_context(click.progressbar(length=expected, label="compacting", file=sys.stderr))
        while True:
            swept = work.sweep(ns, idle, SLICE)
            for name in total:
                total[name] += swept[name]
            if bar is not None:
                bar.update(swept["chunks"])
            if swept["done"]:
                return total


def show_plan(target: Target, rows: list[Row]) -> None:
    """Print what would be done, a line for each namespace."""
    render.table(
        ("NAMESPACE", "NAME", "CHUNKS>", "SIZE>", "LEVEL", "SAVES>"),
        [
            (
                row["ns"][: render.SHORT],
                target.name(bytes.fromhex(row["ns"])),
                f"{row['chunks']:,}",
                render.size(row["bytes"]),
                row["level"],
                f"{render.size(row['saving'])} ({row['saving'] / max(1, row['bytes']):.0%})",
            )
            for row in rows
        ],
    )


@contextlib.contextmanager
def worker(target: Target) -> Iterator[Work]:
    """Give what does the work: the daemon of a mount, or a catalog of our own of a store that no daemon serves."""
    from kvfs import codec
    from kvfs.client.mount import MountClient

    if target.mounted:
        with MountClient(target.path) as client:
            yield Work(client.plan, client.compact, client.force)
        return
    from kvfs.daemon.catalog import Catalog
    from kvfs.metrics import Metrics

    target.store.lock_daemon("kvfs compact")
    catalog = Catalog(target.store, config.load(), Metrics())
    try:
        catalog.reconcile()
        yield Work(
            lambda ns, idle, level: catalog.compactor.plan(ns, idle, None if level is None else codec.level(level)),
            lambda ns, idle, seconds: catalog.sweep(ns, idle, seconds)._asdict(),
            lambda ns, level: catalog.force(ns, codec.level(level)),
        )
    finally:
        catalog.close()
