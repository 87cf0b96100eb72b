"""Every kind of damage to a store's folders, one test each: found, told in a dry run, repaired, and gone."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from kvfs import chunk
from kvfs.errors import IdentityError, NotAStore
from kvfs.fsck import Fsck
from kvfs.store import Store
from tests.daemons import damage, file_of
from tests.fscks import FULL0, KEY, MAKERS, NS, OTHER, age, at, below, check, fsck, kept, tree
from tests.samples import MANIFEST, new_key, new_store, put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Two whole chunks of one namespace."""
    with new_store(tmp_path / "store") as made:
        put(made, KEY)
        put(made, OTHER)
        yield made


# ------------------------------------------------------------------------------------------------------- nothing wrong


def test_a_sound_store_has_no_findings(store: Store) -> None:
    (store.path / MANIFEST.ns_hex / "abc").mkdir(mode=0o750)
    (store.path / MANIFEST.ns_hex / "tmp" / ("a" * 32)).touch()  # a writer at work
    (store.path / MANIFEST.ns_hex / "010" / ".nfs0000000001").touch()
    with Fsck(store.path) as checked:
        assert list(checked.run()) == []
        files = list(store.path.rglob("*.safetensors"))
        assert (checked.parts, checked.bytes) == (8, sum(f.stat().st_size for f in files))
    assert not (store.path / "lost+found").exists()


def test_no_payload_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk.PartFile, "read", lambda _: pytest.fail("payload was read"))
    damage(file_of(store.path, KEY, FULL0))
    assert fsck(store.path) == []


def test_payload_is_read_on_request(store: Store) -> None:
    damage(file_of(store.path, KEY, FULL0))
    check(store.path, "checksum", at(KEY), "moved to lost+found", data=True)
    assert kept(store) == [("checksum", at(KEY))]


# ------------------------------------------------------------------------------------------------------- the marker


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": 1}', b"[" * 100_000, None])
def test_a_damaged_marker_is_written_anew(store: Store, content: bytes | None) -> None:
    marker = store.path / "kvfs-store.json"
    marker.unlink()
    if content is None:
        marker.symlink_to("/etc/passwd")
    else:
        marker.write_bytes(content)
    check(store.path, "marker", "kvfs-store.json", "written anew")
    assert kept(store) == [("marker", "kvfs-store.json")]
    with Store.open(store.path) as again:
        assert again.namespaces() == [NS]


def test_a_missing_marker_is_written_anew(store: Store) -> None:
    (store.path / "kvfs-store.json").unlink()
    check(store.path, "marker", "kvfs-store.json", "written anew")


def test_what_never_was_a_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "home" / ".kvfs").mkdir(parents=True)
    (tmp_path / "home" / "letter.txt").write_text("dear")
    before = tree(tmp_path)
    for path in (tmp_path / "home", tmp_path / "home" / "letter.txt", tmp_path / "absent"):
        with pytest.raises(NotAStore):
            fsck(path)
    assert tree(tmp_path) == before


def test_a_store_of_another_format_is_left_alone(store: Store) -> None:
    (store.path / "kvfs-store.json").write_text('{"format": "kvfs-store/2", "id": "0"}')
    before = tree(store.path)
    with pytest.raises(IdentityError, match="kvfs-store/2"):
        fsck(store.path)
    assert tree(store.path) == before


# ------------------------------------------------------------------------------------------------------- namespaces


def spoil_digest(path: Path) -> None:
    body = json.loads(path.read_text())
    body["identity"]["weights"] = "cd" * 32
    path.write_text(json.dumps(body))


SPOILERS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "not an object": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "no identity": lambda path: path.write_text('{"info": {}}'),
    "another's": spoil_digest,
    "a link": lambda path: path.rename(path.parent / "tmp" / "m") and path.symlink_to("tmp/m"),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "a pipe": lambda path: path.unlink() or os.mkfifo(path),
}


