"""``fsck``: check the whole of a store, and repair it; through a mount, what its daemon can do without stopping."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvfs.cli import maintain, render
from kvfs.cli.target import Target, at_option, resolve
from kvfs.errors import ChunkCorrupt, ConfigError, KvfsError, Unsupported

if TYPE_CHECKING:
    from kvfs.fsck import Finding

LISTING = 600.0
"""Seconds that a daemon may take to list its store."""

LEFT = "left as it is"


@click.command(short_help="Check a store and repair it.")
@click.argument("store", required=False, type=click.Path(path_type=Path), metavar="[STORE]")
@click.option("--dry-run", is_flag=True, help="Tell what is wrong, change nothing.")
@click.option("--data", is_flag=True, help="Read all parts and compare their checksums too.")
@click.option("--repair-orphans", is_flag=True, help="Remove chunks that cannot be reached: one before them is gone.")
@at_option
@render.json_option
@click.pass_context
def fsck(
    ctx: click.Context,
    store: Path | None,
    dry_run: bool,
    data: bool,
    repair_orphans: bool,
    at: Path | None,
    as_json: bool,
) -> None:
    """Check the store STORE (or --at), which no daemon may be serving, and repair it.

    What may be somebody's data is moved to lost+found, never deleted. A mount has its daemon compare the index with
    the store; the rest of the check needs the daemon to be stopped. Exits with 4 if there was damage, repaired or not,
    and with 1 if something else could not be repaired.
    """
    if store is not None and at is not None:
        raise ConfigError("name the store once: as STORE or with --at")
    target = resolve(at or store)
    if target.mounted:
        if dry_run or repair_orphans:
            raise Unsupported("--dry-run and --repair-orphans through a mount; stop its daemon, and name the store")
        findings, parts, size = through_daemon(target, data)
    else:
        findings, parts, size = on_folder(target.path, dry_run, data, repair_orphans)
    damage = sum(each.is_damage for each in findings)
    if as_json:
        rows = [each._asdict() | {"damage": each.is_damage} for each in findings]
        render.emit({"parts": parts, "bytes": size, "damage": damage, "findings": rows})
    else:
        for each in findings:
            click.echo(line(each, dry_run))
        outcome = f"{len(findings)} findings, {damage} of them damage" if findings else "nothing wrong"
        click.echo(f"{parts:,} parts, {render.size(size)}: {outcome}")
    failed = any(not each.done and each.action != LEFT for each in findings) and not dry_run
    ctx.exit(ChunkCorrupt.exit_code if damage else KvfsError.exit_code if failed else 0)


def on_folder(path: Path, dry_run: bool, data: bool, repair_orphans: bool) -> tuple[list[Finding], int, int]:
    """Check a store that no daemon serves; return findings, sound parts and their bytes."""
    from kvfs.fsck import Fsck

    with Fsck(path, dry_run=dry_run, data=data, repair_orphans=repair_orphans) as check:
        return list(check.run()), check.parts, check.bytes


def through_daemon(target: Target, data: bool) -> tuple[list[Finding], int, int]:
    """Have the daemon list its store, and, with ``data``, verify every part."""
    from kvfs.client import MountClient
    from kvfs.fsck import Finding

    findings = []
    with MountClient(target.path) as client:
        found, gone = client.reconcile(LISTING)
    if found or gone:
        detail = f"{found} parts unknown to it, {gone} gone"
        findings.append(Finding("stale-index", "index", detail, "corrected by the daemon", True))
    suspects = [suspect for ns in target.namespaces() for suspect in maintain.parts_of(target, ns)]
    for damage in maintain.sweep(target, suspects, dry_run=False) if data else ():
        path = f"{damage['ns']}/{damage['key'][:3]}/{damage['key']}.{damage['part']}.safetensors"
        findings.append(Finding(damage["reason"], path, damage["detail"], "moved to lost+found", damage["quarantined"]))
    return findings, len(suspects) - len(findings), sum(suspect.size for suspect in suspects)


def line(finding: Finding, dry_run: bool) -> str:
    """Return a finding as people read it."""
    if finding.done or finding.action == LEFT:
        fate = finding.action
    else:
        fate = f"would be {finding.action}" if dry_run else f"could not be {finding.action}"
    return render.printable(f"{finding.path}: {finding.kind}: {finding.detail}; {fate}")
