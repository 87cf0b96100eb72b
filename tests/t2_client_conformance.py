"""One suite for both clients: a store behaves the same through its mount's socket and as a bare folder."""

import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kvfs import chunk
from kvfs.client import Client, MountClient, StoreClient, connect
from kvfs.errors import ChunkCorrupt, ChunkNotFound, ConfigError, IdentityError, NamespaceNotFound, StoreBusy, StoreFull
from kvfs.identity import PartId
from kvfs.store import Store
from tests.conftest import Logs
from tests.daemons import catalog_of, damage, file_of, meta, put, read, serving
from tests.samples import MANIFEST, new_key, new_store, payload

NS = MANIFEST.ns
WHOLE = MANIFEST.all_parts
FULL0 = PartId("full", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_store(tmp_path / "store").close()
    return tmp_path / "store"


@pytest.fixture(params=["mount", "store"])
def client(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[Client]:
    if request.param == "store":
        with connect(store=folder) as found:
            yield found
    else:
        with (
            catalog_of(folder) as catalog,
            serving(catalog, tmp_path / "mnt"),
            connect(mount=tmp_path / "mnt") as found,
        ):
            yield found
            catalog.index.check_integrity()
            catalog.leases.check_integrity()


def open_fds(client: Client) -> int:
    """Descriptors of this process, with all connections and folders that the client needs already open."""
    client.report(NS, new_key(), FULL0)
    client.reserve(NS, 1).discard()
    return len(os.listdir("/proc/self/fd"))


def look(client: Client, keys: Sequence[bytes]) -> list[int]:
    """A lookup with the patience of a test on a busy machine."""
    return client.lookup(NS, keys, timeout=5.0)


def temps(folder: Path) -> list[str]:
    return os.listdir(folder / MANIFEST.ns_hex / "tmp")


def test_what_is_stored_is_found_and_read_back(client: Client, folder: Path) -> None:
    keys = [new_key() for _ in range(3)]
    assert look(client, keys) == [0, 0, 0]
    for key in keys[:2]:
        assert put(client, key) == [True] * 4
    assert look(client, keys) == [WHOLE, WHOLE, 0]
    refs = [(key, part) for key in keys[:2] for part in MANIFEST.parts]
    with client.lease(NS, refs) as lease:
        assert [(p.key, p.part) for p in lease.parts] == refs
        for p in lease.parts:
            assert read(p.fd, p.key, p.part) == payload(p.key, p.part)
    assert temps(folder) == []
    assert file_of(folder, keys[0], FULL0).stat().st_mode & 0o777 == 0o440


def test_a_gap_hides_nothing_after_it(client: Client) -> None:
    """Tails are probed in the lookup of the chain, behind the first chunk that is missing."""
    keys = [new_key() for _ in range(4)]
    put(client, keys[3])
    put(client, keys[1], [FULL0])
    assert look(client, keys) == [0, MANIFEST.bit(FULL0), 0, WHOLE]


def test_no_keys_and_many_keys(client: Client) -> None:
    assert look(client, []) == []
    key = new_key()
    put(client, key)
    many = [new_key() for _ in range(20_000)]
    assert client.lookup(NS, [*many, key], timeout=5.0) == [0] * len(many) + [WHOLE]


def test_registering_is_idempotent(client: Client) -> None:
    other = replace(MANIFEST, weights="cd" * 32)
    with pytest.raises(NamespaceNotFound):
        client.lookup(other.ns, [new_key()], timeout=5.0)
    assert client.register(other, {"name": "other"}) == client.register(other) == other.ns
    assert client.lookup(other.ns, [new_key()], timeout=5.0) == [0]


def test_publishing_twice_is_success(client: Client, folder: Path) -> None:
    key = new_key()
    assert put(client, key, [FULL0]) == [True]
    assert put(client, key, [FULL0]) == [False]
    assert temps(folder) == []


def test_a_lease_takes_all_or_nothing(client: Client) -> None:
    key, missing = new_key(), new_key()
    put(client, key)
    look(client, [key])
    before = open_fds(client)
    with pytest.raises(ChunkNotFound, match=missing.hex()):
        client.lease(NS, [(key, FULL0), (missing, FULL0)])
    assert open_fds(client) == before
    with pytest.raises(FileNotFoundError):
        client.lease(new_key(), [(key, FULL0)])
    assert client.lease(NS, []).parts == ()


def test_more_parts_than_one_message_carries(client: Client) -> None:
    key = new_key()
    put(client, key)
    before = open_fds(client)
    with client.lease(NS, [(key, MANIFEST.parts[i % 4]) for i in range(600)], timeout=5.0) as lease:
        assert len({p.fd for p in lease.parts}) == 600
        last = lease.parts[599]
        assert read(last.fd, key, last.part) == payload(key, last.part)
    assert open_fds(client) == before


def test_releasing_twice_is_harmless(client: Client) -> None:
    key = new_key()
    put(client, key)
    before = open_fds(client)
    lease = client.lease(NS, [(key, FULL0)])
    lease.release()
    lease.release()
    assert lease.parts == ()
    assert open_fds(client) == before


def test_what_a_reader_vouches_for_is_verified(client: Client, folder: Path) -> None:
    """Files that others wrote are unverified until somebody has read them."""
    key = new_key()
    put(client, key)
    with client.lease(NS, [(key, FULL0)]) as lease:
        assert lease.parts[0].verified  # read in full when it was published
        path = file_of(folder, key, FULL0)
        os.utime(path)
    with client.lease(NS, [(key, FULL0)]) as lease:
        assert not lease.parts[0].verified
        client.report(NS, key, FULL0)
    with client.lease(NS, [(key, FULL0)]) as lease:
        assert lease.parts[0].verified


def test_damage_that_is_reported_goes_to_quarantine(client: Client, folder: Path, logs: Logs) -> None:
    key = new_key()
    put(client, key)
    damage(file_of(folder, key, FULL0))
    with client.lease(NS, [(key, FULL0)]) as lease:
        assert not lease.parts[0].verified
        with pytest.raises(ChunkCorrupt) as e:
            read(lease.parts[0].fd, key, FULL0)
        assert client.report(NS, key, FULL0, e.value.reason)
        assert client.report(NS, key, FULL0, e.value.reason)  # somebody else has found it too
    if isinstance(client, MountClient):
        logs.claim("damaged .checksum.*lost.found")
    assert look(client, [key]) == [WHOLE & ~MANIFEST.bit(FULL0)]
    assert client.stats()["quarantined"] == {"checksum": 1}
    kept, note = sorted((folder / "lost+found").iterdir(), key=lambda p: p.suffix == ".json")
    assert kept.name.startswith(f"{NS.hex()[:12]}.{key.hex()}.full.h0")
    assert json.loads(note.read_text())["reason"] == "checksum"
    assert put(client, key, [FULL0]) == [True]  # the next writer mends it


def test_a_false_alarm_changes_nothing(client: Client) -> None:
    key = new_key()
    put(client, key)
    assert not client.report(NS, key, FULL0, "checksum")
    assert client.report(NS, new_key(), FULL0, "checksum")
    assert look(client, [key]) == [WHOLE]
    assert client.stats()["quarantined"] == {}


@pytest.mark.parametrize("how", ["key", "part", "short", "long", "flipped", "empty"])
def test_what_does_not_hold_what_it_should_is_refused(client: Client, folder: Path, how: str) -> None:
    key, reason = (
        new_key(),
        {
            "key": "wrong-key",
            "part": "wrong-part",
            "short": "size",
            "long": "size",
            "flipped": "checksum",
            "empty": "truncated",
        }[how],
    )
    with client.reserve(NS, 200_000) as r:
        written = meta(new_key() if how == "key" else key, PartId("full", 1) if how == "part" else FULL0)
        if how != "empty":
            size = chunk.write_part(r.fd, MANIFEST, written, payload(key, written.part))
            if how in {"short", "long"}:
                os.ftruncate(r.fd, size + (1 if how == "long" else -1))
            if how == "flipped":
                os.pwrite(r.fd, bytes([payload(key, FULL0)[-1] ^ 1]), size - 1)
        with pytest.raises(ChunkCorrupt) as e:
            client.publish(NS, r, key, FULL0)
    assert e.value.reason == reason
    assert look(client, [key]) == [0]
    assert temps(folder) == []
    assert client.stats()["drops"] == 1


def test_a_part_the_namespace_does_not_have_is_refused(client: Client, folder: Path) -> None:
    with client.reserve(NS, 100) as r, pytest.raises(IdentityError):
        client.publish(NS, r, new_key(), PartId("mla", 0))
    assert temps(folder) == []


@pytest.mark.parametrize("left", ["map", "descriptor"])
def test_a_file_that_can_still_be_written_is_refused(client: Client, folder: Path, left: str) -> None:
    key = new_key()
    r = client.reserve(NS, 200_000)
    chunk.write_part(r.fd, MANIFEST, meta(key, FULL0), payload(key, FULL0))
    keep = mmap.mmap(r.fd, 0) if left == "map" else os.dup(r.fd)
    with pytest.raises(StoreBusy, match="writer"):
        client.publish(NS, r, key, FULL0)
    keep.close() if isinstance(keep, mmap.mmap) else os.close(keep)
    assert look(client, [key]) == [0]
    assert temps(folder) == []


def test_a_reservation_that_is_left_is_given_up(client: Client, folder: Path) -> None:
    before = open_fds(client)
    with client.reserve(NS, 100):
        assert len(temps(folder)) == 1
    assert temps(folder) == []
    assert open_fds(client) == before


def test_more_than_the_disk_holds_is_refused_before_it_is_written(client: Client, folder: Path) -> None:
    with pytest.raises(StoreFull):
        client.reserve(NS, shutil.disk_usage(folder).free * 2)
    assert temps(folder) == []


def test_a_removed_chunk_is_gone_and_its_readers_read_on(client: Client, folder: Path) -> None:
    key, stays = new_key(), new_key()
    put(client, key)
    put(client, stays)
    with client.lease(NS, [(key, FULL0)]) as lease:
        fd = os.dup(lease.parts[0].fd)
    assert client.remove(NS, key) is True
    assert client.remove(NS, key) is False
    assert read(fd, key, FULL0) == payload(key, FULL0)
    os.close(fd)
    assert look(client, [key, stays]) == [0, WHOLE]
    client.touch(NS, [key, stays])


def test_a_retired_namespace_is_gone(client: Client, folder: Path) -> None:
    for _ in range(3):
        put(client, new_key(), [FULL0])
    assert client.retire(NS) == 3
    with pytest.raises(NamespaceNotFound):
        look(client, [new_key()])
    assert not (folder / MANIFEST.ns_hex).exists()
    client.register(MANIFEST)
    assert put(client, new_key(), [FULL0]) == [True]


def test_explain_names_what_is_missing_and_what_differs(client: Client) -> None:
    keys = [new_key() for _ in range(3)]
    put(client, keys[0])
    put(client, keys[1], [p for p in MANIFEST.parts if p != PartId("full", 1)])
    put(client, keys[2])
    told = client.explain(NS, keys)
    assert (told["verdict"], told["reach"], told["complete"]) == ("partial", 256, 1)
    assert told["blocker"] == {
        "index": 1,
        "key": keys[1].hex(),
        "absent": False,
        "kind": "full",
        "missing": ["full.h1"],
    }
    assert client.explain(NS, keys[:1])["verdict"] == "hit"
    stranger = replace(MANIFEST, config={"model_type": "sample", "rope_theta": 1e6}, adapter="ef" * 32)
    told = client.explain(stranger.ns, keys, stranger)
    assert told["verdict"] == "unknown-namespace"
    assert told["near"][0]["name"] == "sample"
    assert told["near"][0]["differs"] == [["adapter", "ef" * 32, None], ["config.rope_theta", 1e6, None]]


def test_stats_count(client: Client, folder: Path) -> None:
    keys = [new_key(), new_key()]
    put(client, keys[0])
    look(client, keys)
    stats = client.stats()
    size = sum(file_of(folder, keys[0], part).stat().st_size for part in MANIFEST.parts)
    assert (stats["chunks"], stats["bytes"], stats["hits"], stats["misses"]) == (1, size, 1, 1)
    assert (stats["publishes"], stats["drops"], stats["leases"]) == (4, 0, 0)
    assert stats["namespaces"] == [{"ns": NS.hex(), "name": "sample", "revision": "r1", "chunks": 1, "bytes": size}]
    assert stats["uptime"] > 0
    assert stats["version"]


def test_many_threads_store_and_read_the_same_chunks(client: Client) -> None:
    keys = [new_key() for _ in range(4)]

    def work(_: int) -> list[bool]:
        created = [c for key in keys for c in put(client, key)]
        with client.lease(NS, [(key, part) for key in keys for part in MANIFEST.parts], timeout=10.0) as lease:
            for p in lease.parts:
                assert read(p.fd, p.key, p.part) == payload(p.key, p.part)
        return created

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(6)))
    assert [sum(column) for column in zip(*results, strict=True)] == [1] * 16
    assert client.stats()["publishes"] == 16


