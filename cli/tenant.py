"""``tenant``: who else may use a store, each apart from the others. A daemon that serves it follows within seconds."""

from __future__ import annotations

import dataclasses
import os
import pwd
import time
from typing import TYPE_CHECKING, Any

import click

from kvfs import config
from kvfs.cli import mounts, render
from kvfs.cli.target import Target, at_option, resolve
from kvfs.errors import ConfigError, DeadlineExceeded
from kvfs.kinds import AMOUNT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfs.tenants import Tenant

FOLLOWED = 20.0
"""Seconds in which a daemon has picked up a change."""
AGAIN = 0.1


@click.group(short_help="Share a store among tenants that see nothing of each other.")
def tenant() -> None:
    """Share a store among tenants that see nothing of each other.

    Each has a subtree of the mount, tenants/NAME, with an owner, a budget, a control socket and a secret of its own.
    The tenant `public` is read by all others.
    """


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say whose a tenant is."""
    for flag, metavar, text in reversed(
        (
            ("--uid", "USER", "User whose the subtree is: a name or a number."),
            ("--gid", "GROUP", "Group of the subtree, a number [default: the user's]."),
            ("--mode", "MODE", "0700, or 0750 to let the group use it too [default: 0750]."),
            ("--budget", "SIZE", f"What its chunks may take: {AMOUNT.form}; set aside from the store's budget."),
        )
    ):
        command = click.option(flag, metavar=metavar, help=text)(command)
    return command


@tenant.command(name="add")
@click.argument("name")
@place_options
@at_option
@render.json_option
def add(
    name: str, uid: str | None, gid: str | None, mode: str | None, budget: str | None, at: Path | None, as_json: bool
) -> None:
    """Make the tenant NAME: a lower-case letter, then up to 31 of a-z, 0-9 and -. Needs --uid and --budget."""
    from kvfs import tenants

    if uid is None or budget is None:
        raise ConfigError("a tenant needs an owner and a budget: --uid USER --budget SIZE")
    user, group = owner(uid)
    made = tenants.Tenant(name, user, group, 0o750, read_budget(budget))
    made = changed(made, None, gid, mode, None)
    target, store = opened(at)
    check_sum(target, store, made)
    tenants.add(store, made)
    wait(target, lambda rows: bool(rows.get(name, {}).get("listens")), f"tenant {name} to be served")
    show(made, as_json, f"{name} is ready: bind {shown_at(target, store, name)} into its containers")


@tenant.command(name="set")
@click.argument("name")
@place_options
@at_option
@render.json_option
def set_(
    name: str, uid: str | None, gid: str | None, mode: str | None, budget: str | None, at: Path | None, as_json: bool
) -> None:
    """Change what is said of the tenant NAME. The mount shows another owner or mode within a minute."""
    from kvfs import tenants

    target, store = opened(at)
    if None in (uid, gid, mode, budget):
        before = tenants.load(store, name)
    else:  # whatever stands in its record: all of it is written anew
        tenants.check(store, name)
        before = tenants.Tenant(name, 0, 0, 0o750, read_budget(budget or ""))
    after = changed(before, uid, gid, mode, budget)
    check_sum(target, store, after)
    tenants.change(store, after)
    wanted = after.to_json()
    wait(target, lambda rows: wanted.items() <= rows.get(name, {}).items(), f"tenant {name} to change")
    show(after, as_json, f"{name} is changed")


def changed(before: Tenant, uid: str | None, gid: str | None, mode: str | None, budget: str | None) -> Tenant:
    """Return a tenant with what the options say; ConfigError."""
    from kvfs.tenants import MODES

    after = before
    if uid is not None:
        user, group = owner(uid)
        after = dataclasses.replace(after, uid=user, gid=group)
    if gid is not None:
        if not gid.isdigit():
            raise ConfigError(f"--gid {gid}: write the number of a group")
        after = dataclasses.replace(after, gid=int(gid))
    if mode is not None:
        try:
            after = dataclasses.replace(after, mode=int(MODES.parse(mode.rjust(4, "0")), 8))
        except ValueError:
            raise ConfigError(f"--mode {mode}: write {MODES.form}") from None
    return after if budget is None else dataclasses.replace(after, budget=read_budget(budget))


def owner(user: str) -> tuple[int, int]:
    """Return uid and group of a user; a number need not be one of this host's. ConfigError."""
    if user.isdigit():
        try:
            return int(user), pwd.getpwuid(int(user)).pw_gid
        except (KeyError, OverflowError):
            return int(user), int(user)
    try:
        there = pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"--uid {user}: there is no such user; write another, or a number") from None
    return there.pw_uid, there.pw_gid