@pytest.mark.parametrize("harm", SPOILERS)
def test_a_namespace_without_a_sound_manifest_goes_as_a_whole(store: Store, harm: str) -> None:
    SPOILERS[harm](store.path / MANIFEST.ns_hex / "manifest.json")
    files = {p.name: p.read_bytes() for p in store.path.rglob("*.safetensors")}
    check(store.path, "manifest", MANIFEST.ns_hex, "moved to lost+found")
    [entry] = store.lost.entries()
    assert (entry.reason, entry.path, entry.is_part) == ("manifest", MANIFEST.ns_hex, False)
    assert entry.size >= sum(map(len, files.values()))
    moved = store.path / "lost+found" / entry.name
    assert {p.name: p.read_bytes() for p in moved.rglob("*.safetensors")} == files
    with Store.open(store.path) as again:
        assert again.namespaces() == []
        again.register(MANIFEST)
        put(again, KEY)


def test_a_namespace_whose_maker_died_is_removed(store: Store) -> None:
    name = "ab" * 32
    (store.path / name / "tmp").mkdir(parents=True)
    assert fsck(store.path) == []  # being made
    age(store.path / name)
    check(store.path, "half-made", name, "removed")
    assert not (store.path / name).exists()
    assert kept(store) == []


def test_a_namespace_that_is_a_file(store: Store) -> None:
    (store.path / ("ab" * 32)).write_text("a letter")
    check(store.path, "foreign", "ab" * 32, "moved to lost+found")


def test_a_missing_folder_for_temps_is_made(store: Store) -> None:
    (store.path / MANIFEST.ns_hex / "tmp").rmdir()
    check(store.path, "tmp-folder", below("tmp"), "made")
    put(store, new_key())


@pytest.mark.parametrize("where", ["lost+found", ".kvfs", "tmp", "010"])
def test_a_file_or_link_where_a_folder_should_be(store: Store, tmp_path: Path, where: str) -> None:
    path = where if where in {"lost+found", ".kvfs"} else below(where)
    place = store.path / path
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "letter").write_text("dear")
    if place.exists():
        shutil.rmtree(place)
    place.symlink_to(tmp_path / "outside")
    check(store.path, "foreign", path, "moved to lost+found")
    assert place.is_dir()
    assert not place.is_symlink()
    assert os.listdir(tmp_path / "outside") == ["letter"]
    assert kept(store) == [("foreign", path)]


# ------------------------------------------------------------------------------------------------------- foreign things


PLACES = {"root": "notes", "derived": ".kvfs/notes", "namespace": below("notes"), "temps": below("tmp", "notes"),
          "leaf": below("010", "notes")}  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("what", MAKERS)
def test_what_is_foreign_is_kept_in_lost_and_found(store: Store, what: str, where: str) -> None:
    if what == "device" and os.geteuid() != 0:
        pytest.skip("making devices takes root")
    path = store.path / PLACES[where]
    MAKERS[what](path)
    mode = path.lstat().st_mode
    check(store.path, "foreign", PLACES[where], "moved to lost+found")
    [entry] = store.lost.entries()
    assert (entry.reason, entry.path, entry.is_part) == ("foreign", PLACES[where], False)
    moved = store.path / "lost+found" / entry.name
    assert moved.lstat().st_mode == mode
    assert what != "file" or moved.read_text() == "dear"
    assert what != "folder" or (moved / "sub" / "letter").read_text() == "dear"


@pytest.mark.parametrize(
    "name", ["x" * 255, "-rf", " ", "a\nb", "é", b"\xff\xfe".decode("utf-8", "surrogateescape"), "manifest.json.json"]
)
def test_names_outside_the_grammar(store: Store, name: str) -> None:
    (store.path / MANIFEST.ns_hex / "010" / name).write_text("dear")
    [found] = fsck(store.path)
    assert (found.kind, found.done) == ("foreign", True)
    json.dumps(found.path).encode()
    found.path.encode()
    [entry] = store.lost.entries()
    assert (store.path / "lost+found" / entry.name).read_text() == "dear"
    assert entry.path == below("010", name)
    assert fsck(store.path) == []


def test_what_cannot_be_moved_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.path / "notes").write_text("dear")
    monkeypatch.setattr(store.lost.__class__, "take", lambda *_, **__: (_ for _ in ()).throw(OSError(16, "busy")))
    [found] = fsck(store.path)
    assert found.done is False
    assert "busy" in found.detail
