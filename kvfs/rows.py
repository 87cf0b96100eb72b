"""The chunks of one namespace as numbered rows: columns of numbers, and the tree of prefixes they form.

A row costs about 290 bytes, its key included.  The first `ENDS` numbers are no chunks: 0 stands for "none", and all
are free for an `Order` to close its lists with.  Not thread-safe; `kvfs.index` locks.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["ENDS", "NONE", "PINNED", "UNKNOWN", "Frozen", "Order", "Rows", "view"]

ENDS = 64
NONE = 0
_STEP = 8192
"""Keys joined in one go, so that other threads get their turn."""
MAX_SIZE = 1 << 48
"""Bytes of a chunk that a snapshot may state: the sum over all of them has to fit into a number."""
PINNED, UNKNOWN = 1, 2
"""Flags: not to be evicted; no header has been read yet, so the parent is not known."""


class Order(Protocol):
    """The order in which rows go: what a policy (`kvfs.upkeep.policy`) hears of and is asked for.

    It hears only of rows that are known, that is, whose parent is.
    """

    def add(self, row: int) -> None:
        """A row has come; its ancestors have been renewed just before."""

    def use(self, chain: Sequence[int], behind: int, /) -> None:
        """Rows have been used: chunks of one text in their order, the first of which continues ``behind`` or NONE."""

    def renew(self, chain: Sequence[int], behind: int, /) -> None:
        """A chunk has come that continues these, which are told as in `use`; nobody has read them."""

    def drop(self, row: int) -> None:
        """A row goes; it is no longer counted among the children of its parent."""

    def demote(self, row: int) -> None:
        """A row without children is of no use any more."""

    def victim(self) -> int:
        """The row to go next, or NONE."""


class Rows:
    """Keys, columns, tree.

    A row with an empty mask is hollow: a chunk that is not there, though some that continue it are.  ``raw`` and
    ``coded`` are the parts stored in each form, of which ``mask`` is either; ``size`` is the bytes of all files,
    ``packed`` those of coded ones, ``level`` the number of the coarsest form that was tried.  ``depth`` is the
    number of chunks before it in its text, ``stamp`` the Unix second of its last use or its coming, ``tail``, of a few,
    the tail of a text that was last found to continue it.  ``newer``, ``older``, ``queue`` and ``due`` are the order's.
    """

    KEPT = (
        "mask", "raw", "coded", "size", "packed", "level", "hits", "stamp", "tokens", "depth", "flags", "uses", "parent"
    )  # fmt: skip
    """Columns of a snapshot; the others follow from these."""
    DERIVED = ("children", "newer", "older", "queue", "due")

    def __init__(self, order: Callable[["Rows"], Order] | None = None) -> None:
        self.number: dict[bytes, int] = {}
        self.keys: list[bytes | None] = [None] * ENDS
        self.mask, self.raw, self.coded = array("Q"), array("Q"), array("Q")
        self.size, self.packed, self.level = array("q"), array("q"), array("B")
        self.hits, self.stamp, self.depth = array("I"), array("I"), array("I")
        self.tokens, self.flags, self.uses = array("H"), array("B"), array("B")
        self.parent, self.children = array("I"), array("I")
        self.tail: dict[int, int] = {}
        self.newer, self.older, self.queue, self.due = array("I"), array("I"), array("B"), array("I")
        for c in self.columns():
            c.extend([0] * ENDS)
        self.free: list[int] = []
        self.unlearnt = array("I")  # rows that came without a header; some may be known by now
        self.unknown = self.hollow = self.bytes = 0
        self.order = order(self) if order else None

    def columns(self) -> Iterator["array[Any]"]:
        """All columns."""
        return (getattr(self, name) for name in self.KEPT + self.DERIVED)

    def __len__(self) -> int:
        """How many chunks are there."""
        return len(self.number) - self.hollow

    def find(self, key: bytes) -> int:
        """The row of a chunk that is there, or NONE."""
        row = self.number.get(key, NONE)
        return row if self.mask[row] else NONE

    def is_known(self, row: int) -> bool:
        """Whether it is a chunk that is there and whose parent is known."""
        return self.mask[row] != 0 and not self.flags[row] & UNKNOWN

    # --- coming and going ---

    def make(self, key: bytes) -> int:
        """The row of a key; a new one is hollow."""
        row = self.number.get(key)
        if row is None:
            if self.free:
                row = self.free.pop()
                self.keys[row] = key
            else:
                row = len(self.keys)
                self.keys.append(key)
                for c in self.columns():
                    c.append(0)
            self.number[key] = row
            self.flags[row] = UNKNOWN
            self.hollow += 1
        return row

    def fill(self, row: int, bits: int, size: int, now: int, coded: bool = False) -> None:
        """Parts of a chunk have come in one form, ``size`` bytes."""
        if not self.mask[row]:
            self.hollow -= 1
            self.unknown += 1
            self.stamp[row] = now
        self.mask[row] |= bits
        self.size[row] += size
        self.bytes += size
        if coded:
            self.coded[row] |= bits
            self.packed[row] += size
        else:
            if bits & ~self.coded[row]:
                self.level[row] = 0
            self.raw[row] |= bits

    def drain(self, row: int, bits: int, size: int, coded: bool = False) -> None:
        """Parts of a chunk are gone in one form."""
        form = self.coded if coded else self.raw
        form[row] &= ~bits
        left = self.raw[row] | self.coded[row]
        if not left:
            self.clear(row)
            return
        most = self.packed[row] if coded else self.size[row] - self.packed[row]
        size = min(size, most) if form[row] else most
        self.mask[row] = left
        self.size[row] -= size
        self.bytes -= size
        if coded:
            self.packed[row] -= size

    def clear(self, row: int) -> None:
        """A chunk is gone, and with it its row, which stays as long as it has children."""
        self.bytes -= self.size[row]
        self.size[row] = self.packed[row] = self.raw[row] = self.coded[row] = self.level[row] = 0
        parent = self._leave(row)
        self.mask[row] = 0
        self.hollow += 1
        for each in (row, parent):
            if each and not self.mask[each] and not self.children[each]:
                self._free(each)

    def _leave(self, row: int) -> int:
        """Take a row out of the tree and the order; returns what was its parent."""
        parent = self.parent[row]
        if parent:
            self.children[parent] -= 1
        if self.flags[row] & UNKNOWN:
            self.unknown -= 1
        elif self.order:
            self.order.drop(row)
        self.parent[row] = NONE
        self.flags[row] = UNKNOWN
        self.hits[row] = self.uses[row] = 0
        self.tail.pop(row, None)
        return parent

    def _free(self, row: int) -> None:
        key, self.keys[row] = self.keys[row], None
        if key is not None:
            del self.number[key]
        for c in self.columns():
            c[row] = 0
        self.free.append(row)
        self.hollow -= 1

    # --- the tree ---

    def learn(self, row: int, parent: bytes | None, depth: int, tokens: int, now: int) -> None:
        """What the header of a chunk says: the key of its parent (None for the first chunk of a text), the number of
        chunks before it, its tokens.  A parent that does not lie one chunk before it is not believed."""
        if not self.flags[row] & UNKNOWN:
            return
        self.flags[row] &= ~UNKNOWN
        self.unknown -= 1
        self.tokens[row] = tokens
        if not self.children[row]:
            self.depth[row] = depth
        if parent is not None and depth and self.depth[row] == depth:
            self._link(row, self.make(parent), depth)
        if self.order:
            self.order.renew(*self._climb(self.parent[row], now))
            self.order.add(row)
            if self.children[row]:
                self.order.renew(*self._climb(row, now, again=True))

    def _link(self, row: int, parent: int, depth: int) -> None:
        if self.flags[parent] & UNKNOWN and not self.children[parent]:
            self.depth[parent] = depth - 1
        if self.depth[parent] != depth - 1:
            return
        self.parent[row] = parent
        self.children[parent] += 1
        tail = self.tail.pop(parent, NONE)
        if tail and self.parent[tail] == parent and self.tokens[tail] < self.tokens[row] and self.order:
            self.order.demote(tail)

    def use(self, row: int, now: int, again: bool = False) -> None:
        """A chunk has been read, and with it all before it in its text.  Once a second counts, unless ``again``."""
        chain, behind = self._climb(row, now, again)
        if chain and self.order:
            self.order.use(chain, behind)

    def _climb(self, row: int, now: int, again: bool = False) -> tuple[list[int], int]:
        """Stamp a chunk and all before it in its text, so that none is older than one that continues it; returns them
        from the first on, and the one before that.

        What has been stamped in this second has ancestors that have been, so the way up ends there, unless ``again``.
        """
        chain = []
        while self.is_known(row) and (again or self.stamp[row] != now):
            self.stamp[row] = now
            chain.append(row)
            row = self.parent[row]
        chain.reverse()
        return chain, row if self.is_known(row) else NONE

    def victim(self, patience: int) -> int:
        """The row to go next, or NONE.  Rows that must stay are put off, at most ``patience`` of them."""
        if self.order:
            for _ in range(patience):
                row = self.order.victim()
                if not row or not (self.children[row] or self.flags[row] & PINNED):
                    return row
                self.use(row, self.stamp[row], again=True)
        return NONE

    def idle(self, leaf: int, before: float) -> Iterator[int]:
        """From a leaf up, the rows not used since ``before`` that may go once the one before them is gone."""
        row = leaf
        while row and self.stamp[row] < before and not self.flags[row] & PINNED and self.children[row] == (row != leaf):
            yield row
            row = self.parent[row]

    def pinned(self) -> list[bytes]:
        """Keys of the chunks that are not to be evicted."""
        rows = np.nonzero(view(self.flags) & PINNED)[0].tolist()
        return [key for row in rows if (key := self.keys[row]) is not None and self.mask[row]]

    # --- snapshots ---

    def freeze(self) -> "Frozen":
        """A copy of what cannot be derived, quickly, for `Frozen.dump` to make bytes of at leisure."""
        return Frozen(self.keys[:], {name: getattr(self, name)[:] for name in self.KEPT})

    def restore(self, dumped: dict[str, bytes]) -> None:
        """Fill empty rows with what `Frozen.dump` gave; ValueError or KeyError if it does not fit together."""
        blob = dumped["keys"]
        self.keys += (keys := [blob[i : i + 32] for i in range(0, len(blob), 32)])
        self.number = dict(zip(keys, range(ENDS, len(self.keys)), strict=True))
        for name in self.KEPT:
            getattr(self, name).frombytes(dumped[name])
        for name in self.DERIVED:
            getattr(self, name).extend(bytes(len(keys)))
        if any(len(c) != len(self.keys) for c in self.columns()) or len(self.number) != len(keys) or len(blob) % 32:
            raise ValueError("the columns do not fit the keys")
        parent, depth, mask = view(self.parent), view(self.depth), view(self.mask)
        size, packed = view(self.size), view(self.packed)
        if parent.max() > len(keys) or packed.min() < 0 or np.any(packed > size) or size.max() > MAX_SIZE:
            raise ValueError("a number is out of bounds")
        if np.any(mask != (view(self.raw) | view(self.coded))) or np.any((mask == 0) & (size > 0)):
            raise ValueError("parts in no form, or bytes of no part")
        parent[parent > 0] += ENDS - 1
        if np.any((parent > 0) & (depth[parent] + 1 != depth)):  # so there are no circles either
            raise ValueError("a parent that does not lie one chunk before its child")
        view(self.children)[:] = np.bincount(parent[ENDS:], minlength=len(self.keys))
        self.children[NONE] = 0
        is_there = view(self.mask)[ENDS:] != 0
        is_known = is_there & (view(self.flags)[ENDS:] & UNKNOWN == 0)
        self.hollow = int(np.count_nonzero(~is_there))
        self.unknown = int(np.count_nonzero(is_there & ~is_known))
        self.bytes = int(view(self.size).sum())
        self.unlearnt.frombytes((np.nonzero(is_there & ~is_known)[0] + ENDS).astype(np.uint32).tobytes())
        if self.order:
            age = np.lexsort((-view(self.depth).astype(np.int64), view(self.stamp)))
            for row in age[np.concatenate((np.zeros(ENDS, dtype=bool), is_known))[age]].tolist():
                self.order.add(row)

    def check_integrity(self) -> None:
        """AssertionError if keys, columns, tree and totals disagree; for tests."""
        rows = list(self.number.values())
        assert sorted([*rows, *self.free]) == list(range(ENDS, len(self.keys))), "a number is lost or used twice"
        assert {len(c) for c in self.columns()} == {len(self.keys)}, "columns of different lengths"
        assert all(self.keys[row] == key for key, row in self.number.items()), "a key is not that of its row"
        assert self.bytes == sum(self.size), "the total is not the sum of the rows"
        assert self.mask.tolist() == [raw | coded for raw, coded in zip(self.raw, self.coded, strict=True)]
        assert all(packed <= size for packed, size in zip(self.packed, self.size, strict=True))
        assert self.hollow == sum(not self.mask[row] for row in rows)
        assert self.unknown == sum(bool(self.mask[row] and self.flags[row] & UNKNOWN) for row in rows)
        children = [0] * len(self.keys)
        for row in rows:
            children[self.parent[row]] += 1
            assert not self.parent[row] or self.depth[self.parent[row]] == self.depth[row] - 1, "not one chunk before"
        assert all(self.children[row] == children[row] and (self.mask[row] or children[row]) for row in rows)


class Frozen(NamedTuple):
    """Keys and columns as they were."""

    keys: list[bytes | None]
    columns: "dict[str, array[Any]]"

    def dump(self) -> dict[str, bytes]:
        """Everything as bytes, in short steps; rows are numbered from 1 without gaps."""
        chosen = np.array([row for row, key in enumerate(self.keys) if key is not None], dtype=np.int64)
        numbers = np.zeros(len(self.keys), dtype=np.uint32)
        numbers[chosen] = np.arange(1, len(chosen) + 1)
        dumped = {name: view(column)[chosen].tobytes() for name, column in self.columns.items()}
        dumped["parent"] = numbers[view(self.columns["parent"])[chosen]].tobytes()
        runs = (filter(None, self.keys[i : i + _STEP]) for i in range(0, len(self.keys), _STEP))
        dumped["keys"] = b"".join(b"".join(run) for run in runs)
        return dumped


def view(column: "array[Any]") -> npt.NDArray[Any]:
    """The numbers of a column, in place; the column cannot grow while it is held."""
    return np.frombuffer(column, dtype=column.typecode)
