"""Policies: which chunk goes first. Each is a `kvfs.rows.Order`, keeps its lists in the columns of `Rows`, and decides
in constant time. They differ in what they remember of use; `kvfs sim` shows what that is worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvfs.rows import ENDS, NONE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvfs.rows import Order, Rows


class Ring:
    """A list of rows, in the columns ``newer`` and ``older``; ``end`` is the number, not a row's, that closes it."""

    def __init__(self, rows: Rows, end: int) -> None:
        self._rows, self.end, self.count = rows, end, 0
        rows.newer[end] = rows.older[end] = end

    def put(self, row: int, newer: int) -> None:
        """Insert a row that is in no ring on the older side of ``newer``; beside the end, that is as the newest."""
        rows, older = self._rows, self._rows.older[newer]
        rows.older[newer] = rows.newer[older] = row
        rows.newer[row], rows.older[row] = newer, older
        rows.queue[row] = self.end + 1
        self.count += 1

    def take(self, row: int) -> None:
        """Remove a row."""
        rows, newer, older = self._rows, self._rows.newer[row], self._rows.older[row]
        rows.older[newer], rows.newer[older] = older, newer
        rows.queue[row] = 0
        self.count -= 1

    @property
    def oldest(self) -> int:
        """The oldest row; the end if there is none."""
        return self._rows.newer[self.end]


class Lru:
    """Least recently used first. The ring holds all rows; every row is newer than those that continue it."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._ring = rows, Ring(rows, NONE)

    def add(self, row: int) -> None:
        """Put it beside its parent, the newest of its text."""
        parent = self._rows.parent[row]
        self._ring.put(row, parent if self._rows.queue[parent] else NONE)

    def use(self, chain: Sequence[int], behind: int) -> None:
        """Move a text to the newest, its end first in line to go."""
        for row in chain:
            self._ring.take(row)
            self._ring.put(row, behind)
            behind = row

    renew = use

    def drop(self, row: int) -> None:
        """Forget it."""
        self._ring.take(row)

    def demote(self, row: int) -> None:
        """Make it the oldest."""
        self._ring.take(row)
        self._ring.put(row, self._ring.oldest)

    def victim(self) -> int:
        """The oldest row."""
        return self._ring.oldest


class Leaves:
    """What the other two share: their rings hold only rows that nothing continues. A row left without the last that
    continued it goes next, unless it has been used apart. ``place(row, alone)`` puts a row into its ring.
    """

    def __init__(self, rows: Rows, rings: int, most: int, place: Callable[[int, bool], None]) -> None:
        self._rows, self._most, self._place = rows, most, place
        self.rings = [Ring(rows, end) for end in range(rings)]

    def _take(self, row: int) -> None:
        if self._rows.queue[row]:
            self.rings[self._rows.queue[row] - 1].take(row)

    def add(self, row: int) -> None:
        """Put it in, in place of its parent."""
        self._take(self._rows.parent[row])
        if not self._rows.children[row]:
            self._place(row, False)

    def use(self, chain: Sequence[int], _behind: int) -> None:
        """Count the uses; they move rows when these come up for eviction."""
        uses = self._rows.uses
        for row in chain:
            uses[row] = min(uses[row] + 1, self._most)

    def renew(self, _chain: Sequence[int], _behind: int) -> None:
        """Nothing: that a text goes on does not make it more popular."""

    def drop(self, row: int) -> None:
        """Forget it; its parent may be next."""
        self._take(row)
        parent = self._rows.parent[row]
        if self._rows.is_known(parent) and not self._rows.children[parent]:
            self._place(parent, True)

    def demote(self, row: int) -> None:
        """Make it the next to go."""
        self._take(row)
        self._rows.uses[row] = 0
        self._place(row, True)


class S3Fifo(Leaves):
    """S3-FIFO (Yang et al., SOSP 2023): newcomers wait in a small queue; only what is used there enters the main one.

    The paper's ghost queue is left out: it gains 0.2 points of saved prefill, in caches far too small.
    """

    SMALL: Final = 0.1
    MOST: Final = 3

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, 2, self.MOST, self._put)
        self._small, self._main = self.rings

    def _put(self, row: int, alone: bool) -> None:
        if self._rows.uses[row]:
            self._rows.uses[row] -= 1
            self._main.put(row, self._main.end)
        else:
            self._small.put(row, self._small.oldest if alone else self._small.end)

    def victim(self) -> int:
        """The oldest unused row of the queue that is too long; used ones move on, a use each time."""
        while total := self._small.count + self._main.count:
            ring = self._small if self._small.count > self.SMALL * total or not self._main.count else self._main
            row = ring.oldest
            if not self._rows.uses[row]:
                return row
            ring.take(row)
            self._put(row, False)
        return NONE


class Gdsf(Leaves):
    """Greedy dual size frequency (Cherkasova, 1998): the fewest uses, weighted by what it costs to compute, go first,
    and the past counts less and less.

    A row falls due at the clock's hour at its last use, plus its weight; the clock moves on to the hour of each victim.
    Hours are rings, so that this takes constant time. Chunks of a namespace have about the same bytes a token, so cost
    over size is that of a token: its share of the weights, and attention to all tokens before it.
    """

    MOST: Final = 15
    HALF: Final = 128
    """Chunks before a token at which attention costs as much as the weights (32,768 tokens; an 8 B model)."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, ENDS, self.MOST, self._put)
        self._hour = 0

    def _fall_due(self, row: int) -> None:
        weight = (1 + self._rows.uses[row]) * (1 + self._rows.depth[row] / self.HALF)
        self._rows.due[row] = self._hour + min(int(weight), ENDS - 1)

    def add(self, row: int) -> None:
        """Put it in, in place of its parent."""
        self._fall_due(row)
        super().add(row)

    def use(self, chain: Sequence[int], behind: int) -> None:
        """Count the uses, and put off the hours."""
        super().use(chain, behind)
        for row in chain:
            self._fall_due(row)

    def demote(self, row: int) -> None:
        """Make it due now."""
        self._rows.due[row] = self._hour
        super().demote(row)

    def _put(self, row: int, alone: bool) -> None:
        due = max(self._rows.due[row], self._hour)
        ring = self.rings[due % ENDS]
        ring.put(row, ring.oldest if alone and due == self._hour else ring.end)

    def victim(self) -> int:
        """The first row of the earliest hour whose time has not been put off since."""
        for _ in range(ENDS):
            ring = self.rings[self._hour % ENDS]
            while ring.count:
                row = ring.oldest
                if self._rows.due[row] <= self._hour:
                    return row
                ring.take(row)
                self._put(row, False)
            self._hour += 1
        return NONE


POLICIES: Final[Mapping[str, Callable[[Rows], Order]]] = {"gdsf": Gdsf, "s3-fifo": S3Fifo, "lru": Lru}
"""The first is the default: over the three workloads of `kvfs sim` it saves the most prefill."""
