"""Several hosts on one store, as catalogs side by side: what one publishes, holds, pins and uses counts for all."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs import chunk
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.neighbours import Neighbours
from kvfs.daemon.watch import Watcher
from kvfs.errors import ChunkNotFound, StoreBusy, StoreFull
from kvfs.metrics import Metrics
from kvfs.store import Store
from kvfs.upkeep import bulletin
from kvfs.upkeep.bulletin import Board, Bulletin
from kvfs.upkeep.office import Pace
from tests.daemons import meta
from tests.samples import new_key, new_store, payload
from tests.small import CHUNK, NO_FLOOR, NS, PART, SMALL, budget, names, text

PACE = Pace(look=0.0, beat=0.0, stale=2.5, keep=1.0)
"""Each round tells, hears and beats."""


class Host:
    """A daemon without its threads: `round` is what they do."""

    def __init__(self, store: Path, name: str, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
        monkeypatch.setattr(socket, "gethostname", lambda: name)
        config = Config(**{**NO_FLOOR, "shared": "yes", **settings})  # type: ignore[arg-type]
        self.store = Store.open(store, shared=config.is_shared)
        self.catalog = Catalog(self.store, config, Metrics())
        self.watcher = Watcher(self.catalog)
        self.neighbours = Neighbours(self.catalog, self.watcher, PACE)
        self.member = self.neighbours.member

    def round(self) -> None:
        self.member.tick()
        self.catalog.evictor.tick()

    def lists(self) -> bool:
        """Whether it has been told to list everything."""
        told, self.watcher._list = self.watcher._list, False
        return told

    def put(self, key: bytes) -> None:
        temp = self.catalog.reserve(NS, 1000)
        chunk.write_part(temp.fd, SMALL, meta(key, PART, SMALL), payload(key, PART, SMALL))
        os.close(temp.fd)
        assert self.catalog.publish_file(NS, temp.name, key, PART)

    def lease(self, key: bytes) -> int:
        [opened] = self.catalog.lease("reader", 1, NS, [(key, PART)])
        return opened.fd

    def close(self) -> None:
        self.neighbours.close()
        self.catalog.index.check_integrity()
        self.catalog.leases.check_integrity()
        self.store.close()


@contextlib.contextmanager
def pair(store: Store, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[tuple[Host, Host]]:
    a, b = (Host(store.path, name, monkeypatch, **settings) for name in ("a", "b"))
    a.round()
    b.round()
    assert (bool(a.member.epoch), bool(b.member.epoch)) == (True, False)
    a.lists()
    b.lists()
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store", SMALL) as found:
        yield found


def trash(store: Store) -> list[Path]:
    return [p for p in (store.path / "trash").rglob("*") if p.is_file()]


def rounds_until(true: Callable[[], object], *hosts: Host, limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline, "not in time"
        for host in hosts:
            host.round()
        time.sleep(0.02)


# --- what others publish and remove ---


def test_what_one_publishes_another_finds_without_listing_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(store, monkeypatch) as (a, b):
        key = new_key()
        a.put(key)
        assert b.catalog.lookup(NS, [key]) == [0]
        a.round()
        b.round()
        assert b.catalog.lookup(NS, [key]) == [SMALL.all_parts]
        assert not b.lists()
        assert b.catalog.remove_chunk(NS, key)
        assert a.catalog.lookup(NS, [key]) == [SMALL.all_parts]
        with pytest.raises(ChunkNotFound):
            a.lease(key)
        a.round()
        assert a.catalog.lookup(NS, [key]) == [0]


def test_who_missed_too_much_lists_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulletin, "RING", 2)
    with pair(store, monkeypatch) as (a, b):
        a.catalog.bulletin._ring = type(a.catalog.bulletin._ring)(maxlen=2)
        for _ in range(2):
            a.put(new_key())
        a.round()
        b.round()
        assert not b.lists()
        assert b.catalog.index.totals()[0] == 2
        for _ in range(5):
            a.put(new_key())
        a.round()
        b.round()
        assert b.lists()


def test_a_namespace_that_is_new_makes_others_list(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(store, monkeypatch) as (a, b):
        other = SMALL.with_adapter("ee" * 32)
        a.catalog.register(other, {"name": "other"})
        a.catalog.bulletin.changed(other.ns, new_key())
        a.round()
        b.round()
        assert b.lists()


# --- who evicts, and what stays ---


def test_only_the_janitor_evicts_and_for_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    text(store, 20)
    with pair(store, monkeypatch, budget=budget(10)) as (a, b):
        kept = names(store)
        assert len(kept) == 9, "a's first round"
        b.catalog.index.reconcile()
        b.catalog.evictor.tick()
        assert names(store) == kept
        with pytest.raises(StoreBusy, match="its janitor, a"):
            b.catalog.evict(None, CHUNK)
        a.neighbours.close()
        rounds_until(lambda: b.member.epoch, b)
        assert b.catalog.evict(None, CHUNK).chunks == 1


def test_what_another_host_holds_stays_until_it_is_dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = text(store, 3)
    with pair(store, monkeypatch) as (a, b):
        fd = b.lease(keys[2])
        b.round()
        a.round()
        assert a.catalog.evict(None, 1 << 40).chunks == 0
        with pytest.raises(StoreBusy, match="b"):
            a.catalog.remove_chunk(NS, keys[2])
        with pytest.raises(StoreBusy, match="b"):
            a.catalog.retire(NS)
        rounds_until(lambda: not a.member.board.living(), a)  # b says nothing any more
        assert a.catalog.evict(None, 1 << 40).chunks == 3
        assert os.pread(fd, 8, 0)
        os.close(fd)


def test_what_another_host_has_pinned_stays_even_when_it_is_dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = text(store, 3)
    with pair(store, monkeypatch) as (a, b):
        b.catalog.pin(NS, keys[1], True)
        b.round()
        a.round()
        rounds_until(lambda: not a.member.board.living(), a)
        assert a.catalog.evict(None, 1 << 40).chunks == 1
        assert names(store) == set(keys[:2])
        assert (store.derived / "bulletin.b").exists()
        b.catalog.pin(NS, keys[1], False)
        b.round()
        a.round()
        assert a.catalog.evict(None, 1 << 40).chunks == 2


def test_use_on_another_host_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = text(store, 3), text(store, 3)
    with pair(store, monkeypatch, policy="lru") as (a, b):
        a.catalog.evictor.tick()
        for keys, at in ((first, 1000), (second, 2000)):
            a.catalog.index.touch(NS, keys, now=at)
        assert b.catalog.lookup(NS, first) == [1, 1, 1]
        b.round()
        a.round()
        a.catalog.evict(NS, 3 * CHUNK)
        assert names(store) == set(first)


# --- the trash ---


def test_what_is_removed_can_be_read_until_nobody_can_hold_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = text(store, 2)
    with pair(store, monkeypatch) as (a, b):
        fd = b.lease(keys[1])  # a has not heard of it yet
        assert a.catalog.evict(NS, 1 << 40).chunks == 2
        assert len(trash(store)) == 2
        rounds_until(lambda: len(trash(store)) == 1, a, b)  # the one nobody holds
        assert len(os.pread(fd, 1 << 20, 0)) == CHUNK
        assert trash(store)[0].name.startswith(f"{NS.hex()}.{keys[1].hex()}.")
        os.close(fd)
        b.catalog.leases.release("reader", 1)
        rounds_until(lambda: not trash(store), a, b)
        assert a.member.trash == 0


def test_the_trash_counts_in_the_budget(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    text(store, 10)
    with pair(store, monkeypatch, budget=budget(10.5)) as (a, b):
        a.catalog.evict(NS, 4 * CHUNK)
        a.round()
        a.round()  # counted in the first, told in the second
        assert a.member.trash == 4 * CHUNK
        b.round()
        assert b.member.trash == 4 * CHUNK
        for host in (a, b):
            with pytest.raises(StoreFull) as e:
                host.catalog.reserve(NS, CHUNK)
            assert e.value.reason == "budget"
        assert a.catalog.index.totals()[0] == 6, "what is on its way out needs no successor"
        rounds_until(lambda: not a.member.trash, a)
        b.round()
        a.put(new_key())


def test_a_namespace_goes_to_the_trash_as_a_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = text(store, 3)
    with pair(store, monkeypatch) as (a, b):
        fd = a.store.open_part(NS, keys[0], PART)
        b.catalog.retire(NS)
        assert not (store.path / NS.hex()).exists()
        a.round()
        assert a.member.trash > 3 * CHUNK
        assert os.pread(fd, 8, 0)
        os.close(fd)
        rounds_until(lambda: not trash(store), a, b)


# --- bulletins ---


def test_a_bulletin_is_small_when_nothing_happens_and_its_damage_is_silence(tmp_path: Path) -> None:
    told, board = Bulletin(), Board(tmp_path, "me", Pace())
    path = tmp_path / "bulletin.them"
    key = new_key()
    told.publish(path, [(NS, key)], [], due=True)
    assert path.stat().st_size < 200
    assert board.read().changed == []
    assert board.holder(NS, key) == "them"
    assert board.holder(NS, None) == "them"
    assert board.holder(NS, new_key()) is None
    before = path.stat().st_ino
    told.publish(path, [(NS, key)], [], due=False)
    assert path.stat().st_ino == before
    for damaged in (b"", path.read_bytes()[:-1], b"x" * 1000):
        path.unlink()
        path.write_bytes(damaged)
        board.read()
        assert board.holder(NS, key) == "them"
    path.unlink()
    board.read()
    assert board.holder(NS, key) is None


def test_the_same_use_is_told_once(tmp_path: Path) -> None:
    told, board = Bulletin(), Board(tmp_path, "me", Pace())
    key = new_key()
    for _ in range(100):
        told.used(NS, key)
    told.publish(tmp_path / "bulletin.them", [], [], due=True)
    assert board.read().used == [(NS, key)]
    assert board.read().used == []


# --- files that go away under a reader ---


def test_a_file_that_the_server_has_forgotten_is_a_miss_and_no_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ESTALE, as a network filesystem answers for what another host has unlinked; here from the one call that reads."""
    key = text(store, 1)[0]
    real = os.pread

    def stale(fd: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(fd, count, offset)

    with pair(store, monkeypatch) as (a, _):
        a.catalog.index.reconcile()
        monkeypatch.setattr(os, "pread", stale)
        with pytest.raises(ChunkNotFound):
            a.catalog.open_part(NS, key, PART)
        monkeypatch.undo()
    assert names(store) == {key}
    assert store.lost.totals()[0] == 0