def read_budget(text: str) -> Any:
    """Read a budget; ConfigError says what to write."""
    try:
        return AMOUNT.parse(text)
    except (TypeError, ValueError):
        raise ConfigError(f"--budget {text}: write {AMOUNT.form}") from None


def check_sum(target: Target, store: Path, wanted: Tenant) -> None:
    """Refuse a budget that, with those of all others, comes to more than the store's. ConfigError says what is left."""
    from kvfs.tenants import load, names

    space = os.statvfs(store)
    total = space.f_blocks * space.f_frsize
    whole = settings_of(target, store).budget.of(total)
    others = sum(load(store, name).budget.of(total) for name in names(store) if name != wanted.name)
    if others + wanted.budget.of(total) > whole:
        left = f"{render.size(max(0, whole - others))} of the store's {render.size(whole)}"
        raise ConfigError(f"budget of {wanted.name}: {left} are left by other tenants")


def settings_of(target: Target, store: Path) -> config.Config:
    """Return the settings of the daemon that serves the store, or those that one would have."""
    mounted = target.path / ".kvfs" / "config.toml"
    return config.load(mounted if target.mounted and target.path != store else None)


def opened(at: Path | None) -> tuple[Target, Path]:
    """Return what to look at, a mount if there is one, and the folder of the store. NotAStore, ConfigError."""
    from kvfs.store import Store
    from kvfs.tenants import tenant_of

    target = resolve(at)
    store = mounts.store_of(target.path) if target.mounted else target.path
    Store.open(store).close()
    if (name := tenant_of(store)) is not None:
        raise ConfigError(f"{target.path} is that of tenant {name}, which has no tenants; name the whole store")
    if not target.mounted and (served := mounts.serving(store)) is not None:
        target = Target(served, True)
    return target, store


def wait(target: Target, done: Callable[[dict[str, Any]], bool], what: str) -> None:
    """Wait until the daemon, if there is one, says that it has picked a change up. DeadlineExceeded."""
    from kvfs.client.mount import MountClient

    if not target.mounted:
        return
    deadline = time.monotonic() + FOLLOWED
    with MountClient(target.path) as client:
        while not done({row["name"]: row for row in client.stats()["tenants"]}):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"waiting for {what}", f"{FOLLOWED:g}")
            time.sleep(AGAIN)


def shown_at(target: Target, store: Path, name: str) -> Path:
    """Return where a tenant's subtree is, or will be."""
    from kvfs.tenants import FOLDER

    return (target.path if target.mounted else config.load().mountpoint or store) / FOLDER / name


def show(made: Tenant, as_json: bool, text: str) -> None:
    """Print what a tenant is now."""
    if as_json:
        render.emit({"name": made.name, **made.to_json()})
    else:
        click.echo(text)


@tenant.command(name="list")
@at_option
@render.json_option
def list_(at: Path | None, as_json: bool) -> None:
    """List tenants, what they may use, and what they use."""
    target, store = opened(at)
    rows = usage(target, store)
    if as_json:
        render.emit(rows)
        return
    render.table(
        ("TENANT", "UID>", "GID>", "MODE", "CHUNKS>", "SIZE>", "BUDGET>"),
        [
            (
                row["name"],
                str(row["uid"]),
                str(row["gid"]),
                row["mode"],
                f"{row['chunks']:,}",
                render.size(row["bytes"]),
                row["budget"],
            )
            for row in rows
        ],
    )


def usage(target: Target, store: Path) -> list[dict[str, Any]]:
    """Return what each tenant is and uses: as its daemon says, or by listing its store."""
    from kvfs.tenants import load

    with target.client() as client:
        rows: list[dict[str, Any]] = client.stats()["tenants"]
    return [{**load(store, row["name"]).to_json(), **row} for row in rows]


@tenant.command(name="rm")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@at_option
@render.json_option
def remove(name: str, yes: bool, at: Path | None, as_json: bool) -> None:
    """Remove the tenant NAME with all its chunks. Files that its readers have open go on."""
    from kvfs import tenants

    target, store = opened(at)
    tenants.check(store, name)
    if not yes:
        click.confirm(f"remove tenant {name} with all its chunks?", abort=True, err=True)
    tenants.forget(store, name)
    wait(target, lambda rows: name not in rows, f"tenant {name} to end")
    tenants.clear(store, name)
    if as_json:
        render.emit({"name": name})
    else:
        click.echo(f"removed {name}")
