"""Commands that take something away: ``verify`` (what is damaged) and ``retire`` (a namespace)."""

from __future__ import annotations

import contextlib
import math
import random
import re
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvfs.cli import render
from kvfs.cli.target import Target, at_option, resolve
from kvfs.errors import ChunkCorrupt, ChunkNotFound, ConfigError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.identity import PartId


REPORT = 60.0
"""Seconds that reading one part again may take."""


class Suspect(NamedTuple):
    """One file of a part to be checked; ``size`` in bytes."""

    ns: bytes
    key: bytes
    part: PartId
    size: int
    coded: bool


@click.command(short_help="Read every part and check it; put damaged ones away.")
@click.argument("namespaces", nargs=-1, metavar="[NS]...")
@click.option("--dry-run", is_flag=True, help="Report damage, move nothing.")
@click.option("--sample", metavar="N", help="Read only so many parts, or such a share of them: 500, 5%.")
@click.option("--seed", type=int, metavar="NUMBER", help="Choose the same sample again: as an earlier run told.")
@at_option
@render.json_option
@click.pass_context
def verify(
    ctx: click.Context,
    namespaces: tuple[str, ...],
    dry_run: bool,
    sample: str | None,
    seed: int | None,
    at: Path | None,
    as_json: bool,
) -> None:
    """Read every part (of the namespaces NS, or of all) and compare its checksums.

    Damaged parts are moved to lost+found. Exits with 4 if there were any.
    """
    target = resolve(at)
    if dry_run and target.mounted:
        raise Unsupported(
            "verify --dry-run through a mount, whose daemon puts away what it finds damaged; "
            "name the folder of the store with --at"
        )
    wanted = [target.find_namespace(word) for word in namespaces] or target.namespaces()
    suspects = [suspect for ns in wanted for suspect in parts_of(target, ns)]
    report: dict[str, Any] = {}
    if sample is not None or seed is not None:
        seed = secrets.randbits(32) if seed is None else seed
        report |= {"of": len(suspects), "seed": seed}
        suspects = draw(suspects, "100%" if sample is None else sample, seed)
    report |= {"parts": len(suspects), "bytes": sum(suspect.size for suspect in suspects)}
    report["damaged"] = damaged = sweep(target, suspects, dry_run)
    if as_json:
        render.emit(report)
    else:
        show_report(report)
    ctx.exit(ChunkCorrupt.exit_code if damaged else 0)


def draw(suspects: list[Suspect], sample: str, seed: int) -> list[Suspect]:
    """Choose parts at random, the same ones for the same seed as long as nothing comes or goes.

    ConfigError for a sample that is neither a number of parts nor a percentage.
    """
    match = re.fullmatch(r"(\d{1,9})|(\d{1,3}(?:\.\d+)?)%", sample)
    if match is None or (match[2] and float(match[2]) > 100):
        raise ConfigError(f"--sample {sample}: write a number of parts such as 500, or a share such as 5%")
    count = int(match[1]) if match[1] else math.ceil(len(suspects) * float(match[2]) / 100)
    return sorted(random.Random(seed).sample(sorted(suspects), min(count, len(suspects))))  # noqa: S311 - no secret


def sweep(target: Target, suspects: list[Suspect], dry_run: bool) -> list[dict[str, Any]]:
    """Read parts; return what is wrong with those that are damaged, which are moved to lost+found."""
    damaged = []
    for suspect, error in check(target, suspects):
        with target.client() as client:
            # A daemon that met the damage was quicker, or puts it away now.
            moved = not dry_run and client.report(suspect.ns, suspect.key, suspect.part, error.reason, REPORT)
        damaged.append(
            {
                "ns": suspect.ns.hex(),
                "key": suspect.key.hex(),
                "part": str(suspect.part),
                "reason": error.reason,
                "detail": str(error),
                "quarantined": moved,
            }
        )
    return damaged


def parts_of(target: Target, ns: bytes) -> Iterator[Suspect]:
    """Yield every part of a namespace."""
    for found in target.store.scan(ns):
        with contextlib.suppress(FileNotFoundError):
            yield Suspect(ns, found.key, found.part, found.entry.stat(follow_symlinks=False).st_size, found.coded)


def check(target: Target, suspects: list[Suspect]) -> Iterator[tuple[Suspect, ChunkCorrupt]]:
    """Read all parts; yield those that are damaged, with what is wrong."""
    from kvfs.chunk import open_part
    from kvfs.coded import open_coded

    store = target.store
    for suspect in render.progress(suspects, "checking", lambda suspect: suspect.size):
        try:
            fd = store.open_part(suspect.ns, suspect.key, suspect.part, suspect.coded)
            opened = open_coded if suspect.coded else open_part
            with opened(fd, store.manifest(suspect.ns), suspect.key, suspect.part) as file:
                file.verify()
        except ChunkNotFound:  # removed meanwhile
            continue
        except ChunkCorrupt as error:
            yield suspect, error


def show_report(report: dict[str, Any]) -> None:
    """Print what `verify` found, for people."""
    for each in report["damaged"]:
        fate = "moved to lost+found" if each["quarantined"] else "left where it is"
        click.echo(f"{each['detail']}; {fate}")
    outcome = f"{len(report['damaged'])} damaged" if report["damaged"] else "all whole"
    of = f" of {report['of']:,} (seed {report['seed']})" if "of" in report else ""
    click.echo(f"{report['parts']:,} parts{of}, {render.size(report['bytes'])}: {outcome}")


@click.command(short_help="Remove a namespace with all its chunks.")
@click.argument("namespace", metavar="NS")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@at_option
@render.json_option
def retire(namespace: str, yes: bool, at: Path | None, as_json: bool) -> None:
    """Remove namespace NS (its name or the beginning of its digest) with all its chunks."""
    target = resolve(at)
    ns = target.find_namespace(namespace)
    if not yes:
        click.confirm(
            f"remove {target.name(ns) or 'the namespace'} ({ns.hex()[: render.SHORT]}) with all its chunks?",
            abort=True,
            err=True,
        )
    with target.client() as client:
        chunks = client.retire(ns)
    if as_json:
        render.emit({"ns": ns.hex(), "chunks": chunks})
    else:
        click.echo(f"removed {ns.hex()[: render.SHORT]}: {chunks:,} chunks")
