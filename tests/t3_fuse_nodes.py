"""The table of nodes: ids are given once, rows outlive the table object, backing ids are given back in time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvfs.daemon.fuse.abi import ROOT_ID
from kvfs.daemon.fuse.nodes import FIRST_ROWS, MAX_PATH, PATH_AT, ROW, Nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Logs


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("kvfs-test")
    yield fd
    os.close(fd)


@pytest.fixture
def nodes(memfd: int) -> Iterator[Nodes]:
    table = Nodes(memfd)
    yield table
    table.check_integrity()
    table.close()


def test_a_path_keeps_its_node_while_its_file_is_the_same(nodes: Nodes) -> None:
    first = nodes.look_up("/a", 7)
    assert nodes.look_up("/a", 7) is first is nodes.at("/a") is nodes[first.id]
    assert first.lookups == 2
    other = nodes.look_up("/a", 8)
    assert other.id != first.id
    assert nodes.at("/a") is other
    assert nodes[first.id] is first  # the kernel still knows it


def test_the_root_is_always_there(nodes: Nodes) -> None:
    assert nodes[ROOT_ID].path == "/"
    assert nodes.forget(ROOT_ID, 5) == 0
    assert nodes.hide("/") is None
    assert nodes[ROOT_ID] is nodes.at("/")


def test_ids_are_never_given_twice(nodes: Nodes, memfd: int) -> None:
    seen = set()
    for _ in range(5):
        node = nodes.look_up("/a", 1)
        assert node.id not in seen
        seen.add(node.id)
        nodes.forget(node.id, 1)
    with pytest.raises(KeyError):
        nodes[node.id]
    again = Nodes(memfd)
    assert again.look_up("/a", 1).id > max(seen)
    again.close()


def test_a_new_table_knows_what_the_old_one_gave_out(memfd: int) -> None:
    nodes = Nodes(memfd)
    made = [nodes.look_up(f"/{i}", i) for i in range(3 * FIRST_ROWS)]  # and grows twice
    nodes.look_up("/1", 1)
    nodes.open(made[2], 99)
    nodes.forget(made[0].id, 1)
    nodes.check_integrity()
    nodes.close()
    again = Nodes(memfd)
    again.check_integrity()
    assert len(again) == len(made)  # one less, and the root
    assert again.at("/0") is None
    for node in made[1:]:
        copy = again[node.id]
        assert (copy.path, copy.inode, copy.lookups, copy.backing, copy.opens) == (
            node.path,
            node.inode,
            node.lookups,
            node.backing,
            node.opens,
        )
        assert again.at(node.path) is copy
    again.close()


def test_the_latest_node_of_a_path_is_the_one_found_again(memfd: int) -> None:
    nodes = Nodes(memfd)
    old, new = nodes.look_up("/a", 1), nodes.look_up("/a", 2)
    nodes.close()
    again = Nodes(memfd)
    found = again.at("/a")
    assert found is not None
    assert found.id == new.id
    assert again[old.id].inode == 1
    again.close()


def test_backing_ids_are_dropped_only_when_nothing_is_open(nodes: Nodes) -> None:
    node = nodes.look_up("/a", 1)
    nodes.open(node, 5)
    nodes.open(node, 5)
    assert nodes.drop_backing(node) == 0
    assert nodes.release(node) == 1
    assert nodes.release(node) == 0
    assert nodes.release(node) == 0  # one too many does no harm
    assert nodes.drop_backing(node) == 5
    assert nodes.drop_backing(node) == 0


def test_a_forgotten_node_gives_its_backing_id_back(nodes: Nodes) -> None:
    node = nodes.look_up("/a", 1)
    nodes.look_up("/a", 1)
    nodes.open(node, 5)
    nodes.release(node)
    assert nodes.forget(node.id, 1) == 0
    assert nodes.forget(node.id, 1) == 5
    assert nodes.forget(node.id, 1) == 0
    assert nodes.at("/a") is None


def test_a_hidden_node_lives_while_it_is_held(nodes: Nodes) -> None:
    node = nodes.look_up("/a", 1)
    assert nodes.hide("/a") is node
    assert nodes.hide("/a") is None
    assert nodes.at("/a") is None
    assert nodes[node.id] is node
    nodes.forget(node.id, 1)
    with pytest.raises(KeyError):
        nodes[node.id]


def test_a_path_that_does_not_fit_is_refused(nodes: Nodes) -> None:
    nodes.look_up("/" + "a" * (MAX_PATH - 1), 1)
    with pytest.raises(OSError, match="name too long"):
        nodes.look_up("/" + "a" * MAX_PATH, 1)


DAMAGES = {
    "a path that is no text": lambda row: row[:PATH_AT] + b"\xff" * 2 + row[PATH_AT + 2 :],
    "a path that is none": lambda row: row[:PATH_AT] + b"xy" + row[PATH_AT + 2 :],
    "a path that is too long": lambda row: row[: PATH_AT - 2] + b"\xff\xff" + row[PATH_AT:],
    "the root's id": lambda row: (1).to_bytes(8, "little") + row[8:],
    "an id beyond reason": lambda row: b"\xff" * 8 + row[8:],
    "random bytes": lambda row: bytes(reversed(range(len(row)))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_dropped_and_the_others_serve(memfd: int, damage: str, logs: Logs) -> None:
    logs.claim("row .* damaged and dropped")
    nodes = Nodes(memfd)
    made = [nodes.look_up(f"/{i}", i) for i in range(5)]
    nodes.close()
    bad = made.pop(3)
    os.pwrite(memfd, DAMAGES[damage](os.pread(memfd, ROW, bad.row * ROW)), bad.row * ROW)
    again = Nodes(memfd)
    again.check_integrity()
    assert [again[node.id].path for node in made] == [node.path for node in made]
    with pytest.raises(KeyError):
        again[bad.id]
    assert again.at("/3") is None
    assert again.look_up("/new", 9).id == made[-1].id + 1
    again.close()
    logs.records.clear()
    logs.claims.clear()
    Nodes(memfd).close()  # repaired for good: nothing is logged


def test_of_an_id_given_twice_one_serves(memfd: int, logs: Logs) -> None:
    logs.claim("row .* damaged and dropped")
    nodes = Nodes(memfd)
    one, two = nodes.look_up("/1", 1), nodes.look_up("/2", 2)
    nodes.close()
    os.pwrite(memfd, one.id.to_bytes(8, "little"), two.row * ROW)
    again = Nodes(memfd)
    again.check_integrity()
    assert len(again) == 2
    again.close()


@pytest.mark.parametrize("size", [1, ROW - 1, ROW + 1, FIRST_ROWS * ROW - 1, FIRST_ROWS * ROW + 1])
def test_a_table_of_any_size_is_made_whole(memfd: int, size: int) -> None:
    os.ftruncate(memfd, size)
    nodes = Nodes(memfd)
    assert nodes.look_up("/a", 1).id == ROOT_ID + 1
    nodes.check_integrity()
    nodes.close()


@pytest.mark.parametrize("stored", [0, 1, 3, (1 << 64) - 1])
def test_a_damaged_counter_gives_no_live_id_again(memfd: int, stored: int) -> None:
    nodes = Nodes(memfd)
    made = [nodes.look_up(f"/{i}", i) for i in range(5)]
    nodes.close()
    os.pwrite(memfd, stored.to_bytes(8, "little"), 0)
    again = Nodes(memfd)
    assert again.look_up("/new", 9).id == made[-1].id + 1
    again.check_integrity()
    again.close()
