"""What is in a store, in memory: one row a chunk.  A snapshot on disk makes a restart quick and may be lost.

A row costs under 300 bytes: a dictionary from key to row number, and columns.  The tree is the truth;
`reconcile` lists it, without reading any payload, and corrects the rows.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from kvfs import _native, files
from kvfs.errors import IdentityError, NamespaceNotFound
from kvfs.identity import Manifest, PartId
from kvfs.names import part_path
from kvfs.store import Store

__all__ = ["Index", "Row"]

_MAGIC = b"kvfs-index/1\n"
_COLUMNS = ("mask", "size", "hits", "last", "tokens")


class Row(NamedTuple):
    """What the index knows of a chunk: presence mask, bytes of all parts, hits, time of the last one (Unix
    seconds, 0 for never) and tokens (0 until somebody has read a header)."""

    mask: int
    size: int
    hits: int
    last: float
    tokens: int


class _Table:
    """The chunks of one namespace."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.rows: dict[bytes, int] = {}
        self.mask = array("Q")
        self.size = array("q")
        self.hits = array("I")
        self.last = array("d")
        self.tokens = array("H")
        self.free: list[int] = []
        self.bytes = 0

    def columns(self) -> tuple["array[Any]", ...]:
        return self.mask, self.size, self.hits, self.last, self.tokens

    def row(self, key: bytes) -> int:
        i = self.rows.get(key)
        if i is None:
            if self.free:
                i = self.free.pop()
            else:
                i = len(self.mask)
                for c in self.columns():
                    c.append(0)
            self.rows[key] = i
        return i

    def drop(self, key: bytes) -> None:
        i = self.rows.pop(key)
        self.bytes -= self.size[i]
        for c in self.columns():
            c[i] = 0
        self.free.append(i)


