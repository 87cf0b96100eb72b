"""Policies by themselves: what all keep to, and what each is for."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.rows import PINNED, Order, Rows
from kvfs.upkeep.policy import POLICIES, Gdsf, Lru, S3Fifo

SIZE = 1000


class Bench:
    """Rows under a policy, by short names: ``ab`` continues ``a``."""

    def __init__(self, policy: Callable[[Rows], Order]) -> None:
        self.rows = Rows(policy)
        self.now = 0

    def put(self, name: str, tokens: int = 256) -> None:
        self.now += 1
        row = self.rows.make(name.encode())
        if not self.rows.mask[row]:
            self.rows.fill(row, 1, SIZE, self.now)
            self.rows.learn(row, name[:-1].encode() or None, len(name) - 1, tokens, self.now)

    def text(self, name: str) -> None:
        for n in range(1, len(name) + 1):
            self.put(name[:n])

    def use(self, name: str) -> None:
        self.now += 1
        self.rows.use(self.rows.find(name.encode()), self.now)

    def drop(self, name: str) -> None:
        self.rows.drain(self.rows.find(name.encode()) or self.rows.find(name.encode().ljust(32)), 1, SIZE)

    def victim(self) -> str:
        row = self.rows.victim(100)
        return (self.rows.keys[row] or b"").decode()

    def evict(self, count: int) -> list[str]:
        gone = []
        for _ in range(count):
            if name := self.victim():
                gone.append(name)
                self.drop(name)
        return gone

    def there(self) -> set[str]:
        return {key.decode() for key, row in self.rows.number.items() if self.rows.mask[row]}


class KeepsToTheTree:
    """The tests of every policy."""

    policy: Callable[[Rows], Order]

    @pytest.fixture
    def bench(self) -> Bench:
        return Bench(type(self).policy)

    def test_an_empty_store_has_no_victim(self, bench: Bench) -> None:
        assert bench.victim() == ""
        bench.text("abc")
        assert len(bench.evict(9)) == 3
        assert bench.victim() == ""

    def test_a_text_goes_from_its_end(self, bench: Bench) -> None:
        bench.text("abcdef")
        assert bench.evict(9) == ["abcdef", "abcde", "abcd", "abc", "ab", "a"]

    def test_one_cold_text_goes_before_another_is_touched(self, bench: Bench) -> None:
        bench.text("abcd")
        bench.text("xyz")
        assert bench.evict(4) == ["abcd", "abc", "ab", "a"]

    def test_what_is_used_outlives_what_is_not(self, bench: Bench) -> None:
        for first in "abcdefgh":
            bench.text(first + "12")
        for _ in range(3):
            bench.use("a12")
        bench.evict(21)
        assert bench.there() == {"a", "a1", "a12"}

    def test_a_shared_beginning_stays_as_long_as_anything_continues_it(self, bench: Bench) -> None:
        for end in "uvwxyz":
            bench.text("sys" + end)
        assert set(bench.evict(6)) == {"sys" + end for end in "uvwxyz"}
        assert bench.evict(3) == ["sys", "sy", "s"]

    def test_a_superseded_tail_goes_first(self, bench: Bench) -> None:
        bench.text("old")
        bench.text("ab")
        bench.put("abt", tokens=48)
        bench.use("abt")
        rows = bench.rows
        rows.tail[rows.find(b"ab")] = rows.find(b"abt")
        bench.put("abc")
        assert bench.victim() == "abt"

    def test_what_must_stay_is_passed_over(self, bench: Bench) -> None:
        bench.text("ab")
        bench.text("xy")
        bench.rows.flags[bench.rows.find(b"ab")] |= PINNED
        assert bench.evict(9) == ["xy", "x"]
        assert bench.there() == {"a", "ab"}

    def test_a_chunk_that_comes_back_finds_its_children(self, bench: Bench) -> None:
        bench.text("abc")
        bench.drop("ab")
        bench.rows.check_integrity()
        bench.put("ab")
        assert bench.evict(9) == ["abc", "ab", "a"]

    def test_a_restart_keeps_what_is_known(self, bench: Bench) -> None:
        for first in "abcdefgh":
            bench.text(first + "12")
        for _ in range(3):
            bench.use("a12")
        bench.drop("b1")
        dumped = bench.rows.freeze().dump()
        dumped["keys"] = b"".join(key.ljust(32) for key in bench.rows.keys if key)  # as long as keys are
        again = Bench(type(self).policy)
        again.rows.restore(dumped)
        again.rows.check_integrity()
        assert len(again.rows) == len(bench.rows)
        gone = [name.strip() for name in again.evict(20)]
        assert {"a", "a1", "a12"}.isdisjoint(gone[:19])
        assert all(gone.index(name) < gone.index(name[:-1]) for name in gone if name[:-1] in gone)


class TestLru(KeepsToTheTree):
    """What `Lru` adds."""

    policy = Lru

    def test_least_recent_first(self, bench: Bench) -> None:
        for name in "abcd":
            bench.put(name)
        for _ in range(5):
            bench.use("b")
        bench.use("a")
        assert bench.evict(4) == ["c", "d", "b", "a"]


class TestS3Fifo(KeepsToTheTree):
    """What `S3Fifo` adds."""

    policy = S3Fifo

    def test_newcomers_do_not_push_out_what_is_used(self, bench: Bench) -> None:
        for name in "abcdefghij":
            bench.put(name)
            bench.use(name)
        gone = []
        for other in "ABCDEFGHIJKLMNOPQRST":
            bench.put(other)
            gone += bench.evict(len(bench.there()) - 11)
        assert set("abcdefghij") <= bench.there()


class TestGdsf(KeepsToTheTree):
    """What `Gdsf` adds."""

    policy = Gdsf

    def test_fewer_uses_first(self, bench: Bench) -> None:
        for uses, name in enumerate("abcd", start=1):
            bench.put(name)
            for _ in range(uses):
                bench.use(name)
        bench.put("e")
        assert bench.evict(5) == ["e", "a", "b", "c", "d"]

    def test_what_costs_more_to_compute_stays_longer(self, bench: Bench) -> None:
        deep = "a" * (2 * Gdsf.HALF)
        bench.text(deep)
        bench.put("z")
        assert bench.victim() == "z"

    def test_the_past_fades(self, bench: Bench) -> None:
        bench.put("a")
        for _ in range(Gdsf.MOST):
            bench.use("a")
        for n in range(200):
            bench.put(chr(0x100 + n))
            bench.use(chr(0x100 + n))
            bench.evict(len(bench.there()) - 5)
        assert "a" not in bench.there()


def test_every_policy_is_tested() -> None:
    assert {case.policy for case in KeepsToTheTree.__subclasses__()} == set(POLICIES.values())


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 300))
def test_no_victim_is_continued_by_another(policy: str, seed: int, steps: int) -> None:
    bench, r = Bench(POLICIES[policy]), random.Random(seed)
    for _ in range(steps):
        name = "".join(r.choice("abc") for _ in range(r.randint(1, 4)))
        act = r.random()
        if act < 0.4:
            bench.text(name)
        elif act < 0.5:
            bench.put(name)  # perhaps before its parent
        elif act < 0.8:
            bench.use(name)
        elif act < 0.85 and name in bench.there():
            bench.drop(name)
        elif victim := bench.victim():
            assert not [other for other in bench.there() if other[:-1] == victim]
            bench.drop(victim)
    bench.rows.check_integrity()
    left = bench.there()
    gone = bench.evict(len(left))
    assert set(gone) == left
    assert not bench.rows.number
