"""The chunks of one namespace as the index knows them: rows, and in which forms their parts are stored."""

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np

from kvfs.chunk import layout
from kvfs.codec import FORMS
from kvfs.identity import Manifest
from kvfs.rows import ENDS, Order, Rows, view

TURNS = 64
"""Locks of a namespace (`Index.turn`), each for a share of its chunks."""

__all__ = ["Forms", "Page", "Row", "Table", "Victim"]


class Row(NamedTuple):
    """What the index knows of a chunk: presence mask, bytes of all files, hits, time of the last one (Unix
    seconds, 0 for never), tokens (0 until somebody has read a header), whether it is pinned, and the parts that are
    there in raw and in coded form."""

    mask: int
    size: int
    hits: int
    last: float
    tokens: int
    pinned: bool
    raw: int
    coded: int


class Victim(NamedTuple):
    """A chunk that may go: nothing continues it.  ``stamp`` is the Unix second of its last use or its coming."""

    key: bytes
    mask: int
    size: int
    stamp: int


class Page(NamedTuple):
    """Keys of some rows, the row to go on with (0: there are no more), and whose rows they are: another table, as a
    restart makes one, numbers them anew."""

    keys: list[bytes]
    next: int
    table: int


class Forms(NamedTuple):
    """Bytes of raw and of coded files, bytes that coded parts take less than their raw forms would (of those whose
    header has been read), and chunks by the coarsest form that they were brought to."""

    raw: int
    coded: int
    saved: int
    chunks: dict[str, int]

    @classmethod
    def total(cls, each: Sequence[Self]) -> Self:
        """Of several namespaces."""
        chunks = sum((Counter(f.chunks) for f in each), Counter[str]())
        return cls(sum(f.raw for f in each), sum(f.coded for f in each), sum(f.saved for f in each), dict(chunks))


class Table(Rows):
    """``partial``: chunks with a kind of which head slices are missing, and when (monotonic seconds) the last part
    came."""

    def __init__(self, manifest: Manifest, order: Callable[[Rows], Order] | None) -> None:
        super().__init__(order)
        self.manifest = manifest
        self.born = time.time_ns()
        self.kinds = [manifest.mask_of(kind.name) for kind in manifest.kinds]
        self.partial: dict[bytes, float] = {}
        self.turns = [threading.Lock() for _ in range(TURNS)]

    def wait(self) -> None:
        """Until all who have a turn now have ended it."""
        for turn in self.turns:
            with turn:
                pass

    def restore(self, dumped: dict[str, bytes]) -> None:
        """As `Rows.restore`; ValueError too for parts that the namespace does not have."""
        super().restore(dumped)
        whole = self.manifest.all_parts
        for key, i in self.number.items():
            if self.mask[i] != whole:
                if self.mask[i] & ~whole:
                    raise ValueError("a part that the namespace does not have")
                self.watch(key, self.mask[i])

    def files(self) -> dict[tuple[bytes, bool], int]:
        """By key and form (True: coded), the parts whose files are known."""
        rows = [(key, i) for key, i in self.number.items() if self.mask[i]]
        return {(key, coded): form[i] for coded, form in ((False, self.raw), (True, self.coded)) for key, i in rows}

    def missing(self, mask: int) -> int:
        """The parts present that are of no use, as others of their kind are not there."""
        return sum(mask & kind for kind in self.kinds if mask & kind != kind)

    def watch(self, key: bytes, mask: int) -> None:
        """The mask of a chunk has changed."""
        self.partial.pop(key, None)
        if self.missing(mask):
            self.partial[key] = time.monotonic()

    def page(self, begin: int, count: int) -> Page:
        """The chunks that are there in up to ``count`` rows from number ``begin`` on."""
        end = min(begin + count, len(self.keys))
        rows = zip(self.keys[begin:end], self.mask[begin:end], strict=True)
        return Page([key for key, mask in rows if key is not None and mask], end % len(self.keys), self.born)

    def as_victim(self, i: int) -> Victim:
        """What is told of a row that may go."""
        key = self.keys[i]
        assert key is not None  # it is there
        return Victim(key, self.mask[i], self.size[i], self.stamp[i])

    def cold(self, level: int, before: float, count: int) -> list[bytes]:
        """Up to ``count`` chunks not used since ``before``, the longest unused first, that would be smaller at the form
        number ``level``: not brought to it yet, or with a raw form beside the coded one."""
        raw, coded, stamp = view(self.raw)[ENDS:], view(self.coded)[ENDS:], view(self.stamp)[ENDS:]
        finer = (view(self.mask)[ENDS:] != 0) & (view(self.level)[ENDS:] < level)
        rows = np.flatnonzero((stamp < before) & (finer | (raw & coded != 0)))
        if len(rows) > count:
            rows = rows[np.argpartition(stamp[rows], count)[:count]]
        keys = (self.keys[row + ENDS] for row in rows[np.argsort(stamp[rows], kind="stable")].tolist())
        return [key for key in keys if key is not None]

    def forms(self) -> Forms:
        """What the forms take and save."""
        coded, raw = view(self.coded), view(self.raw)
        packed = int(view(self.packed).sum())
        known = int(view(self.packed)[view(self.tokens) > 0].sum())
        masks, which = np.unique(coded & ~raw, return_inverse=True)
        tokens = np.bincount(which, weights=view(self.tokens), minlength=len(masks)).tolist()
        instead = sum(int(n) * self._bytes_of_token(mask) for mask, n in zip(masks.tolist(), tokens, strict=True))
        counts = np.bincount(view(self.level)[coded != 0], minlength=len(FORMS)).tolist()
        chunks = {form: n for form, n in zip(FORMS, counts, strict=True) if n}
        return Forms(self.bytes - packed, packed, instead - known, chunks)

    @functools.cache  # noqa: B019 - a handful of masks, and the table lives as long
    def _bytes_of_token(self, mask: int) -> int:
        """Bytes that these parts of one token take in the raw form."""
        parts = [part for part in self.manifest.parts if mask & self.manifest.bit(part)]
        whole = self.manifest.chunk_tokens
        return sum(layout(self.manifest, part, whole).nbytes for part in parts) // whole
