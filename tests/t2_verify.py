"""What is known to be whole: remembered by the state of the file, across restarts of one boot, and no longer."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs import chunk
from kvfs.errors import ChunkCorrupt, StoreBusy
from kvfs.identity import PartId
from kvfs.store import Store
from kvfs.verify import Verifier
from tests.daemons import damage, file_of, meta
from tests.samples import MANIFEST, new_key, new_store, payload, put

NS = MANIFEST.ns
FULL0 = PartId("full", 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store") as found:
        yield found


def is_verified(verifier: Verifier, key: bytes) -> bool:
    opened = verifier.open(NS, key, FULL0)
    os.close(opened.fd)
    return opened.verified


def check(verifier: Verifier, key: bytes) -> None:
    fd = verifier.open(NS, key, FULL0).fd
    try:
        verifier.check(fd, NS, key, FULL0)
    finally:
        os.close(fd)


def write(store: Store, key: bytes) -> str:
    temp = store.reserve(NS)
    chunk.write_part(temp.fd, MANIFEST, meta(key, FULL0), payload(key, FULL0))
    os.close(temp.fd)
    return temp.name


def test_a_file_is_verified_until_anything_is_done_to_it(store: Store) -> None:
    verifier, key = Verifier(store), new_key()
    put(store, key, FULL0)
    path = file_of(store.path, key, FULL0)
    for change in (
        lambda: os.utime(path),
        lambda: path.chmod(0o400),
        lambda: damage(path) or damage(path),
        lambda: path.rename(path.with_suffix(".x")) and path.with_suffix(".x").rename(path),
    ):
        assert not is_verified(verifier, key)
        check(verifier, key)
        assert is_verified(verifier, key)
        change()


def test_always_means_always(store: Store) -> None:
    verifier, key = Verifier(store, always=True), new_key()
    put(store, key, FULL0)
    check(verifier, key)
    assert not is_verified(verifier, key)


def test_a_published_part_is_verified_and_the_temp_file_gone(store: Store) -> None:
    verifier, key = Verifier(store), new_key()
    admitted = verifier.admit(NS, write(store, key), key, FULL0)
    assert (admitted.created, admitted.size) == (True, file_of(store.path, key, FULL0).stat().st_size)
    assert (admitted.meta.key, admitted.meta.tokens) == (key, 256)
    assert is_verified(verifier, key)
    assert verifier.admit(NS, write(store, key), key, FULL0).created is False
    assert os.listdir(store.path / MANIFEST.ns_hex / "tmp") == []


def test_a_part_that_was_there_is_not_verified_by_a_copy(store: Store) -> None:
    """The file that stays is the old one, which may be damaged."""
    verifier, key = Verifier(store), new_key()
    put(store, key, FULL0)
    damage(file_of(store.path, key, FULL0))
    assert verifier.admit(NS, write(store, key), key, FULL0).created is False
    assert not is_verified(verifier, key)


def test_a_writer_found_at_publishing_does_not_end_the_process(store: Store) -> None:
    """Breaking a file lease sends a signal; an opener for writing must not be able to kill the daemon with it."""
    verifier, key = Verifier(store), new_key()
    name = write(store, key)
    path = store.path / MANIFEST.ns_hex / "tmp" / name
    keep = os.open(path, os.O_RDWR)
    with pytest.raises(StoreBusy):
        verifier.admit(NS, name, key, FULL0)
    os.close(keep)
    assert signal.getsignal(signal.SIGIO) is signal.SIG_DFL  # so it would have died of it


def test_opening_a_sealed_file_for_writing_waits_and_harms_nobody(store: Store) -> None:
    from kvfs.verify import _seal

    key = new_key()
    path = store.path / MANIFEST.ns_hex / "tmp" / write(store, key)
    fd = os.open(path, os.O_RDONLY)
    _seal(fd, "a test", is_network=False)
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_RDWR | os.O_NONBLOCK)  # breaks the lease: the signal is sent here
    os.close(fd)


def test_a_part_that_somebody_found_damaged_is_read_again(store: Store) -> None:
    verifier, key = Verifier(store), new_key()
    assert verifier.recheck(NS, key, FULL0) == {}
    put(store, key, FULL0)
    assert verifier.recheck(NS, key, FULL0) == {False: None}
    assert is_verified(verifier, key)
    damage(file_of(store.path, key, FULL0))
    error = verifier.recheck(NS, key, FULL0)[False]
    assert isinstance(error, ChunkCorrupt)
    assert error.reason == "checksum"
    assert not is_verified(verifier, key)


def test_the_state_survives_a_restart_but_not_damage_nor_a_boot(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier, key, path = Verifier(store), new_key(), tmp_path / "state"
    put(store, key, FULL0)
    check(verifier, key)
    verifier.save(path)
    assert Verifier(store).load(tmp_path / "absent") is False

    again = Verifier(store)
    assert again.load(path)
    assert is_verified(again, key)

    good = path.read_bytes()
    for bad in (good[:-1], good + b"\0" * 8, bytes([good[0] ^ 1]) + good[1:], good[:-3] + b"abc", b""):
        path.write_bytes(bad)
        hurt = Verifier(store)
        assert hurt.load(path) is False
        assert not is_verified(hurt, key)

    path.write_bytes(good)
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr("kvfs.verify._BOOT_ID", tmp_path / "boot")
    assert Verifier(store).load(path) is False


def test_memory_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.verify.MAX_REMEMBERED", 3)
    verifier, keys = Verifier(store), [new_key() for _ in range(4)]
    for key in keys:
        put(store, key, FULL0)
        check(verifier, key)
    assert [is_verified(verifier, key) for key in keys] == [False, True, True, True]
