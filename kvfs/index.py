"""What is in a store, in memory: one row a chunk.  A snapshot on disk makes a restart quick and may be lost.

The tree is the truth; `reconcile` lists it, without reading any payload, and corrects the rows.  What a listing does
not tell, the parent of a chunk, is learnt from one header each, later.
"""

import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgpack

from kvfs import _native, files
from kvfs.chunk import PartMeta
from kvfs.errors import IdentityError, NamespaceNotFound
from kvfs.identity import PartId
from kvfs.rows import NONE, PINNED, Order, Rows
from kvfs.store import Store
from kvfs.table import TURNS, Forms, Page, Row, Table, Victim

__all__ = ["Index", "Row", "Victim"]

_MAGIC = b"kvfs-index/3\n"
OnChange = Callable[[bytes, bytes, PartId, bool], None]
PATIENCE = 1024
"""Chunks that must stay and are passed over, at most, in the search for one that may go."""


class Index:
    """Rows of all namespaces of a store, in the order that ``policy`` gives them.  Every method may be called from any
    thread; those that name a namespace raise NamespaceNotFound if the store has none such."""

    def __init__(self, store: Store, policy: Callable[[Rows], Order] | None = None) -> None:
        self.store, self._policy = store, policy
        self._tables: dict[bytes, Table] = {}
        self._lock = threading.Lock()
        self._changed = True  # since the last snapshot

    def _table(self, ns: bytes) -> Table:
        t = self._tables.get(ns)
        if t is None:
            made = Table(self.store.manifest(ns), self._policy)
            with self._lock:  # others go through them
                t = self._tables.setdefault(ns, made)
        return t

    @contextlib.contextmanager
    def turn(self, ns: bytes, key: bytes) -> Iterator[None]:
        """For one at a time, to look at the files of a chunk or change them, and tell it here: what was seen before a
        change is not told after it.  Never take two."""
        while True:
            t = self._table(ns)
            with t.turns[key[-1] % TURNS]:
                if self._tables.get(ns) is t:  # else it was retired, and made anew, while this waited
                    yield
                    return

    # --- what is there ---

    def masks(self, ns: bytes, keys: Sequence[bytes]) -> list[int]:
        """Presence mask of each key; 0 where nothing is stored."""
        t = self._table(ns)
        mask, number = t.mask, t.number
        with self._lock:
            return [mask[number.get(key, NONE)] for key in keys]

    def get(self, ns: bytes, key: bytes) -> Row | None:
        t = self._table(ns)
        with self._lock:
            i = t.find(key)
            if not i:
                return None
            last = float(t.stamp[i]) if t.hits[i] else 0.0
            is_pinned = bool(t.flags[i] & PINNED)
            return Row(t.mask[i], t.size[i], t.hits[i], last, t.tokens[i], is_pinned, t.raw[i], t.coded[i])

    def page(self, ns: bytes, begin: int, count: int) -> Page:
        """The keys found in up to ``count`` rows from number ``begin`` on."""
        t = self._table(ns)
        with self._lock:
            return t.page(begin, count)

    def namespaces(self) -> list[bytes]:
        with self._lock:
            return sorted(self._tables)

    def totals(self, ns: bytes | None = None) -> tuple[int, int]:
        """Chunks and bytes of one namespace, or of all."""
        with self._lock:
            tables = self._tables.values() if ns is None else [t for n, t in self._tables.items() if n == ns]
            return sum(map(len, tables)), sum(t.bytes for t in tables)

    def forms(self, ns: bytes | None = None) -> Forms:
        """What the forms of the parts of a namespace, or of all, take and save."""
        tables = [self._table(n) for n in ([ns] if ns else self.namespaces())]
        with self._lock:
            return Forms.total([t.forms() for t in tables])

    # --- what happens ---

    def register(self, ns: bytes) -> None:
        """Make a namespace known that has no chunks yet."""
        self._table(ns)

    def add(
        self, ns: bytes, key: bytes, part: PartId, size: int, meta: PartMeta | None = None, coded: bool = False
    ) -> bool:
        """A file of a part, ``size`` bytes, has appeared, with ``meta`` in its header if that was read; False if the
        part was known in one form or the other."""
        t = self._table(ns)
        bit, now = t.manifest.bit(part), int(time.time())
        with self._lock:
            i = t.make(key)
            is_new = not t.mask[i] & bit
            self._changed = True
            if not (t.coded if coded else t.raw)[i] & bit:
                t.fill(i, bit, size, now, coded)
                t.watch(key, t.mask[i])
            if meta is not None:
                self._learn(t, i, meta, now)
            elif is_new and t.mask[i] == bit:
                t.unlearnt.append(i)
            return is_new

    def add_form(self, ns: bytes, key: bytes, part: PartId, size: int, coded: bool) -> bool:
        """A part that is there has got a file of its other form; False if it is gone meanwhile."""
        t, bit = self._table(ns), self.store.manifest(ns).bit(part)
        with self._lock:
            i = t.find(key)
            if t.mask[i] & bit and not (t.coded if coded else t.raw)[i] & bit:  # a listing may have been quicker
                t.fill(i, bit, size, 0, coded)
                self._changed = True
            return bool(t.mask[i] & bit)

    @staticmethod
    def _learn(t: Table, i: int, meta: PartMeta, now: int) -> None:
        t.learn(i, meta.parent if meta.position else None, meta.position // t.manifest.chunk_tokens, meta.tokens, now)

    def discard(
        self, ns: bytes, key: bytes, part: PartId | None = None, size: int | None = None, coded: bool = False
    ) -> bool:
        """A file of a part, of ``size`` bytes (None: the mean of its chunk's), or (None) the whole chunk, is gone. True
        if the part was there and is not any more, in either form."""
        t = self._table(ns)
        with self._lock:
            i = t.find(key)
            before, self._changed = t.mask[i], self._changed or bool(i)
            form = t.coded if coded else t.raw
            if i and part is None:
                t.clear(i)
            elif part is not None and form[i] & t.manifest.bit(part):
                total = t.packed[i] if coded else t.size[i] - t.packed[i]
                t.drain(i, t.manifest.bit(part), total // form[i].bit_count() if size is None else size, coded)
            left = t.mask[t.find(key)]
            if left != before:
                t.watch(key, left)
            if left and not t.is_known(i):
                t.unlearnt.append(i)
            return left != before

    def forget(self, ns: bytes) -> None:
        """A namespace has been retired."""
        if (t := self._tables.get(ns)) is not None:
            t.wait()  # who looked at its files before that tells it now, not to one that is made anew
        with self._lock:
            self._tables.pop(ns, None)
            self._changed = True

    def look(self, ns: bytes, keys: Sequence[bytes]) -> list[int]:
        """As `masks`, for one who is about to read: of chunks in the order of a text, those present up to the first gap
        count as used.  Of tails that may continue one text, longest first, the first is kept in mind: a longer one,
        or the full chunk, will take its place."""
        t = self._table(ns)
        now, whole = int(time.time()), t.manifest.chunk_tokens
        with self._lock:
            rows = [t.number.get(key, NONE) for key in keys]
            masks = [t.mask[i] for i in rows]
            first = next((n for n, mask in enumerate(masks) if mask), None)
            if first is not None and 0 < t.tokens[rows[first]] < whole:
                if t.parent[rows[first]]:
                    t.tail[t.parent[rows[first]]] = rows[first]
            elif first == 0:
                end = next((n for n, mask in enumerate(masks) if not mask), len(masks))
                t.use(rows[end - 1], now)
                self._changed = True
            return masks

    def touch(self, ns: bytes, keys: Iterable[bytes], now: float | None = None) -> None:
        """Chunks have been used: by a lease or an open."""
        at = int(time.time() if now is None else now)
        t = self._table(ns)
        with self._lock:
            self._changed = True
            for i in filter(None, map(t.find, reversed(list(keys)))):
                t.hits[i] += 1
                t.use(i, at)
                t.stamp[i] = at

    def pin(self, ns: bytes, key: bytes, pinned: bool) -> bool:
        """Say whether a chunk, and with it all before it in its text, must stay; False if there is no such chunk."""
        t = self._table(ns)
        with self._lock:
            i = t.find(key)
            if not i:
                return False
            t.flags[i] = t.flags[i] | PINNED if pinned else t.flags[i] & ~PINNED
            self._changed = True
            return True

    def pinned(self) -> list[tuple[bytes, bytes]]:
        """Namespace and key of every chunk that is pinned."""
        with self._lock:
            return [(ns, key) for ns, t in self._tables.items() for key in t.pinned()]

    # --- what may go ---

    def victim(self, ns: bytes) -> Victim | None:
        """The chunk of a namespace to go first.  Ask only when `unlearnt` is empty: a child may be unknown."""
        t = self._table(ns)
        with self._lock:
            return t.as_victim(i) if (i := t.victim(PATIENCE)) else None

    def evict(self, ns: bytes, key: bytes) -> Victim | None:
        """Drop a chunk and return it; None if something continues it now, it is pinned, or gone already."""
        t = self._table(ns)
        with self._lock:
            i = t.find(key)
            if not i or t.children[i] or t.flags[i] & PINNED:
                return None
            gone = t.as_victim(i)
            t.clear(i)
            t.partial.pop(key, None)
            self._changed = True
            return gone

    def spare(self, ns: bytes, key: bytes) -> None:
        """The victim has to stay for now: count it as used."""
        t = self._table(ns)
        with self._lock:
            if i := t.find(key):
                t.use(i, int(time.time()), again=True)

    def idle(self, ns: bytes, begin: int, count: int, before: float) -> tuple[list[Victim], int]:
        """Chunks not used since ``before`` that may go, one after the other, found below ``count`` rows from number
        ``begin`` on; and where to go on (0: from the start)."""
        t = self._table(ns)
        with self._lock:
            end = min(begin + count, len(t.keys))
            found = [
                t.as_victim(i)
                for leaf in range(begin, end)
                if t.is_known(leaf) and not t.children[leaf]
                for i in t.idle(leaf, before)
            ]
            return found, end if end < len(t.keys) else 0

    def partial(self, ns: bytes, age: float) -> list[tuple[bytes, int]]:
        """Chunks incomplete since ``age`` seconds: keys, and the parts present that are of no use without others."""
        t = self._table(ns)
        with self._lock:
            until = time.monotonic() - age
            old = itertools.takewhile(lambda item: item[1] <= until, t.partial.items())
            return [(key, t.missing(t.mask[t.number[key]])) for key, _ in old]

    def cold(self, ns: bytes, level: int, before: float, count: int) -> list[bytes]:
        """Chunks to bring to the form number ``level`` (of `FORMS`): see `Table.cold`."""
        t = self._table(ns)
        with self._lock:
            return t.cold(level, before, count)

    def brought(self, ns: bytes, key: bytes, level: int) -> None:
        """A chunk has been brought to the form number ``level``, as far as it can be."""
        t = self._table(ns)
        with self._lock:
            if i := t.find(key):
                t.level[i] = level
                self._changed = True

    def unlearnt(self, ns: bytes, count: int) -> list[tuple[bytes, PartId, bool]]:
        """Up to ``count`` chunks whose parent nobody knows, each with a part whose header to read, and whether that is
        coded; they are asked for once, until the next listing."""
        t = self._table(ns)
        with self._lock:
            found: list[tuple[bytes, PartId, bool]] = []
            while t.unlearnt and len(found) < count:
                i = t.unlearnt.pop()
                key = t.keys[i]
                if key is not None and t.mask[i] and not t.is_known(i):
                    part = next(p for p in t.manifest.parts if t.mask[i] & t.manifest.bit(p))
                    found.append((key, part, not t.raw[i] & t.manifest.bit(part)))
            return found

    def learn(self, ns: bytes, meta: PartMeta) -> None:
        """A header has been read."""
        t = self._table(ns)
        with self._lock:
            if i := t.find(meta.key):
                self._learn(t, i, meta, t.stamp[i])
                self._changed = True

    # --- against the tree ---

    def reconcile(self, on_change: OnChange = lambda *_: None) -> tuple[int, int]:
        """List the store and correct the rows; returns parts found anew and parts found gone.

        ``on_change(ns, key, part, appeared)`` hears of each, and of those whose raw form is gone. Parts published while
        this runs are kept."""
        found = gone = 0
        with self._lock:
            before = dict(self._tables)
        present = set(self.store.namespaces())
        with self._lock:
            for ns in before.keys() - present:
                if self._tables.get(ns) is before[ns]:  # else it was retired and made anew while the store was listed
                    del self._tables[ns]
                    self._changed = True
        for ns in present:
            with contextlib.suppress(NamespaceNotFound):  # retired meanwhile
                f, g = self._reconcile(ns, self._table(ns), on_change)
                found, gone = found + f, gone + g
        return found, gone

    def _reconcile(self, ns: bytes, t: Table, on_change: OnChange) -> tuple[int, int]:
        found = gone = 0
        for key, part, coded in self._suspects(ns, t):
            with self.turn(ns, key):
                if (size := self.store.size(ns, key, part, coded)) is not None:
                    if self.add(ns, key, part, size, coded=coded):
                        found += 1
                        on_change(ns, key, part, True)
                else:
                    gone += (is_gone := self.discard(ns, key, part, coded=coded))
                    if is_gone or not coded:
                        on_change(ns, key, part, False)
        return found, gone

    def _suspects(self, ns: bytes, t: Table) -> Iterator[tuple[bytes, PartId, bool]]:
        """The files that a listing shows and the rows do not, and the other way round."""
        with self._lock:
            known = t.files()
        for key, part, _, coded in self.store.scan(ns):
            with contextlib.suppress(IdentityError):
                bit = t.manifest.bit(part)
                if known.get((key, coded), 0) & bit:
                    known[key, coded] &= ~bit
                else:
                    yield key, part, coded
        for (key, coded), mask in known.items():
            yield from ((key, part, coded) for part in t.manifest.parts if mask & t.manifest.bit(part))

    # --- snapshot ---

    @property
    def snapshot_path(self) -> Path:
        return self.store.derived / f"index.{socket.gethostname()}.snapshot"

    def save(self) -> None:
        """Write the snapshot, unless it is there and nothing has changed: derived data, safe to delete at any time."""
        with self._lock:
            if not self._changed and self.snapshot_path.exists():
                return
            frozen = {ns: t.freeze() for ns, t in self._tables.items()}
            self._changed = False
        raw = msgpack.packb({ns: f.dump() for ns, f in frozen.items()})
        try:
            files.replace(self.snapshot_path, _MAGIC + struct.pack("<Q", _native.xxh3_64(raw)) + raw)
        except OSError:
            self._changed = True
            raise

    def load(self) -> bool:
        """Read the snapshot; False, and an empty index, if there is none that is whole."""
        try:
            raw = files.read_sealed(self.snapshot_path, _MAGIC)
            if raw is None:
                return False
            body = msgpack.unpackb(raw, strict_map_key=False)
            tables = {}
            for ns, dumped in dict(body).items():
                with contextlib.suppress(NamespaceNotFound, IdentityError):
                    tables[ns] = Table(self.store.manifest(ns), self._policy)
                    tables[ns].restore(dumped)
        except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, struct.error):
            return False
        with self._lock:
            self._tables, self._changed = tables, False
        return True

    def check_integrity(self) -> None:
        """AssertionError if rows, columns, trees and totals disagree; for tests."""
        with self._lock:
            for t in self._tables.values():
                t.check_integrity()
                partial = {key for key, i in t.number.items() if t.missing(t.mask[i])}
                assert partial == set(t.partial), "not the chunks that are incomplete"
