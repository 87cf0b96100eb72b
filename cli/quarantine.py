"""``quarantine``: what lies in ``lost+found``, and how to get rid of it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import click

from kvfs.cli import mounts, render
from kvfs.cli.target import at_option, resolve
from kvfs.errors import ChunkCorrupt, ChunkNotFound, ConfigError
from kvfs.kinds import duration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.quarantine import Kept
    from kvfs.store import Store

AGE = duration("0s", "36500d")


@click.group(short_help="Look at what was put away as damaged or out of place.")
def quarantine() -> None:
    """Look at lost+found: damaged parts and what did not belong in the store, each with the reason."""


@contextlib.contextmanager
def opened(at: Path | None) -> Iterator[Store]:
    """Open the folder of the store, of a mount too, which does not show lost+found."""
    from kvfs.store import Store

    target = resolve(at)
    with Store.open(mounts.store_of(target.path) if target.mounted else target.path) as store:
        yield store


@quarantine.command(name="list")
@at_option
@render.json_option
def list_(at: Path | None, as_json: bool) -> None:
    """List what is in lost+found, the oldest first."""
    with opened(at) as store:
        entries = store.lost.entries()
    if as_json:
        render.emit([as_dict(each) for each in entries])
        return
    render.table(
        ("REASON", "SINCE", "SIZE>", "NAME"),
        [(each.reason, render.ago(each.time), render.size(each.size), each.name) for each in entries],
    )


def as_dict(entry: Kept) -> dict[str, Any]:
    """Return an entry as JSON has it."""
    fields = entry._asdict()
    return {"bytes": fields.pop("size"), **fields}


@quarantine.command(name="show")
@click.argument("name")
@at_option
@render.json_option
def show(name: str, at: Path | None, as_json: bool) -> None:
    """Show the one entry whose name contains NAME (the beginning of a key will do): what was noted, what it is."""
    with opened(at) as store:
        entry = find(store, name)
        shown = {**as_dict(entry), "note": store.lost.note(entry.name), "header": header(store, entry)}
    if as_json:
        render.emit(shown)
        return
    render.pairs(
        [
            ("name", entry.name),
            ("reason", entry.reason),
            ("detail", str(shown["note"].get("detail", ""))),
            ("lay at", entry.path),
            ("since", render.ago(entry.time)),
            ("size", render.size(entry.size)),
            ("header", shown["header"]),
        ]
    )


def header(store: Store, entry: Kept) -> str:
    """Return what the header of a damaged part says, or what is wrong with it."""
    from kvfs.chunk import read_header
    from kvfs.coded import read_coded_header
    from kvfs.names import CODED

    if not entry.is_part:
        return ""
    fd = store.lost.open(entry.name)
    try:
        meta = (read_coded_header if f"{CODED}." in entry.name else read_header)(fd).meta
    except ChunkCorrupt as error:
        return f"{error.reason}: {error.args[2]}"
    finally:
        os.close(fd)
    return f"{meta.key.hex()}.{meta.part}, {meta.tokens} tokens at {meta.position}, of {meta.ns.hex()[: render.SHORT]}"


def find(store: Store, word: str) -> Kept:
    """Return the entry whose name is or contains ``word``; ChunkNotFound, or ConfigError if there are several."""
    found = [each for each in store.lost.entries() if word in each.name]
    exact = [each for each in found if each.name == word]
    if not found:
        raise ChunkNotFound(f"{word} in lost+found")
    if len(found) > 1 and not exact:
        raise ConfigError(f"{word} is in {len(found)} names; write more of one")
    return (exact or found)[0]


@quarantine.command(name="purge")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--older-than", metavar="TIME", help="Only what has been there longer, such as 7d.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@at_option
@render.json_option
def purge(names: tuple[str, ...], older_than: str | None, yes: bool, at: Path | None, as_json: bool) -> None:
    """Delete the entries whose names contain NAME, or everything, from lost+found for good."""
    before = time.time() - age(older_than)
    with opened(at) as store:
        wanted = [find(store, name) for name in names] if names else store.lost.entries()
        going = [each for each in wanted if each.time <= before]
        size = sum(each.size for each in going)
        if going and not yes:
            click.confirm(f"delete {len(going):,} entries, {render.size(size)}, for good?", abort=True, err=True)
        for each in going:
            store.lost.remove(each.name)
    if as_json:
        render.emit({"entries": len(going), "bytes": size})
    else:
        click.echo(f"deleted {len(going):,} entries, {render.size(size)}")


def age(text: str | None) -> float:
    """Read a time span; ConfigError says what to write."""
    try:
        return float(AGE.parse(text)) if text is not None else 0.0
    except (TypeError, ValueError):
        raise ConfigError(f"--older-than {text}: write {AGE.form}") from None
