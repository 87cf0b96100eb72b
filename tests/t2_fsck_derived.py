"""Every kind of damage to what daemons keep beside a store; and stores that a daemon has."""

from __future__ import annotations

import fcntl
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvfs.errors import StoreBusy
from kvfs.fsck import Fsck
from kvfs.index import Index
from kvfs.store import Store
from kvfs.verify import Verifier
from tests.daemons import damage, file_of
from tests.fscks import FULL0, KEY, NS, OTHER, PAST, check, fsck
from tests.samples import MANIFEST, new_key, new_store, put

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Two whole chunks of one namespace."""
    with new_store(tmp_path / "store") as made:
        put(made, KEY)
        put(made, OTHER)
        yield made


# ------------------------------------------------------------------------------------------------------- derived files


def test_a_namespace_whose_removal_was_cut_short(store: Store) -> None:
    name = "retired-" + MANIFEST.ns_hex[:12] + "-" + "0" * 16
    shutil.copytree(store.path / MANIFEST.ns_hex, store.path / ".kvfs" / name)
    check(store.path, "retired", f".kvfs/{name}", "removed")
    assert not (store.path / ".kvfs" / name).exists()


def snapshot(store: Store) -> Path:
    index = Index(store)
    index.reconcile()
    index.touch(NS, [KEY], now=PAST)
    index.save()
    return index.snapshot_path


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_snapshot_is_removed(store: Store, harm: str) -> None:
    path = snapshot(store)
    raw = path.read_bytes()
    path.write_bytes({"flip": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "cut": raw[:-1], "empty": b""}[harm])
    check(store.path, "index", f".kvfs/{path.name}", "removed")


def test_a_stale_snapshot_is_written_anew(store: Store) -> None:
    path = snapshot(store)
    assert fsck(store.path) == []
    put(store, new_key())
    store.remove(NS, OTHER, MANIFEST.parts)
    found = check(store.path, "stale-index", f".kvfs/{path.name}", "written anew")
    assert found.detail == "4 parts unknown to it, 4 gone"
    again = Index(store)
    assert again.load()
    row = again.get(NS, KEY)
    assert row is not None
    assert row.last == PAST


def test_a_snapshot_follows_repairs(store: Store) -> None:
    snapshot(store)
    damage(file_of(store.path, KEY, FULL0), at=100)
    fsck(store.path)
    index = Index(store)
    assert index.load()
    assert index.reconcile() == (0, 0)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_verified_state_is_removed(store: Store, harm: str) -> None:
    verifier, path = Verifier(store), store.path / ".kvfs" / f"verified.{socket.gethostname()}"
    assert verifier.recheck(NS, KEY, FULL0) == {False: None}
    verifier.save(path)
    assert fsck(store.path) == []
    raw = path.read_bytes()
    path.write_bytes({"flip": raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:], "cut": raw[:-1], "empty": b""}[harm])
    check(store.path, "verified", f".kvfs/{path.name}", "removed")


# ------------------------------------------------------------------------------------------------------- daemons


def test_a_stale_lock_is_emptied(store: Store) -> None:
    """One that names its holder and is free: the holder was killed."""
    code = (
        "import os, signal, sys; from kvfs.store import Store;"
        "Store.open(sys.argv[1]).lock_daemon('the daemon at /mnt'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, store.path], timeout=30, check=False)
    [lock] = (store.path / ".kvfs").glob("daemon.*.lock")
    assert lock.read_text() == "the daemon at /mnt"
    check(store.path, "stale-lock", f".kvfs/{lock.name}", "emptied")
    assert lock.read_text() == ""


def test_a_daemon_that_ends_leaves_no_stale_lock(store: Store) -> None:
    with Store.open(store.path) as daemon:
        daemon.lock_daemon("the daemon at /mnt")
    assert fsck(store.path) == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_store_in_use_is_refused(store: Store, dry_run: bool) -> None:
    (store.path / "notes").write_text("dear")
    with Store.open(store.path) as daemon:
        daemon.lock_daemon("the daemon at /mnt")
        with pytest.raises(StoreBusy, match="the daemon at /mnt; stop it"):
            fsck(store.path, dry_run=dry_run)
    assert (store.path / "notes").exists()


def test_a_store_that_another_host_serves_is_refused(store: Store) -> None:
    with (store.path / ".kvfs" / "daemon.elsewhere.lock").open("w") as lock:
        lock.write("the daemon at elsewhere:/mnt")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreBusy, match="elsewhere:/mnt; stop it"):
            fsck(store.path)


def test_no_daemon_starts_while_a_store_is_checked(store: Store) -> None:
    with Fsck(store.path) as running:
        (store.path / "notes").write_text("dear")
        assert next(running.run()).kind == "foreign"
        with Store.open(store.path) as daemon, pytest.raises(StoreBusy, match="kvfs fsck"):
            daemon.lock_daemon("the daemon at /mnt")
    with Store.open(store.path) as daemon:
        daemon.lock_daemon("the daemon at /mnt")


def test_a_lock_that_is_no_file(store: Store) -> None:
    with Store.open(store.path) as daemon:
        daemon.lock_daemon("x")
    [lock] = (store.path / ".kvfs").glob("daemon.*.lock")
    lock.unlink()
    lock.mkdir()
    [found] = fsck(store.path)
    assert (found.kind, found.path, found.done) == ("foreign", f".kvfs/{lock.name}", True)
    assert fsck(store.path) == []
