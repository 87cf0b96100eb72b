"""The chunks of one namespace as numbered rows: columns of numbers, and the tree of prefixes they form.

A row costs about 250 bytes, key included.  Numbers 0 and 1 are no chunks: 0 stands for "none", and both are the ends
of the lists an `Order` keeps in the columns ``newer`` and ``older``.  Not thread-safe; `kvfs.index` locks.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

__all__ = ["NONE", "Order", "Rows"]

NONE = 0
RESERVED = 2
PINNED, UNKNOWN = 1, 2
"""Flags: never to be evicted; its header has not been read, so its parent is not known."""


class Order(Protocol):
    """In which order rows may go: what `Rows` tells a policy of `kvfs.daemon.policy`, and asks of it.

    It hears of rows whose parent is known; one that is gone is never named again.
    """

    def add(self, row: int) -> None:
        """A row has come; its ancestors have been used just now."""

    def use(self, chain: Sequence[int], behind: int) -> None:
        """Rows have been used: a text's chunks, in their order, of which ``behind`` (or NONE) is the one before."""

    def drop(self, row: int) -> None:
        """A row goes."""

    def demote(self, row: int) -> None:
        """A row is of no use any more."""

    def victim(self) -> int:
        """The row to go next, or NONE."""


class Rows:
    """Keys, columns and tree.

    A row with an empty mask is hollow: a chunk that is not there, though chunks that continue it are.  ``depth`` counts
    the chunks before a chunk in its text, ``tail`` is the tail of a text that was last found below a chunk, ``stamp``
    the Unix second of the last use or of arrival.
    """

    COLUMNS = ("mask", "size", "hits", "stamp", "tokens", "parent", "children", "depth", "tail", "flags")
    ORDER_COLUMNS = ("newer", "older", "queue", "uses")

    def __init__(self, order: Callable[["Rows"], Order] | None = None) -> None:
        self.number: dict[bytes, int] = {}
        self.keys: list[bytes | None] = [None] * RESERVED
        self.mask, self.size = array("Q"), array("q")
        self.hits, self.stamp = array("I"), array("I")
        self.tokens, self.depth, self.flags = array("H"), array("I"), array("B")
        self.parent, self.children, self.tail = array("I"), array("I"), array("I")
        self.newer, self.older = array("I"), array("I")
        self.queue, self.uses = array("B"), array("B")
        for c in self.columns():
            c.extend([0] * RESERVED)
        self.free: list[int] = []
        self.hollow = 0
        self.bytes = 0
        self.order = order(self) if order else None

    def columns(self) -> Iterator["array[Any]"]:
        for name in self.COLUMNS + self.ORDER_COLUMNS:
            yield getattr(self, name)

    def __len__(self) -> int:
        """How many chunks are there."""
        return len(self.number) - self.hollow

    def find(self, key: bytes) -> int:
        """The row of a chunk that is there, or NONE."""
        row = self.number.get(key, NONE)
        return row if self.mask[row] else NONE

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

    def fill(self, row: int, bits: int, size: int, now: int) -> None:
        """Parts of a chunk have come."""
        if not self.mask[row]:
            self.hollow -= 1
            self.stamp[row] = now
        self.mask[row] |= bits
        self.size[row] += size
        self.bytes += size

    def drain(self, row: int, bits: int, size: int) -> None:
        """Parts of a chunk are gone; with the last of them its row goes, or stays as long as it has children."""
        self.mask[row] &= ~bits
        size = min(size, self.size[row]) if self.mask[row] else self.size[row]
        self.size[row] -= size
        self.bytes -= size
        if not self.mask[row]:
            self.hollow += 1
            parent = self._leave(row)
            for each in (row, parent):
                if each and not self.mask[each] and not self.children[each]:
                    self._free(each)

    def _leave(self, row: int) -> int:
        """Take a row out of the tree and the order; returns what was its parent."""
        parent, self.parent[row] = self.parent[row], NONE
        if parent:
            self.children[parent] -= 1
        if self.order and not self.flags[row] & UNKNOWN:
            self.order.drop(row)
        if parent and self.order:
            self._expose(parent)
        self.flags[row] = UNKNOWN
        self.hits[row] = self.uses[row] = self.tail[row] = 0
        return parent

    def _free(self, row: int) -> None:
        key = self.keys[row]
        if key is not None:
            del self.number[key]
        self.keys[row] = None
        for c in self.columns():
            c[row] = 0
        self.free.append(row)
        self.hollow -= 1