def test_a_forked_child_starts_anew(client: Client) -> None:
    key = new_key()
    put(client, key)
    lease = client.lease(NS, [(key, FULL0)])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            lease.release()  # the child's descriptors; the claim stays the parent's
            with client.lease(NS, [(key, FULL0)], timeout=5.0) as own:
                good = read(own.parts[0].fd, key, FULL0) == payload(key, FULL0)
            if good and client.lookup(NS, [key], timeout=5.0) == [WHOLE]:
                code = 0
            client.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read(lease.parts[0].fd, key, FULL0) == payload(key, FULL0)
    assert look(client, [key]) == [WHOLE]
    lease.release()


def test_a_lookup_of_a_thousand_keys_keeps_its_deadline(client: Client) -> None:
    keys = [new_key() for _ in range(1000)]
    look(client, keys[:1])
    begun = time.perf_counter()
    assert client.lookup(NS, keys, timeout=1.0) == [0] * 1000
    assert time.perf_counter() - begun < 0.5


def test_on_a_network_filesystem_a_gap_is_looked_at_twice(folder: Path) -> None:
    """Folders behind the first gaps are listed before "absent" is believed, a few at a time and not again at once."""
    keys = [new_key() for _ in range(30)]
    with StoreClient(folder) as client:
        client.network = True
        put(client, keys[0])
        assert look(client, keys) == [WHOLE] + [0] * 29
        assert set(client._listed) == {(NS, key.hex()[:3]) for key in keys[1:9]}
        listed = dict(client._listed)
        put(client, keys[1])
        assert look(client, keys[:9]) == [WHOLE, WHOLE] + [0] * 7
        assert client._listed == listed
        assert client.lookup(NS, keys[20:], timeout=5.0) == [0] * 10
        assert len(client._listed) > len(listed)


def test_connect_wants_one_way_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        connect()
    with pytest.raises(ConfigError):
        connect(mount=tmp_path, store=tmp_path)


def test_stored_by_one_is_read_by_the_other(folder: Path, tmp_path: Path) -> None:
    with (
        connect(store=folder) as bare,
        catalog_of(folder) as catalog,
        serving(catalog, tmp_path / "mnt"),
        connect(mount=tmp_path / "mnt") as mounted,
        Store.open(folder) as store,
    ):
        key = new_key()
        put(mounted, key)
        assert look(bare, [key]) == [WHOLE]
        other = new_key()
        put(bare, other)
        assert store.masks(NS, [other]) == [WHOLE]
        with mounted.lease(NS, [(other, FULL0)]) as lease:  # not indexed yet, and open all the same
            assert read(lease.parts[0].fd, other, FULL0) == payload(other, FULL0)
        catalog.reconcile()
        assert look(mounted, [other]) == [WHOLE]
