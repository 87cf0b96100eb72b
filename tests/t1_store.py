"""The tree on disk: publish without replacing, planted files, quarantine, the daemon lock."""

import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kvfs import chunk
from kvfs.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    IdentityError,
    NamespaceNotFound,
    NotAStore,
    StoreBusy,
    StoreReadOnly,
)
from kvfs.identity import PartId
from kvfs.names import is_ns, part_path
from kvfs.store import Store
from tests.samples import MANIFEST, new_key, new_store, payload, put

NS = MANIFEST.ns
PART = PartId("full", 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with new_store(tmp_path / "store") as s:
        yield s


def where(store: Store, key: bytes, part: PartId = PART) -> Path:
    return store.path / NS.hex() / part_path(key, part)


def test_what_is_published_is_read(store: Store) -> None:
    key = new_key()
    put(store, key)
    with chunk.open_part(store.open_part(NS, key, PART), MANIFEST, key, PART) as p:
        assert bytes(p.verify()) == payload(key, PART)
    assert store.masks(NS, [key]) == [MANIFEST.all_parts]
    assert {(f.key, f.part) for f in store.scan(NS)} == {(key, p) for p in MANIFEST.parts}
    mode = where(store, key).stat().st_mode
    assert stat.S_IMODE(mode) == 0o440
    assert os.listdir(store.path / NS.hex() / "tmp") == []


def test_a_second_publisher_succeeds_and_replaces_nothing(store: Store) -> None:
    key = new_key()
    put(store, key, PART)
    ino = where(store, key).stat().st_ino
    temp = store.reserve(NS)
    os.write(temp.fd, b"other bytes")
    os.close(temp.fd)
    assert store.publish(NS, temp.name, key, PART) is False
    assert where(store, key).stat().st_ino == ino
    assert os.listdir(store.path / NS.hex() / "tmp") == []


def test_masks_tell_what_is_there(store: Store) -> None:
    keys = [new_key() for _ in range(4)]
    put(store, keys[0])
    put(store, keys[1], PART)
    put(store, keys[3])
    assert store.masks(NS, keys) == [MANIFEST.all_parts, MANIFEST.bit(PART), 0, MANIFEST.all_parts]


def test_races_of_many_writers_leave_one_whole_file(store: Store) -> None:
    keys = [new_key() for _ in range(20)]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for key in keys:
                put(store, key, PART)
                with chunk.open_part(store.open_part(NS, key, PART), MANIFEST, key, PART) as p:
                    p.verify()
        except BaseException as e:  # noqa: BLE001 - reported by the test
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert len(list(store.scan(NS))) == 20


def test_a_publisher_that_died_between_link_and_unlink_hides_nothing(store: Store) -> None:
    key = new_key()
    put(store, key, PART)
    os.link(where(store, key), store.path / NS.hex() / "tmp" / ("0" * 32))
    os.close(store.open_part(NS, key, PART))
    assert where(store, key).stat().st_nlink == 1


@pytest.mark.parametrize("plant", ["symlink", "hardlink", "fifo", "socket", "folder", "leaf-symlink"])
def test_planted_files_are_refused(store: Store, tmp_path: Path, plant: str) -> None:
    key = new_key()
    path = where(store, key)
    secret = tmp_path / "secret"
    secret.write_text("x" * 5000)
    if plant == "leaf-symlink":
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / path.name).write_text("x")
        path.parent.symlink_to(elsewhere)
    else:
        path.parent.mkdir()
    if plant == "symlink":
        path.symlink_to(secret)
    elif plant == "hardlink":
        path.hardlink_to(secret)
    elif plant == "fifo":
        os.mkfifo(path)
    elif plant == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif plant == "folder":
        path.mkdir()
    with pytest.raises(ChunkCorrupt) as e:
        store.open_part(NS, key, PART)
    assert e.value.reason == "not-a-file"
    assert secret.read_text() == "x" * 5000


def test_a_process_out_of_descriptors_has_found_no_damage(store: Store) -> None:
    key = new_key()
    put(store, key)
    with chunk.open_part(store.open_part(NS, key, PART), MANIFEST, key, PART):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                store.open_part(NS, key, PART)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(store.open_part(NS, key, PART))


