"""The election of the janitor, by clocks that the test moves: one at most, and what he decides too late is void."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.errors import StoreBusy
from kvfs.store import Store
from kvfs.trash import Trash
from kvfs.upkeep.office import Office, Pace
from tests.samples import MANIFEST, new_key, new_store, put

PACE = Pace()


class Host:
    """A candidate with a clock of its own, which has nothing to do with that of others."""

    def __init__(self, store: Store, name: str) -> None:
        self.time = secrets.randbelow(10**6) * 1.0
        self.trash = Trash(store._root)
        self.office = Office(store.derived, name, self.trash.begin, PACE, lambda: self.time)

    def live(self, seconds: float) -> None:
        """Step once a second."""
        for _ in range(int(seconds)):
            self.time += 1
            self.office.step()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store") as found:
        found.trash = Trash(found._root)
        yield found


def live(seconds: int, *hosts: Host) -> None:
    for _ in range(seconds):
        for host in hosts:
            host.live(1)
        assert sum(bool(host.office.epoch) for host in hosts) <= 1


def test_the_first_is_elected_and_stays(store: Store) -> None:
    a, b = Host(store, "a"), Host(store, "b")
    live(100, a, b)
    assert (a.office.epoch, b.office.epoch) == (1, 0)
    assert b.office.holder == "a"
    assert [p.name for p in store.derived.glob("janitor.*")] == ["janitor.1"]


def test_a_dead_janitor_is_followed_within_thirty_seconds(store: Store) -> None:
    a, b, c = Host(store, "a"), Host(store, "b"), Host(store, "c")
    live(10, a, b, c)
    gone = b.time
    while not b.office.epoch and not c.office.epoch:
        live(1, b, c)
        assert b.time - gone <= 30
    assert PACE.stale - PACE.beat <= b.time - gone
    assert b.office.epoch + c.office.epoch == 2
    assert [p.name for p in store.derived.glob("janitor.*")] == ["janitor.2"]


def test_one_that_slept_counts_itself_out_and_finds_that_it_lost(store: Store) -> None:
    a, b = Host(store, "a"), Host(store, "b")
    live(10, a, b)
    live(25, b)
    assert b.office.epoch == 2
    a.time += 25
    assert a.office.epoch == 0, "by its own clock, before it has looked"
    live(30, a, b)
    assert (a.office.epoch, b.office.epoch) == (0, 2)
    assert a.office.holder == "b"


def test_one_that_leaves_is_followed_at_once(store: Store) -> None:
    a, b = Host(store, "a"), Host(store, "b")
    live(10, a, b)
    a.office.leave()
    assert a.office.epoch == 0
    live(2, b)
    assert b.office.epoch == 2


def test_a_daemon_that_starts_again_goes_on_at_once(store: Store) -> None:
    a = Host(store, "a")
    live(10, a)
    again = Host(store, "a")
    live(1, again)
    assert again.office.epoch == 2


def test_a_holder_who_beats_while_another_takes_over_makes_him_withdraw(store: Store) -> None:
    a, b = Host(store, "a"), Host(store, "b")
    live(10, a, b)
    looked = b.office._latest()
    a.live(5)  # it beats between b's look and b's file
    b.time += 1
    b.office._take_over(*looked, {})
    assert b.office.epoch == 0
    live(20, a, b)
    assert (a.office.epoch, b.office.epoch) == (1, 0)


def test_of_two_who_take_over_one_wins(store: Store) -> None:
    a, b, c = Host(store, "a"), Host(store, "b"), Host(store, "c")
    live(10, a, b, c)
    looked = b.office._latest(), c.office._latest()
    b.office._take_over(*looked[0], {})
    c.office._take_over(*looked[1], {})
    assert (b.office.epoch, c.office.epoch) == (2, 0)
    live(30, a, b, c)
    assert (a.office.epoch, b.office.epoch, c.office.epoch) == (0, 2, 0)


def test_a_late_comer_cannot_revive_an_epoch(store: Store) -> None:
    a, b, c = Host(store, "a"), Host(store, "b"), Host(store, "c")
    live(10, a, b, c)
    looked = c.office._latest()
    live(25, b)  # epoch 2, whose start removes the file of epoch 1
    b.office.leave()
    late = Host(store, "d")
    live(2, late)  # epoch 3 removes that of 2
    c.office._take_over(*looked, {})
    assert (c.office.epoch, late.office.epoch) == (0, 3)


def test_a_holder_whose_file_is_unreadable_counts_as_alive_while_it_changes(store: Store) -> None:
    a = Host(store, "a")
    path = store.derived / "janitor.7"
    for n in range(60):
        path.write_bytes(b"\xff{%d" % n)
        a.live(1)
        assert a.office.epoch == 0
    live(25, a)
    assert a.office.epoch == 8


def test_a_removal_that_comes_after_the_end_of_its_epoch_does_nothing(store: Store) -> None:
    a, b = Host(store, "a"), Host(store, "b")
    live(10, a, b)
    keys = [new_key() for _ in range(3)]
    for key in keys:
        put(store, key)
    parts = MANIFEST.parts
    store.remove(MANIFEST.ns, keys[0], parts, epoch=a.office.epoch)
    epoch = a.office.epoch  # asked for just before it was stopped
    live(25, b)
    with pytest.raises(StoreBusy, match="later janitor"):
        store.remove(MANIFEST.ns, keys[1], parts, epoch=epoch)
    assert store.masks(MANIFEST.ns, keys) == [0, MANIFEST.all_parts, MANIFEST.all_parts]
    assert {thrown.path.split("/")[0] for thrown in a.trash.entries()} == {"2"}, "what lay there is the next one's"
    store.remove(MANIFEST.ns, keys[1], parts, epoch=b.office.epoch)
    store.remove(MANIFEST.ns, keys[2], parts)  # by request, on any host
    assert store.masks(MANIFEST.ns, keys) == [0, 0, 0]
    assert sorted((t.ns, t.key) for t in b.trash.entries()) == sorted((MANIFEST.ns, k) for k in keys for _ in parts)


def test_a_folder_held_open_is_fenced_too(store: Store) -> None:
    """As on a network filesystem, where the path was looked up before and the rename comes after."""
    a, b = Host(store, "a"), Host(store, "b")
    live(10, a, b)
    key = new_key()
    put(store, key)
    with a.trash._opened(a.office.epoch) as folder:
        live(25, b)
        leaf = os.open(store.path / MANIFEST.ns_hex / key.hex()[:3], os.O_RDONLY)
        name = os.listdir(leaf)[0]
        with pytest.raises(FileNotFoundError):
            os.rename(name, "x", src_dir_fd=leaf, dst_dir_fd=folder)
        os.close(leaf)
