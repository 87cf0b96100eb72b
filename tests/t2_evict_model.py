"""Evictor, index and store against sets of keys: random texts, uses, leases, pins, removals and restarts."""

import contextlib
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvfs.config import Config
from kvfs.errors import StoreBusy
from kvfs.index import Index
from kvfs.upkeep.evict import Evictor
from kvfs.upkeep.leases import Leases
from kvfs.upkeep.policy import POLICIES
from tests.daemons import meta
from tests.samples import new_key, new_store, put
from tests.small import CHUNK, NO_FLOOR, NS, PART, SMALL, budget, names


class EvictionAgainstModel(RuleBasedStateMachine):
    """Random texts, uses, leases, pins, removals and restarts under a budget, against sets of keys."""

    BUDGET = 12

    def __init__(self) -> None:
        super().__init__()
        self.tmp = tempfile.TemporaryDirectory()
        self.store = new_store(Path(self.tmp.name) / "s", SMALL)
        self.parents: dict[bytes, bytes] = {}
        self.position: dict[bytes, int] = {}
        self.leased: dict[int, bytes] = {}
        self.pinned: set[bytes] = set()
        self.open("gdsf")

    def open(self, policy: str) -> None:
        config = Config(budget=budget(self.BUDGET), policy=policy, **NO_FLOOR)  # type: ignore[arg-type]
        self.index = Index(self.store, POLICIES[policy])
        self.index.load()
        self.index.reconcile()
        self.leases = Leases()
        for number, key in self.leased.items():
            self.leases.grant("me", number, NS, [key])
        self.evictor = Evictor(self.store, self.index, self.leases, config, self.evicted, self.lost)

    def evicted(self, _ns: bytes, key: bytes, _mask: int, _reason: str) -> None:
        assert key not in self.leased.values()
        assert key not in self.pinned
        assert key not in {self.parents[other] for other in self.there()}, "a parent went before its child"

    def lost(self, *what: object) -> None:
        raise AssertionError(f"{what} is lost")

    def there(self) -> list[bytes]:
        return self.index.page(NS, 0, 1 << 20).keys if NS in self.index.namespaces() else []

    def pick(self, n: int) -> bytes:
        keys = self.there()
        return keys[n % len(keys)] if keys else b""

    @rule(n=st.integers(0, 99), continues=st.booleans(), known=st.booleans())
    def publish(self, n: int, continues: bool, known: bool) -> None:
        parent = self.pick(n) if continues else b""
        key = new_key()
        self.parents[key] = parent
        position = self.position[key] = self.position[parent] + 256 if parent else 0
        put(self.store, key, manifest=SMALL, position=position, parent=parent or bytes(32))
        about = meta(key, PART, SMALL)._replace(parent=parent, position=position)
        self.index.add(NS, key, PART, CHUNK, about if known else None)

    @rule(n=st.integers(0, 99))
    def use(self, n: int) -> None:
        if key := self.pick(n):
            self.index.touch(NS, [key])
            assert self.index.look(NS, [key]) == [1]

    @rule(n=st.integers(0, 99), number=st.integers(0, 3))
    def lease(self, n: int, number: int) -> None:
        if key := self.pick(n):
            self.leases.grant("me", number, NS, [key])
            self.leased[number] = key

    @rule(number=st.integers(0, 3))
    def release(self, number: int) -> None:
        self.leases.release("me", number)
        self.leased.pop(number, None)

    @rule(n=st.integers(0, 99), pinned=st.booleans())
    def pin(self, n: int, pinned: bool) -> None:
        if (key := self.pick(n)) and (not pinned or len(self.pinned) < 3):
            assert self.index.pin(NS, key, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(key)

    @rule(n=st.integers(0, 99))
    def remove(self, n: int) -> None:
        if (key := self.pick(n)) and key not in self.leased.values():
            with contextlib.suppress(StoreBusy), self.leases.removing(NS, key):
                self.store.remove(NS, key, SMALL.parts)
                self.index.discard(NS, key)
            self.pinned.discard(key)

    @rule(chunks=st.integers(1, 5))
    def demand(self, chunks: int) -> None:
        before = self.index.totals()[1]
        freed = self.evictor.evict(self.index.namespaces(), chunks * CHUNK, "request")
        assert freed.bytes == freed.chunks * CHUNK == before - self.index.totals()[1]
        assert freed.chunks <= chunks

    @rule()
    def balance(self) -> None:
        self.evictor.tick()
        over = self.index.totals()[1] / (self.BUDGET * CHUNK)
        held = self.held()
        assert over <= 1.01 or set(self.there()) <= held, "over its budget, though something may go"

    def held(self) -> set[bytes]:
        """What must stay: leased, pinned, and whatever comes before."""
        held: set[bytes] = set()
        for at in (*self.leased.values(), *self.pinned):
            key = at
            while key:
                held.add(key)
                key = self.parents[key]
        return held

    @rule(policy=st.sampled_from(sorted(POLICIES)))
    def restart(self, policy: str) -> None:
        self.index.save()
        self.open(policy)

    @precondition(lambda self: not self.pinned)
    @rule()
    def lose_the_snapshot(self) -> None:
        self.index.snapshot_path.unlink(missing_ok=True)
        self.open("gdsf")

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        assert set(self.there()) == names(self.store)
        assert self.index.totals()[1] == CHUNK * len(names(self.store))

    def teardown(self) -> None:
        self.store.close()
        self.tmp.cleanup()


TestEvictionAgainstModel = EvictionAgainstModel.TestCase
TestEvictionAgainstModel.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