def test_quarantine_keeps_file_and_reason(store: Store) -> None:
    key = new_key()
    put(store, key)
    assert store.quarantine(NS, key, PART, "checksum") is True
    assert store.quarantine(NS, key, PART, "checksum") is False
    with pytest.raises(ChunkNotFound):
        store.open_part(NS, key, PART)
    kept = sorted((store.path / "lost+found").iterdir())
    assert len(kept) == 2
    assert json.loads(kept[1].read_text())["reason"] == "checksum"


def test_remove_and_retire(store: Store) -> None:
    key = new_key()
    put(store, key)
    store.remove(NS, key, MANIFEST.parts)
    assert list(store.scan(NS)) == []
    put(store, key)
    store.retire(NS)
    assert store.namespaces() == []
    with pytest.raises(NamespaceNotFound):
        store.masks(NS, [key])
    assert not any(p.name.startswith("retired") for p in store.derived.iterdir())


def test_a_namespace_retired_by_another_process_can_be_registered_again(store: Store) -> None:
    put(store, new_key())
    with Store.open(store.path) as other:
        other.retire(NS)
    with pytest.raises(NamespaceNotFound):
        store.reserve(NS)
    store.register(MANIFEST)
    key = new_key()
    put(store, key)
    with Store.open(store.path) as other:
        assert other.masks(NS, [key]) == [MANIFEST.all_parts]


def test_two_who_list_at_the_same_time_both_see_everything(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bytes]] = []

    def in_between(name: str) -> bool:
        monkeypatch.undo()
        seen.append(store.namespaces())
        return is_ns(name)

    monkeypatch.setattr("kvfs.store.is_ns", in_between)
    assert store.namespaces() == [NS]
    assert seen
    assert all(each == [NS] for each in seen)


def test_a_namespace_may_be_retired_while_it_is_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def stat_and_retire(*args: Any, **kwargs: Any) -> os.stat_result:
        monkeypatch.undo()
        found = real(*args, **kwargs)
        store.retire(NS)
        return found

    store.reserve(NS)  # a descriptor of its folder is kept
    monkeypatch.setattr(os, "stat", stat_and_retire)
    assert store.namespaces() == []


def test_temps_of_dead_writers_are_reaped(store: Store) -> None:
    old, young = store.reserve(NS), store.reserve(NS)
    os.utime(old.fd, (1, 1))
    for t in (old, young):
        os.close(t.fd)
    assert store.reap_temps(NS) == 1
    assert os.listdir(store.path / NS.hex() / "tmp") == [young.name]


def test_init_opens_what_is_there_and_refuses_foreign_folders(store: Store, tmp_path: Path) -> None:
    with Store.init(store.path) as again:
        assert again.namespaces() == [NS]
        assert again.info(NS)["name"] == "sample"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(StoreReadOnly, match="not empty"):
        Store.init(tmp_path / "home")
    with pytest.raises(NotAStore, match="kvfs init"):
        Store.open(tmp_path / "home")
    with pytest.raises(NotAStore):
        Store.open(tmp_path / "absent")


def test_a_manifest_that_is_not_its_folders_is_refused(store: Store) -> None:
    path = store.path / NS.hex() / "manifest.json"
    body = json.loads(path.read_text())
    body["identity"]["weights"] = "cd" * 32
    path.write_text(json.dumps(body))
    with Store.open(store.path) as s, pytest.raises(IdentityError, match="fsck"):
        s.manifest(NS)
    path.write_text("{")
    with Store.open(store.path) as s, pytest.raises(IdentityError, match="damaged"):
        s.manifest(NS)


def test_one_daemon_a_store_and_host(store: Store) -> None:
    store.lock_daemon("pid 1 at /mnt/kvfs")
    code = "import sys; from kvfs.store import Store; Store.open(sys.argv[1]).lock_daemon('me')"
    argv = [sys.executable, "-c", code, store.path]
    r = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert "StoreBusy" in r.stderr
    assert "pid 1 at /mnt/kvfs" in r.stderr
    with Store.open(store.path) as other, pytest.raises(StoreBusy):
        other.lock_daemon("me")


def test_full_durability_syncs_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), real(fd)))
    with Store.init(tmp_path / "s", durability="full") as s:
        s.register(MANIFEST)
        synced.clear()
        put(s, new_key(), PART)
    assert synced == [False, True]


@pytest.mark.parametrize("name", ["../x", "", "a" * 31, "A" * 32, "0" * 32 + "/"])
def test_temp_names_have_a_closed_grammar(store: Store, name: str) -> None:
    with pytest.raises(ChunkNotFound):
        store.publish(NS, name, new_key(), PART)
