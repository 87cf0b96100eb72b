"""A workload replayed: what a cache of a given size would have had at hand under a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvfs.cli.workloads import Event, Look, Stored
from kvfs.kinds import parse_amount
from kvfs.rows import Order, Rows
from kvfs.upkeep.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HALF = 32768
"""Tokens before a token at which attention to them costs as much as the weights of an 8 B model."""


class Score(NamedTuple):
    """Of the tokens asked for, the share that was there; of the cost to compute them all, the share saved; chunks
    evicted."""

    hits: float
    saved: float
    evicted: int


class Cache:
    """What would be in a store of ``budget`` bytes under a policy; ``known`` is every chunk of the workload."""

    def __init__(self, policy: Callable[[Rows], Order], budget: int, known: dict[bytes, Stored]) -> None:
        self._rows, self._budget, self._known = Rows(policy), budget, known
        self._born: set[bytes] = set()
        self._whole = max((each.tokens for each in known.values()), default=0)
        self.asked = self.hit = self.evicted = 0
        self.cost = self.saved = 0.0

    def look(self, event: Look) -> None:
        """A request: what is there counts, the rest is computed, and stored if it ever was."""
        chunks = [self._known[key] for key in event.keys if key in self._known]
        rows = [self._rows.find(chunk.key) for chunk in chunks]
        now = int(event.time) + 1
        if chunks and chunks[0].tokens < self._whole:  # tails: one of them is enough
            found = next((i for i, row in enumerate(rows) if row), None)
            self._count(chunks[found or 0], found is not None)
            if found is not None:
                self._rows.use(rows[found], now)
                parent = self._rows.parent[rows[found]]
                self._rows.tail[parent] = rows[found] if parent else 0
            return
        run = next((i for i, row in enumerate(rows) if not row), len(rows))
        for i, chunk in enumerate(chunks):
            self._count(chunk, i < run)
        if run:
            self._rows.use(rows[run - 1], now)
        for chunk in chunks[run:]:
            if chunk.key in self._born:
                self.store(chunk._replace(time=event.time))

    def _count(self, chunk: Stored, is_hit: bool) -> None:
        cost = chunk.tokens * (1 + (chunk.position + chunk.tokens / 2) / HALF)
        self.asked, self.cost = self.asked + chunk.tokens, self.cost + cost
        if is_hit:
            self.hit, self.saved = self.hit + chunk.tokens, self.saved + cost

    def store(self, event: Stored) -> None:
        """A chunk comes, and others go for it."""
        rows, now, chunk = self._rows, int(event.time) + 1, self._known[event.key]
        self._born.add(chunk.key)
        if rows.find(chunk.key):
            return
        row = rows.make(chunk.key)
        rows.fill(row, 1, chunk.size, now)
        rows.learn(row, chunk.parent, chunk.position // self._whole, chunk.tokens, now)
        while rows.bytes > self._budget and (victim := rows.victim(1)):
            rows.drain(victim, 1, 0)
            self.evicted += 1

    def score(self) -> Score:
        """The outcome so far."""
        return Score(self.hit / max(1, self.asked), self.saved / max(1.0, self.cost), self.evicted)


def chunks_of(events: Sequence[Event]) -> dict[bytes, Stored]:
    """Every chunk that is stored at any time, with the bytes of all its parts."""
    known: dict[bytes, Stored] = {}
    seen = set()
    for event in events:
        if isinstance(event, Stored) and (event.key, event.part) not in seen:
            seen.add((event.key, event.part))
            before = known.get(event.key)
            known[event.key] = event._replace(size=event.size + before.size) if before else event
    return known


def replay(events: Sequence[Event], policy: Callable[[Rows], Order], budget: int, known: dict[bytes, Stored]) -> Score:
    """Run a workload through a cache of ``budget`` bytes."""
    cache = Cache(policy, budget, known)
    for event in events:
        if isinstance(event, Look):
            cache.look(event)
        else:
            cache.store(event)
    return cache.score()


def compare(events: Sequence[Event], budgets: Sequence[str], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Run a workload with every budget (a size, or a share of all its chunks) and policy; one row a budget."""
    known = chunks_of(events)
    total = sum(chunk.size for chunk in known.values())
    rows = []
    for budget in budgets:
        limit = parse_amount(budget).of(total)
        scores = {name: replay(events, POLICIES[name], limit, known)._asdict() for name in policies}
        rows.append({"budget": budget, "bytes": limit, "policies": scores})
    return rows
