"""Every kind of damage to single parts and to whole chunks, one test each."""

from __future__ import annotations

import os
import shutil
import stat
import time
from typing import TYPE_CHECKING

import pytest

from kvfs import chunk
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.names import part_path
from tests.daemons import damage, file_of
from tests.fscks import FULL0, FULL1, KEY, MAKERS, NS, OTHER, SWA0, age, at, below, check, fsck, kept
from tests.samples import MANIFEST, new_key, new_store, payload, put

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Two whole chunks of one namespace."""
    with new_store(tmp_path / "store") as made:
        put(made, KEY)
        put(made, OTHER)
        yield made


# ------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "stray", ["wrong.safetensors", "../012/x", "../tmp/part", "../../part", f"../010/{'0' * 64}.full.h0.safetensors"]
)
def test_a_renamed_part_goes_back_to_its_place(store: Store, stray: str) -> None:
    path = file_of(store.path, KEY, FULL0)
    (store.path / below("012")).mkdir(mode=0o750)
    there = (path.parent / stray).resolve()
    path.rename(there)
    check(store.path, "misplaced", str(there.relative_to(store.path)), f"moved to {at(KEY)}")
    assert path.read_bytes()[4096:] == payload(KEY, FULL0)
    assert kept(store) == []


def test_a_part_in_the_wrong_leaf_folder(store: Store) -> None:
    path = file_of(store.path, KEY, FULL0)
    wrong = store.path / below("fff", path.name)
    wrong.parent.mkdir(mode=0o750)
    path.rename(wrong)
    check(store.path, "misplaced", below("fff", path.name), f"moved to {at(KEY)}")


OTHER_MANIFEST = Manifest(
    weights="cd" * 32, config={}, model_dtype="bfloat16", kv_dtype="BF16", kinds=(GroupKind("full", (0,), 2, 64, 64),)
)


def test_a_part_in_the_wrong_namespace(store: Store) -> None:
    store.register(OTHER_MANIFEST)
    path, wrong = file_of(store.path, KEY, FULL0), store.path / OTHER_MANIFEST.ns_hex / at(KEY).partition("/")[2]
    wrong.parent.mkdir(mode=0o750)
    path.rename(wrong)
    check(store.path, "misplaced", f"{OTHER_MANIFEST.ns_hex}/{part_path(KEY, FULL0)}", f"moved to {at(KEY)}")


def test_a_part_of_a_namespace_that_is_not_here(store: Store) -> None:
    store.register(OTHER_MANIFEST)
    put(store, KEY, manifest=OTHER_MANIFEST)
    mine, theirs = file_of(store.path, KEY, FULL0), store.path / OTHER_MANIFEST.ns_hex / part_path(KEY, FULL0)
    mine.unlink()
    theirs.rename(mine)
    shutil.rmtree(store.path / OTHER_MANIFEST.ns_hex)
    [found, rest] = fsck(store.path)
    assert (found.kind, found.path, found.done) == ("wrong-ns", at(KEY), True)
    assert rest.kind == "incomplete"
    assert kept(store) == [("wrong-ns", at(KEY))]


def test_parts_whose_names_were_swapped(store: Store) -> None:
    """The first finds its place taken; once it is away, the second can go home."""
    one, two = file_of(store.path, KEY, FULL0), file_of(store.path, OTHER, FULL0)
    one.rename(store.path / "aside")
    two.rename(one)
    (store.path / "aside").rename(two)
    assert [f.kind for f in fsck(store.path) if f.is_damage] == ["duplicate", "misplaced"]
    assert one.read_bytes()[4096:] == payload(KEY, FULL0)
    assert not two.exists()
    assert [f for f in fsck(store.path) if f.is_damage] == []


def test_a_copy_under_another_name(store: Store) -> None:
    path = file_of(store.path, KEY, FULL0)
    shutil.copy(path, path.with_name("copy.safetensors"))
    check(store.path, "duplicate", below("010", "copy.safetensors"), "moved to lost+found")
    assert path.exists()


def test_two_strays_with_one_home(store: Store) -> None:
    path = file_of(store.path, KEY, FULL0)
    shutil.copy(path, path.with_name("a"))
    path.rename(path.with_name("b"))
    for options in ({"dry_run": True}, {}):
        assert [f.kind for f in fsck(store.path, **options)] == ["misplaced", "duplicate"]
    assert fsck(store.path) == []


@pytest.mark.parametrize("size", [0, 1, 8, 4095, 4096, 8192, -1, -4096])
def test_a_truncated_part(store: Store, size: int) -> None:
    path = file_of(store.path, KEY, FULL0)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    found = check(store.path, found_kind(size), at(KEY), "moved to lost+found")
    [entry] = store.lost.entries()
    assert entry.is_part
    assert (entry.reason, entry.path) == (found.kind, at(KEY))


def found_kind(size: int) -> str:
    return "truncated" if size in range(8) else "header" if size in range(4096) else "size"


def test_a_part_with_a_damaged_header(store: Store) -> None:
    damage(file_of(store.path, KEY, FULL0), at=100)
    check(store.path, "header", at(KEY), "moved to lost+found")


@pytest.mark.parametrize("what", ["folder", "link", "dangling link", "pipe"])
def test_something_else_under_the_name_of_a_part(store: Store, what: str) -> None:
    path = file_of(store.path, KEY, FULL0)
    path.unlink()
    MAKERS[what](path)
    check(store.path, "not-a-file", at(KEY), "moved to lost+found")


@pytest.mark.parametrize("mode", [0o640, 0o444, 0o446, 0o666, 0o777, 0o4440, 0o040])
def test_a_wrong_mode_of_a_part(store: Store, mode: int) -> None:
    path = file_of(store.path, KEY, FULL0)
    path.chmod(mode)
    check(store.path, "mode", at(KEY), "set to 0440")
    assert stat.S_IMODE(path.stat().st_mode) == 0o440


@pytest.mark.parametrize("where", ["lost+found", ".kvfs", "", "tmp", "010"])
def test_a_wrong_mode_of_a_folder(store: Store, where: str) -> None:
    path = where if where in {"lost+found", ".kvfs"} else below(where).rstrip("/")
    (store.path / path).mkdir(exist_ok=True)
    (store.path / path).chmod(0o777)
    check(store.path, "mode", path, "set to 0750")
    assert stat.S_IMODE((store.path / path).stat().st_mode) == 0o750


def test_a_hard_link_to_a_part_from_elsewhere(store: Store, tmp_path: Path) -> None:
    path = file_of(store.path, KEY, FULL0)
    os.link(path, tmp_path / "theirs")
    check(store.path, "hard-link", at(KEY), "replaced by a copy")
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert path.stat().st_ino != (tmp_path / "theirs").stat().st_ino
    with chunk.open_part(store.open_part(NS, KEY, FULL0), MANIFEST, KEY, FULL0) as part:
        assert bytes(part.verify()) == payload(KEY, FULL0)


def test_a_damaged_part_with_a_second_name_is_not_copied(store: Store, tmp_path: Path) -> None:
    path = file_of(store.path, KEY, FULL0)
    damage(path)
    os.link(path, tmp_path / "theirs")
    [found] = fsck(store.path)
    assert (found.kind, found.done) == ("hard-link", False)
    assert "is damaged (checksum)" in found.detail
    assert os.listdir(store.path / below("tmp")) == []
    assert path.exists()


def test_a_second_name_in_the_store(store: Store) -> None:
    path = file_of(store.path, KEY, FULL0)
    os.link(path, path.with_name("second"))
    check(store.path, "hard-link", below("010", "second"), "removed")
    assert path.exists()


def test_a_publisher_that_died_between_link_and_unlink(store: Store) -> None:
    path, temp = file_of(store.path, KEY, FULL0), store.path / below("tmp", "a" * 32)
    os.link(path, temp)
    os.utime(path)
    assert fsck(store.path) == []  # it may be at work
    age(temp)
    check(store.path, "temp", below("tmp", "a" * 32), "removed")
    assert path.stat().st_nlink == 1


@pytest.mark.parametrize(
    "where", [below("tmp", "a" * 32), "a" * 32, "lost+found/" + "a" * 32, f".kvfs/index.host.snapshot.{'a' * 16}.tmp"]
)
def test_temp_files_of_dead_writers(store: Store, where: str) -> None:
    path = store.path / where
    path.parent.mkdir(mode=0o750, exist_ok=True)
    path.write_bytes(b"half a par")
    assert fsck(store.path) == []
    age(path)
    check(store.path, "temp", where, "removed")


def test_a_note_about_nothing(store: Store) -> None:
    store.quarantine(NS, KEY, FULL0, "checksum")
    store.remove(NS, KEY, MANIFEST.parts)
    [name] = [n for n in os.listdir(store.path / "lost+found") if not n.endswith(".json")]
    (store.path / "lost+found" / name).unlink()
    (store.path / "lost+found" / "mine.json").write_text("{}")
    check(store.path, "note", f"lost+found/{name}.json", "removed")
    assert os.listdir(store.path / "lost+found") == ["mine.json"]


# ------------------------------------------------------------------------------------------------------- chunks


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes pass: times of names cannot be set back."""
    now = time.time()
    monkeypatch.setattr("kvfs.fsck.findings.time.time", lambda: now + 120)


