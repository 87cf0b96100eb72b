"""The worker's state: it follows every change, remembers across restarts, and loses nothing to damage."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.daemon.catalog import Catalog
from kvfs.errors import ChunkCorrupt, ChunkNotFound, NamespaceNotFound, StoreBusy, StoreFull, StoreReadOnly
from kvfs.identity import PartId
from kvfs.store import Store
from kvfs.upkeep.leases import Leases
from tests.conftest import Logs
from tests.daemons import catalog_of, damage, file_of, read
from tests.samples import MANIFEST, new_key, new_store, payload, put

NS = MANIFEST.ns
WHOLE = MANIFEST.all_parts
FULL0 = PartId("full", 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store") as found:
        yield found


@pytest.fixture
def catalog(store: Store) -> Iterator[Catalog]:
    with catalog_of(store.path) as found:
        yield found
        found.index.check_integrity()
        found.leases.check_integrity()


def events(catalog: Catalog) -> list[tuple[str, bytes | None, PartId | None]]:
    heard: list[tuple[str, bytes | None, PartId | None]] = []
    catalog.on_change(lambda event, _, key, part: heard.append((event, key, part)))
    return heard


def temp_of(catalog: Catalog, key: bytes, part: PartId = FULL0) -> str:
    """A written temp file."""
    temp = catalog.reserve(NS, 1000)
    with Store.init(catalog.store.path.parent / "other") as other:
        other.register(MANIFEST)
        put(other, key, part)
        os.write(temp.fd, file_of(other.path, key, part).read_bytes())
    os.close(temp.fd)
    return temp.name


def test_what_is_there_at_the_start_is_known(store: Store) -> None:
    key = new_key()
    put(store, key)
    with catalog_of(store.path) as catalog:
        assert catalog.lookup(NS, [key, new_key()]) == [WHOLE, 0]
        stats = catalog.stats()
        assert (stats["hits"], stats["misses"], stats["chunks"]) == (1, 1, 1)


def test_a_snapshot_and_the_verification_state_survive_a_restart(store: Store) -> None:
    key = new_key()
    put(store, key)
    with catalog_of(store.path) as first:
        os.close(first.open_part(NS, key, FULL0))
        first.save()
    behind = new_key()
    put(store, behind)
    with catalog_of(store.path) as second:
        assert second.lookup(NS, [key, behind]) == [WHOLE, 0]  # as the snapshot says
        opened = second.verifier.open(NS, key, FULL0)
        os.close(opened.fd)
        assert opened.verified
        heard = events(second)
        assert second.reconcile() == (4, 0)
        assert second.lookup(NS, [behind]) == [WHOLE]
        assert {e[0] for e in heard} == {"added"}
        assert len(heard) == 4


def test_every_change_is_told(catalog: Catalog) -> None:
    heard, key = events(catalog), new_key()
    assert catalog.publish_file(NS, temp_of(catalog, key), key, FULL0)
    assert not catalog.publish_file(NS, temp_of(catalog, key), key, FULL0)
    assert catalog.remove_chunk(NS, key)
    assert not catalog.remove_chunk(NS, key)
    catalog.retire(NS)
    catalog.register(MANIFEST)
    catalog.register(MANIFEST)
    assert heard == [
        ("added", key, FULL0),
        ("removed", key, FULL0),
        ("retired", None, None),
        ("registered", None, None),
    ]


def test_an_open_verifies_once(catalog: Catalog, store: Store) -> None:
    key = new_key()
    put(store, key)
    catalog.reconcile()
    for _ in range(3):
        fd = catalog.open_part(NS, key, FULL0)
        assert read(fd, key, FULL0) == payload(key, FULL0)
        os.close(fd)
    assert catalog.metrics.snapshot()["kvfs_verify_seconds_count"] == 1


@pytest.mark.parametrize("harm", ["flip", "cut", "extend", "rename", "symlink", "folder"])
def test_damage_found_at_an_open_is_a_miss_and_is_kept_for_inquiry(
    catalog: Catalog, store: Store, logs: Logs, harm: str
) -> None:
    key, other = new_key(), new_key()
    put(store, key)
    put(store, other)
    catalog.reconcile()
    path = file_of(store.path, key, FULL0)
    if harm == "flip":
        damage(path)
    elif harm in {"cut", "extend"}:
        path.chmod(0o640)
        os.truncate(path, path.stat().st_size + (1 if harm == "extend" else -1))
    elif harm == "rename":
        file_of(store.path, other, FULL0).rename(path)
    elif harm == "symlink":
        path.unlink()
        path.symlink_to(file_of(store.path, other, FULL0))
    else:
        path.unlink()
        path.mkdir()
    reason = {"flip": "checksum", "cut": "size", "extend": "size", "rename": "wrong-key"}.get(harm, "not-a-file")
    heard = events(catalog)
    with pytest.raises(ChunkCorrupt) as e:
        catalog.open_part(NS, key, FULL0)
    assert e.value.reason == reason
    logs.claim("lost.found")
    assert heard == [("removed", key, FULL0)]
    assert catalog.lookup(NS, [key]) == [WHOLE & ~MANIFEST.bit(FULL0)]
    assert catalog.stats()["quarantined"] == {reason: 1}
    assert len(list((store.path / "lost+found").glob("*.json"))) == 1
    with pytest.raises(ChunkNotFound):
        catalog.open_part(NS, key, FULL0)


def test_a_part_that_vanished_is_forgotten_when_it_is_asked_for(catalog: Catalog, store: Store) -> None:
    key = new_key()
    put(store, key)
    catalog.reconcile()
    file_of(store.path, key, FULL0).unlink()
    heard = events(catalog)
    for _ in range(2):
        with pytest.raises(ChunkNotFound):
            catalog.lease("me", 1, NS, [(key, FULL0)])
    assert heard == [("removed", key, FULL0)]
    assert len(catalog.leases) == 0


def test_only_a_holder_can_vouch(catalog: Catalog, store: Store) -> None:
    key = new_key()
    put(store, key)
    catalog.reconcile()

    def lease_number(n: int) -> bool:
        [opened] = catalog.lease("me", n, NS, [(key, FULL0)])
        os.close(opened.fd)
        return opened.verified

    assert not lease_number(1)
    catalog.report("another", NS, key, FULL0, None)
    assert not lease_number(2)
    catalog.report("me", NS, key, FULL0, None)
    assert lease_number(3)


def test_a_leased_chunk_is_not_removed(catalog: Catalog, store: Store) -> None:
    key, free = new_key(), new_key()
    put(store, key)
    put(store, free)
    catalog.reconcile()
    [opened] = catalog.lease("me", 1, NS, [(key, FULL0)])
    os.close(opened.fd)
    with pytest.raises(StoreBusy, match="1 leases"):
        catalog.remove_chunk(NS, key)
    with pytest.raises(StoreBusy):
        catalog.retire(NS)
    assert catalog.remove_chunk(NS, free)
    catalog.leases.drop("me")
    assert catalog.remove_chunk(NS, key)


def test_a_file_is_published_only_as_what_it_is(catalog: Catalog) -> None:
    key = new_key()
    assert catalog.publish_file(NS, temp_of(catalog, key), key, FULL0)
    with pytest.raises(ChunkCorrupt, match="wrong-key"):
        catalog.publish_file(NS, temp_of(catalog, new_key()), key, FULL0)
    assert os.listdir(catalog.store.path / MANIFEST.ns_hex / "tmp") == []
    assert catalog.stats()["drops"] == 1


def test_a_read_only_daemon_changes_nothing(store: Store, logs: Logs) -> None:
    key = new_key()
    put(store, key)
    damage(file_of(store.path, key, FULL0))
    before = sorted(store.path.rglob("*"))
    with catalog_of(store.path, read_only=True) as catalog:
        for refused in (
            lambda: catalog.reserve(NS, 1),
            lambda: catalog.remove_chunk(NS, key),
            lambda: catalog.retire(NS),
            lambda: catalog.register(MANIFEST.with_adapter("ab" * 32)),
        ):
            with pytest.raises(StoreReadOnly):
                refused()
        assert catalog.register(MANIFEST) == NS
        with pytest.raises(ChunkCorrupt):
            catalog.open_part(NS, key, FULL0)
        logs.claim("damaged")
        assert catalog.lookup(NS, [key]) == [WHOLE & ~MANIFEST.bit(FULL0)]
        catalog.save()
    assert sorted(store.path.rglob("*")) == before


def test_a_snapshot_that_cannot_be_written_is_only_a_warning(catalog: Catalog, logs: Logs) -> None:
    (catalog.store.path / ".kvfs").rename(catalog.store.path / ".away")
    catalog.save()
    logs.claim("no snapshot")


def test_unknown_namespaces_are_errors(catalog: Catalog) -> None:
    for ask in (
        lambda: catalog.lookup(new_key(), [new_key()]),
        lambda: catalog.reserve(new_key(), 1),
        lambda: catalog.retire(new_key()),
        lambda: catalog.touch(new_key(), [new_key()]),
    ):
        with pytest.raises(NamespaceNotFound):
            ask()


# --- leases by themselves ---


def test_leases_are_counted_per_chunk() -> None:
    leases = Leases()
    leases.grant("a", 1, b"n", [b"x", b"y", b"x"])
    leases.grant("b", 1, b"n", [b"x"])
    leases.check_integrity()
    assert (leases.held(b"n", b"x"), leases.held(b"n", b"y"), leases.held(b"m", b"x"), len(leases)) == (2, 1, 0, 2)
    leases.grant("a", 1, b"n", [b"z"])  # the same number: in place of the first
    leases.check_integrity()
    assert (leases.held(b"n", b"x"), leases.held(b"n", b"z")) == (1, 1)
    leases.release("a", 1)
    leases.release("a", 1)
    leases.release("stranger", 1)
    leases.drop("b")
    leases.drop("b")
    leases.check_integrity()
    assert len(leases) == 0


def test_a_holder_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.upkeep.leases.MAX_LEASES", 2)
    leases = Leases()
    for n in (1, 2, 2, 1):
        leases.grant("a", n, b"n", [b"x"])
    with pytest.raises(StoreFull):
        leases.grant("a", 3, b"n", [b"x"])
    leases.grant("b", 3, b"n", [b"x"])
    leases.check_integrity()


def test_what_is_being_removed_cannot_be_claimed() -> None:
    leases = Leases()
    with leases.removing(b"n", b"x"):
        with pytest.raises(ChunkNotFound):
            leases.grant("a", 1, b"n", [b"y", b"x"])
        leases.grant("a", 1, b"n", [b"y"])
    leases.grant("a", 2, b"n", [b"x"])
    with pytest.raises(StoreBusy), leases.removing(b"n"):
        pass
    leases.drop("a")
    with leases.removing(b"n"), pytest.raises(ChunkNotFound):
        leases.grant("a", 1, b"n", [b"z"])
    leases.check_integrity()


def test_after_a_restart_claims_have_time_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.upkeep.leases.SETTLE", 0.2)
    leases = Leases(resumed=True)
    assert not leases.settled
    with pytest.raises(StoreBusy), leases.removing(b"n", b"x"):
        pass
    time.sleep(0.25)
    with leases.removing(b"n", b"x"):
        assert leases.settled


def test_leases_from_many_threads_stay_consistent() -> None:
    leases = Leases()

    def work(me: int) -> None:
        for n in range(300):
            leases.grant(me, n % 7, b"n", [bytes([n % 11]), bytes([me])])
            leases.release(me, (n * 3) % 7)
        leases.drop(me)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    leases.check_integrity()
    assert len(leases) == 0
