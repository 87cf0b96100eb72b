"""What goes and what stays: ``evict``, ``pin``, ``unpin``. Without a daemon they do its work themselves."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import click

from kvfs import config
from kvfs.cli import render
from kvfs.cli.target import Target, at_option, resolve
from kvfs.errors import ChunkNotFound, ConfigError
from kvfs.kinds import size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.index import Index
    from kvfs.upkeep.member import Member

SIZE = size("1B", "1048576TiB")


@click.command(short_help="Free space: remove the least useful chunks.")
@click.argument("amount", metavar="SIZE")
@click.argument("namespace", required=False, metavar="[NS]")
@at_option
@render.json_option
def evict(amount: str, namespace: str | None, at: Path | None, as_json: bool) -> None:
    """Remove the least useful chunks (of the namespace NS, or of all) until SIZE, such as 10GiB, is free.

    What is leased or pinned stays, and so does what other chunks continue.
    """
    try:
        goal = SIZE.parse(amount)
    except ValueError:
        raise ConfigError(f"{amount!r}: write {SIZE.form}") from None
    from kvfs.client.mount import MountClient

    target = resolve(at)
    ns = target.find_namespace(namespace) if namespace else None
    if target.mounted:
        with MountClient(target.path) as client:
            chunks, freed = client.evict(ns, goal)
    else:
        chunks, freed = evict_here(target, ns, goal)
    if as_json:
        render.emit({"chunks": chunks, "bytes": freed})
    else:
        click.echo(f"removed {chunks:,} chunks, {render.size(freed)}")


def evict_here(target: Target, ns: bytes | None, goal: int) -> tuple[int, int]:
    """Evict from a store that no daemon serves."""
    from kvfs.upkeep.evict import Evictor

    with index_of(target) as (index, member):
        evictor = Evictor(target.store, index, member.leases, config.load(), _nothing, _nothing)
        evictor.office = member
        return evictor.evict(index.namespaces() if ns is None else [ns], goal, "request")


@contextlib.contextmanager
def index_of(target: Target) -> Iterator[tuple[Index, Member]]:
    """Give the index of a store that no daemon serves, true to the tree, and the office of its janitor; save it
    afterwards. StoreBusy if another has the office: a daemon on another host, or an engine that uses the folder."""
    from kvfs.index import Index
    from kvfs.upkeep.bulletin import Bulletin
    from kvfs.upkeep.leases import Leases
    from kvfs.upkeep.member import Member
    from kvfs.upkeep.policy import POLICIES

    target.store.lock_daemon("a kvfs command")
    index = Index(target.store, POLICIES[config.load().policy])
    index.load()
    member = Member(target.store, socket.gethostname(), Leases(), Bulletin(), index.pinned)
    member.campaign()
    index.reconcile()
    yield index, member
    index.save()
    member.close()


def _nothing(*_: Any) -> None:
    """Nobody has to be told."""


@click.command(short_help="Keep a chunk from eviction.")
@click.argument("key")
@at_option
@render.json_option
def pin(key: str, at: Path | None, as_json: bool) -> None:
    """Keep the chunk whose key begins with KEY, and all before it in its text, from eviction.

    A pin is remembered with the snapshot of the index, in the folder .kvfs of the store.
    """
    set_pin(key, True, at, as_json)


@click.command(short_help="Let a pinned chunk go again.")
@click.argument("key")
@at_option
@render.json_option
def unpin(key: str, at: Path | None, as_json: bool) -> None:
    """Let the chunk whose key begins with KEY be evicted again."""
    set_pin(key, False, at, as_json)


def set_pin(key: str, pinned: bool, at: Path | None, as_json: bool) -> None:
    """Pin or unpin a chunk."""
    from kvfs.client.mount import MountClient

    target = resolve(at)
    ns, found = target.find_chunk(key)
    if target.mounted:
        with MountClient(target.path) as client:
            client.pin(ns, found, pinned)
    else:
        with index_of(target) as (index, _):
            if not index.pin(ns, found, pinned):
                raise ChunkNotFound(key)
    if as_json:
        render.emit({"ns": ns.hex(), "key": found.hex(), "pinned": pinned})
    else:
        click.echo(f"{found.hex()[: render.SHORT]} {'stays' if pinned else 'may go'}")
