"""What an inspecting command looks at: a mount, or a store folder without a daemon. Both show the same tree."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvfs import config
from kvfs.cli import render
from kvfs.errors import ChunkCorrupt, ChunkNotFound, ConfigError, NamespaceNotFound

if TYPE_CHECKING:
    from kvfs.client import Client
    from kvfs.identity import PartId
    from kvfs.store import Found, Store

MIN_PREFIX = 4
"""Fewest digits that are taken for the beginning of a key or a namespace."""

HEX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},64}}")

at_option = click.option(
    "--at",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Mount point or store [default: the configured one, or else this host's only mount].",
)


@dataclass(frozen=True)
class Chunk:
    """What is stored under one key: bytes on disk by part, uses, time of the last one (Unix seconds, 0: never)."""

    key: bytes
    parts: dict[PartId, int]
    tokens: int
    form: str
    hits: int
    last: float
    pinned: bool

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Usage:
    """What is remembered of a chunk besides its files; tokens are 0 and the form is empty where nobody has looked."""

    tokens: int = 0
    form: str = ""
    hits: int = 0
    last: float = 0.0
    pinned: bool = False


Remember = Callable[[bytes, bytes], Usage]


@dataclass(frozen=True)
class Target:
    """The place a command looks at."""

    path: Path
    mounted: bool

    @cached_property
    def store(self) -> Store:
        """The tree, read through the mount if it is one; NotAStore. Waits for a mount whose daemon hangs."""
        from kvfs.files import OPEN_DIR
        from kvfs.store import Store

        store = (
            Store(self.path, os.open(self.path, OPEN_DIR), "relaxed")
            if self.mounted
            else Store.open(self.path, shared=config.load().is_shared)
        )
        click.get_current_context().call_on_close(store.close)
        return store

    @cached_property
    def remember(self) -> Remember:
        """What tells how a chunk of a bare store was used."""
        return from_snapshot(self.store)

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """Give a client of the daemon, or of the bare store."""
        from kvfs.client import connect

        with connect(mount=self.path) if self.mounted else connect(store=self.path) as client:
            yield client

    def namespaces(self) -> list[bytes]:
        """Return the digests of all namespaces."""
        return self.store.namespaces()

    def name(self, ns: bytes) -> str:
        """Return what people call a namespace: ``name@revision``, or nothing."""
        info = self.store.info(ns)
        return "@".join(str(info[key]) for key in ("name", "revision") if info.get(key))

    def find_namespace(self, word: str) -> bytes:
        """Return the namespace whose digest begins with ``word``, or that people call so.

        Raises NamespaceNotFound; ConfigError if there are several.
        """
        found = [ns for ns in self.namespaces() if HEX.fullmatch(word) and ns.hex().startswith(word)]
        found = found or [ns for ns in self.namespaces() if word in {self.name(ns), self.name(ns).partition("@")[0]}]
        if not found:
            raise NamespaceNotFound(word)
        return only(found, word)

    def find_chunk(self, word: str) -> tuple[bytes, bytes]:
        """Return namespace and key of the chunk whose key begins with ``word``.

        Raises ChunkNotFound; ConfigError if there are several, or if ``word`` cannot begin a key.
        """
        if not HEX.fullmatch(word):
            raise ConfigError(f"{word!r} cannot begin a key; write at least {MIN_PREFIX} of its hexadecimal digits")
        found = {
            (ns, part.key)
            for ns in self.namespaces()
            for part in self.store.scan_leaf(ns, word[:3])
            if part.key.hex().startswith(word)
        }
        if not found:
            raise ChunkNotFound(word)
        if len({key for _, key in found}) == 1 and len(found) > 1:
            raise ConfigError(f"{word} is a key in {len(found)} namespaces")
        return next((ns, key) for ns, key in found if key == only([key for _, key in found], word))

    def chunks(self, ns: bytes) -> list[Chunk]:
        """Return the chunks of a namespace, the last used first."""
        chunks = self.told(ns, None) if self.mounted else self.listed(ns, self.store.scan(ns))
        return sorted(chunks, key=lambda chunk: (-chunk.last, chunk.key))

    def chunk(self, ns: bytes, key: bytes) -> Chunk:
        """Return one chunk; ChunkNotFound."""
        from kvfs.names import leaf_name

        same = (found for found in self.store.scan_leaf(ns, leaf_name(key)) if found.key == key)
        for chunk in self.told(ns, [key]) if self.mounted else self.listed(ns, same):
            return chunk
        raise ChunkNotFound(key.hex())

    def told(self, ns: bytes, keys: list[bytes] | None) -> Iterator[Chunk]:
        """Yield what the daemon tells of chunks, by default of all: a look at each file through the mount takes far
        longer."""
        from kvfs.client import MountClient
        from kvfs.identity import PartId

        with MountClient(self.path) as client:
            keys = client.keys(ns) if keys is None else keys
            for key, told in zip(keys, client.describe(ns, keys), strict=True):
                if told is not None:
                    sizes = {PartId.parse(name): size for name, size in told["parts"].items()}
                    used = told["hits"], float(told["last_use"]), told["pinned"]
                    yield Chunk(key, sizes, told["tokens"], told["form"], *used)

    def listed(self, ns: bytes, files: Iterable[Found]) -> Iterator[Chunk]:
        """Yield the chunks that files of a bare store belong to."""
        parts: dict[bytes, set[PartId]] = defaultdict(set)
        for found in files:
            parts[found.key].add(found.part)
        for key, present in parts.items():
            part = min(present)
            usage = self.remember(ns, key)
            known = usage.tokens and usage.form
            tokens, form = (usage.tokens, usage.form) if known else self.header(ns, key, part)
            sizes = {each: self.stored(ns, key, each) for each in present}
            yield Chunk(key, sizes, tokens, form, usage.hits, usage.last, usage.pinned)

    def stored(self, ns: bytes, key: bytes, part: PartId) -> int:
        """Return the bytes that a part of a bare store takes, in all its forms; 0 if it is gone meanwhile."""
        from kvfs.names import part_path

        folder, size = self.path / ns.hex(), 0
        for coded in (False, True):
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(folder / part_path(key, part, coded)).st_size
        return size

    def header(self, ns: bytes, key: bytes, part: PartId) -> tuple[int, str]:
        """Read the number of tokens of a part and its form; 0 if it has no header that can be read."""
        from kvfs.coded import open_stored

        try:
            with open_stored(self.store, ns, key, part) as file:
                return file.header.meta.tokens, file.header.form
        except (ChunkNotFound, ChunkCorrupt):
            return 0, "raw"


def only(found: list[bytes], word: str) -> bytes:
    """Return the one digest found; ConfigError names them if there are several."""
    if len(found) > 1:
        some = ", ".join(each.hex()[: render.SHORT] for each in sorted(found)[:3])
        raise ConfigError(f"{word} begins {len(found)} names ({some}, …); write more digits")
    return found[0]


def from_snapshot(store: Store) -> Remember:
    """Remember from the index that the last daemon left, if one did."""
    from kvfs.index import Index

    index = Index(store)
    index.load()

    def remember(ns: bytes, key: bytes) -> Usage:
        row = index.get(ns, key)
        return Usage(row.tokens, "raw" if row.raw else "", row.hits, row.last, row.pinned) if row else Usage()

    return remember


def resolve(at: Path | None) -> Target:
    """Find what to look at: ``at``; the configured mount point, if something is mounted there; the configured store;
    the only mount of this host. Raises ConfigError if none is named. Touches no mount."""
    from kvfs.cli import mounts

    if at is None:
        settings, live = config.load(), mounts.mounted_stores()
        if settings.mountpoint and mounts.locate(settings.mountpoint)[1]:
            at = settings.mountpoint
        elif settings.store:
            at = settings.store
        elif len(live) == 1:
            at = live[0]
        else:
            seen = f"this host has {len(live)} mounts" if live else "nothing is mounted"
            raise ConfigError(f"{seen} and no store is configured; name a mount point or a store with --at")
    return Target(*mounts.locate(at))