class Index:
    """Rows of all namespaces of a store.  Every method may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._tables: dict[bytes, _Table] = {}
        self._lock = threading.Lock()

    def _table(self, ns: bytes) -> _Table:
        t = self._tables.get(ns)
        if t is None:
            t = self._tables.setdefault(ns, _Table(self.store.manifest(ns)))
        return t

    # --- what is there ---

    def masks(self, ns: bytes, keys: Sequence[bytes]) -> list[int]:
        """Presence mask of each key; 0 where nothing is stored."""
        t = self._table(ns)
        rows, mask = t.rows, t.mask
        with self._lock:
            return [mask[i] if (i := rows.get(k)) is not None else 0 for k in keys]

    def get(self, ns: bytes, key: bytes) -> Row | None:
        t = self._table(ns)
        with self._lock:
            i = t.rows.get(key)
            return None if i is None else Row(*(c[i] for c in t.columns()))

    def keys(self, ns: bytes) -> list[bytes]:
        """All keys of a namespace, in the order they came."""
        with self._lock:
            return list(self._table(ns).rows)

    def namespaces(self) -> list[bytes]:
        with self._lock:
            return sorted(self._tables)

    def totals(self, ns: bytes | None = None) -> tuple[int, int]:
        """Chunks and bytes of one namespace, or of all."""
        with self._lock:
            tables = self._tables.values() if ns is None else [t for n, t in self._tables.items() if n == ns]
            return sum(len(t.rows) for t in tables), sum(t.bytes for t in tables)

    # --- what happens ---

    def register(self, ns: bytes) -> None:
        """Make a namespace known that has no chunks yet; NamespaceNotFound if the store has none such."""
        self._table(ns)

    def add(self, ns: bytes, key: bytes, part: PartId, size: int, tokens: int = 0) -> bool:
        """A part has appeared; False if it was known.  ``size`` in bytes."""
        t = self._table(ns)
        bit = t.manifest.bit(part)
        with self._lock:
            i = t.row(key)
            if tokens:
                t.tokens[i] = tokens
            if t.mask[i] & bit:
                return False
            t.mask[i] |= bit
            t.size[i] += size
            t.bytes += size
            return True

    def discard(self, ns: bytes, key: bytes, part: PartId | None = None, size: int = 0) -> None:
        """A part of ``size`` bytes, or (None) the whole chunk, is gone."""
        t = self._table(ns)
        with self._lock:
            i = t.rows.get(key)
            if i is None:
                return
            bit = t.manifest.all_parts if part is None else t.manifest.bit(part)
            if not t.mask[i] & ~bit:
                t.drop(key)
            elif t.mask[i] & bit:
                t.mask[i] &= ~bit
                size = min(size, t.size[i])
                t.size[i] -= size
                t.bytes -= size

    def forget(self, ns: bytes) -> None:
        """A namespace has been retired."""
        with self._lock:
            self._tables.pop(ns, None)

    def touch(self, ns: bytes, keys: Iterable[bytes], now: float | None = None) -> None:
        """Chunks have been used: by a lease or an open."""
        now = time.time() if now is None else now
        t = self._table(ns)
        with self._lock:
            for key in keys:
                i = t.rows.get(key)
                if i is not None:
                    t.hits[i] += 1
                    t.last[i] = now

    # --- against the tree ---

    def reconcile(self, on_change: Callable[[bytes, bytes, PartId, bool], None] | None = None) -> tuple[int, int]:
        """List the store and correct the rows; returns parts found anew and parts found gone.

        ``on_change(ns, key, part, appeared)`` hears of each.  Parts published while this runs are kept.
        """
        found = gone = 0
        present = set(self.store.namespaces())
        for ns in set(self._tables) - present:
            self.forget(ns)
        for ns in present:
            f, g = self._reconcile(ns, self._table(ns), on_change)
            found, gone = found + f, gone + g
        return found, gone

    def _reconcile(
        self, ns: bytes, t: _Table, on_change: Callable[[bytes, bytes, PartId, bool], None] | None
    ) -> tuple[int, int]:
        before = dict(zip(keys := self.keys(ns), self.masks(ns, keys), strict=True))
        found = gone = 0
        for key, part, entry in self.store.scan(ns):
            try:
                bit = t.manifest.bit(part)
            except IdentityError:
                continue
            known = before.get(key, 0)
            before[key] = known & ~bit
            if not known & bit:
                with contextlib.suppress(FileNotFoundError):
                    if self.add(ns, key, part, entry.stat(follow_symlinks=False).st_size):
                        found += 1
                        if on_change:
                            on_change(ns, key, part, True)
        for key, part in self._vanished(ns, t.manifest, before):
            self.discard(ns, key, part, self._mean_size(t, key))
            gone += 1
            if on_change:
                on_change(ns, key, part, False)
        return found, gone

    def _vanished(self, ns: bytes, manifest: Manifest, unseen: dict[bytes, int]) -> Iterator[tuple[bytes, PartId]]:
        """Of the parts a listing did not show, those that a second look does not find either."""
        for key, mask in unseen.items():
            for part in manifest.parts if mask else ():
                if mask & manifest.bit(part) and not os.path.lexists(self.store.path / ns.hex() / part_path(key, part)):
                    yield key, part

    @staticmethod
    def _mean_size(t: _Table, key: bytes) -> int:
        i = t.rows.get(key)
        return 0 if i is None else t.size[i] // max(1, t.mask[i].bit_count())

    # --- snapshot ---

    @property
    def snapshot_path(self) -> Path:
        return self.store.derived / f"index.{socket.gethostname()}.snapshot"

    def save(self) -> None:
        """Write the snapshot: derived data, safe to delete at any time."""
        with self._lock:
            body: dict[bytes, dict[str, bytes]] = {}
            for ns, t in self._tables.items():
                order = array("Q", t.rows.values())
                columns = (array(c.typecode, (c[i] for i in order)) for c in t.columns())
                body[ns] = {name: c.tobytes() for name, c in zip(_COLUMNS, columns, strict=True)}
                body[ns]["keys"] = b"".join(t.rows)
        raw = msgpack.packb(body)
        files.replace(self.snapshot_path, _MAGIC + struct.pack("<Q", _native.xxh3_64(raw)) + raw)

    def load(self) -> bool:
        """Read the snapshot; False, and an empty index, if there is none that is whole."""
        try:
            raw = memoryview(self.snapshot_path.read_bytes())
            head = len(_MAGIC) + 8
            if raw[: len(_MAGIC)] != _MAGIC or struct.unpack("<Q", raw[len(_MAGIC) : head])[0] != _native.xxh3_64(
                raw[head:]
            ):
                return False
            body = msgpack.unpackb(raw[head:], strict_map_key=False)
            tables = dict(self._read_table(ns, d) for ns, d in body.items() if self._known(ns))
        except (OSError, ValueError, TypeError, KeyError, struct.error):
            return False
        with self._lock:
            self._tables = tables
        return True

    def _known(self, ns: bytes) -> bool:
        try:
            self.store.manifest(ns)
        except (NamespaceNotFound, IdentityError):
            return False
        return True

    def _read_table(self, ns: bytes, d: dict[str, bytes]) -> tuple[bytes, _Table]:
        t = _Table(self.store.manifest(ns))
        blob = d["keys"]
        t.rows = {blob[i : i + 32]: i // 32 for i in range(0, len(blob), 32)}
        for name, column in zip(_COLUMNS, t.columns(), strict=True):
            column.frombytes(d[name])
            if len(column) != len(t.rows):
                raise ValueError(f"column {name} does not fit the keys")
        t.bytes = sum(t.size)
        return ns, t

    def check_integrity(self) -> None:
        """AssertionError if rows and columns disagree; for tests."""
        with self._lock:
            for t in self._tables.values():
                numbers = set(t.rows.values()) | set(t.free)
                if not len(t.rows) + len(t.free) == len(t.mask) == len(numbers):
                    raise AssertionError("rows and columns do not match")
                if t.bytes != sum(t.size) or not all(t.mask[i] for i in t.rows.values()):
                    raise AssertionError("a row is empty, or the total is not the sum of the rows")