def test_an_incomplete_kind_is_removed_once_it_is_old(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(store.path, KEY, FULL1).unlink()
    where = below("010", f"{KEY.hex()}.full")
    [found] = fsck(store.path)
    assert (found.kind, found.path, found.done) == ("incomplete", where, False)
    assert "1 of 2 head slices" in found.detail
    later(monkeypatch)
    check(store.path, "incomplete", where, "removed")
    assert store.masks(NS, [KEY]) == [MANIFEST.bit(SWA0) | MANIFEST.bit(PartId("swa512", 1))]


def test_chunks_that_nothing_leads_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, child, grandchild, tail = (bytes([n] * 32) for n in (5, 6, 7, 8))
    for key, parent, position in ((child, gone, 512), (grandchild, child, 768), (tail, OTHER, 256)):
        put_after(store, key, parent, position)
    assert fsck(store.path) == []  # a parent may be on its way
    later(monkeypatch)
    found = fsck(store.path)
    assert [(f.kind, f.path, f.done) for f in found] == [
        ("orphan", below(key.hex()[:3], key.hex()), False) for key in (child, grandchild)
    ]
    assert not any(f.is_damage for f in found)
    assert [f.done for f in fsck(store.path, repair_orphans=True)] == [True, True]
    assert store.masks(NS, [child, grandchild, tail, OTHER]) == [0, 0, MANIFEST.all_parts, MANIFEST.all_parts]
    assert fsck(store.path, repair_orphans=True) == []


def put_after(store: Store, key: bytes, parent: bytes, position: int) -> None:
    for part in MANIFEST.parts:
        temp = store.reserve(NS)
        chunk.write_part(temp.fd, MANIFEST, chunk.PartMeta(NS, key, parent, 256, position, part), payload(key, part))
        os.close(temp.fd)
        store.publish(NS, temp.name, key, part)


# ------------------------------------------------------------------------------------------------------- all at once


def test_everything_at_once_is_settled_in_one_run(store: Store, tmp_path: Path) -> None:
    """And what was sound before is what is sound afterwards."""
    sound = new_key()
    put(store, sound)
    (store.path / "notes").write_text("dear")
    os.truncate(file_of(store.path, KEY, FULL0), 100)
    damage(file_of(store.path, KEY, FULL1), at=50)
    file_of(store.path, KEY, SWA0).chmod(0o666)
    os.link(file_of(store.path, OTHER, FULL0), tmp_path / "theirs")
    file_of(store.path, OTHER, FULL1).rename(store.path / "a-part")
    os.mkfifo(store.path / below("tmp", "pipe"))
    (store.path / ("cd" * 32) / "abc").mkdir(parents=True)
    found = fsck(store.path)
    assert sorted(f.kind for f in found) == [
        "foreign", "foreign", "hard-link", "header", "header", "manifest", "misplaced", "mode",
    ]  # fmt: skip
    assert all(f.done for f in found)
    assert fsck(store.path) == []
    swa = MANIFEST.bit(SWA0) | MANIFEST.bit(PartId("swa512", 1))
    assert store.masks(NS, [sound, OTHER, KEY]) == [MANIFEST.all_parts, MANIFEST.all_parts, swa]
    for key in (sound, OTHER):
        for part in MANIFEST.parts:
            with chunk.open_part(store.open_part(NS, key, part), MANIFEST, key, part) as file:
                assert bytes(file.verify()) == payload(key, part)
