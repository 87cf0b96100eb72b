"""kvfs on a real NFSv4.2 volume with two client hosts; ``make nfs`` runs it, as root.

The first half shows what NFS does, which kvfs' rules come from; should a kernel do otherwise, it fails here and not in
somebody's cluster.  The second half is kvfs on it.
"""

from __future__ import annotations

import json
import os
import time
from concurrent import futures
from typing import TYPE_CHECKING, Any

import pytest

from tests.beds import nfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.skipif(nfs.missing() is not None, reason=f"no test bed here: {nfs.missing()} is missing"),
    pytest.mark.timeout(300),
]
DEFAULT, ADVISED = "hard", "hard,softreval,lookupcache=pos"
IMPORTS = """
import errno, json, mmap, os, signal, sys, threading, time
from pathlib import Path
os.chdir("/mnt/nfs")
def failing(call):
    try:
        call()
    except OSError as e:
        return errno.errorcode[e.errno]
def until(true, limit=40):
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < limit, "not in time"
        time.sleep(0.02)
    return time.monotonic() - begun
"""
KVFS = """
from kvfs import chunk
from kvfs.client import StoreClient
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.neighbours import Neighbours
from kvfs.daemon.watch import Watcher
from kvfs.errors import ChunkNotFound, KvfsError
from kvfs.kinds import Amount
from kvfs.metrics import Metrics
from kvfs.store import Store
from tests import samples
from tests.samples import MANIFEST, payload
from tests.small import NO_FLOOR
NS, PARTS = MANIFEST.ns, MANIFEST.parts
"""
DAEMON = """
class Host:
    def __init__(self, **settings):
        config = Config(**{**NO_FLOOR, **settings})
        self.store = Store.open("/mnt/nfs/store")
        assert self.store.trash is not None
        self.catalog = Catalog(self.store, config, Metrics())
        self.watcher = Watcher(self.catalog)
        self.neighbours = Neighbours(self.catalog, self.watcher)
        self.member = self.neighbours.member
        self.watcher.start()
        self.neighbours.start()
        self.catalog.evictor.start()
    def put(self, key):
        for part in PARTS:
            temp = self.catalog.reserve(NS, 200_000)
            meta = chunk.PartMeta(NS, key, bytes(32), 256, 0, part)
            chunk.write_part(temp.fd, MANIFEST, meta, payload(key, part))
            os.close(temp.fd)
            self.catalog.publish_file(NS, temp.name, key, part)
    def close(self):
        self.watcher.close()
        self.catalog.close()
        self.neighbours.close()
        self.store.close()
host = Host()
"""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nfs.Bed]:
    with nfs.bed(tmp_path_factory.mktemp("nfs"), DEFAULT) as made:
        for guest in made.guests:
            guest.call(IMPORTS)
        yield made


@pytest.fixture
def nodes(bed: nfs.Bed) -> tuple[nfs.Client, nfs.Client]:
    a, b = bed.guests
    return a, b


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that run at the same time."""
    with futures.ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


# --- what NFS does ---


def test_a_name_once_absent_stays_absent_until_its_folder_is_listed(nodes: tuple[nfs.Client, nfs.Client]) -> None:
    a, b = nodes
    a.call("os.makedirs('d'); Path('d/seed').touch()")
    assert b.call("os.path.exists('d/new')") is False
    a.call("Path('d/new.tmp').write_bytes(b'v1' * 4096); os.link('d/new.tmp', 'd/new'); os.unlink('d/new.tmp')")
    assert b.call("time.sleep(2); os.path.exists('d/new')") is False
    assert b.call("os.listdir('d'); os.path.exists('d/new')") is True


def test_a_rename_over_a_name_shows_once_the_folder_is_listed_and_ends_open_files(
    nodes: tuple[nfs.Client, nfs.Client],
) -> None:
    """Opened by name without that, it may be the old file as long as anybody has it open."""
    a, b = nodes
    a.call("Path('over').write_bytes(b'v1' * 4096)")
    assert b.call("fd = os.open('over', os.O_RDONLY); os.pread(fd, 2, 0).decode()") == "v1"
    a.call("Path('over.tmp').write_bytes(b'V2' * 4096); os.rename('over.tmp', 'over')")
    assert b.call("os.listdir('.'); Path('over').read_bytes()[:2].decode()") == "V2"
    b.call("os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)")
    print("an open file that was renamed over:", b.call("failing(lambda: os.pread(fd, 2, 4096))"))  # noqa: T201


def test_a_rename_to_another_folder_keeps_open_files(nodes: tuple[nfs.Client, nfs.Client]) -> None:
    a, b = nodes
    a.call("os.makedirs('t'); Path('kept').write_bytes(b'kept' * 4096)")
    b.call("fd = os.open('kept', os.O_RDONLY)")
    a.call("os.rename('kept', 't/kept.1')")
    assert b.call("os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); os.pread(fd, 4, 8192).decode()") == "kept"
    assert b.call("os.fstat(fd).st_nlink") == 1


def test_an_unlink_may_end_open_files_elsewhere(nodes: tuple[nfs.Client, nfs.Client]) -> None:
    """The kernel's server forgets the file; this one does as soon as its own cache of open files is full."""
    a, b = nodes
    a.call("Path('gone').write_bytes(b'x' * 65536)")
    b.call("fd = os.open('gone', os.O_RDONLY)")
    a.call("os.unlink('gone')")
    code = "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); failing(lambda: os.pread(fd, 4, 8192))"
    assert b.call(code) in {"ESTALE", None}


def test_a_truncation_elsewhere_kills_who_reads_a_map(nodes: tuple[nfs.Client, nfs.Client]) -> None:
    a, b = nodes
    b.call("Path('cut').write_bytes(b'A' * 65536); fd = os.open('cut', os.O_RDONLY)")
    b.call("m = mmap.mmap(fd, 0, prot=mmap.PROT_READ); m[0]")
    a.call("os.truncate('cut', 0)")
    code = """
child = os.fork()
if not child:
    for _ in range(400):
        os.fstat(os.open('cut', os.O_RDONLY)); m[40000]; time.sleep(0.02)
    os._exit(0)
os.WTERMSIG(os.waitpid(child, 0)[1])
"""
    assert b.call(code) == 7, "SIGBUS; pread of the same file gives the end of it"
    assert b.call("os.pread(fd, 10, 40000).decode()") == ""


def test_an_open_file_that_is_removed_gets_a_silly_name(nodes: tuple[nfs.Client, nfs.Client]) -> None:
    a, _ = nodes
    a.call("os.makedirs('s'); fd = os.open('s/x', os.O_CREAT | os.O_RDWR); os.write(fd, b'x'); os.unlink('s/x')")
    assert a.call("[n[:4] for n in os.listdir('s')]") == [".nfs"]
    assert a.call("failing(lambda: os.rmdir('s'))") in {"ENOTEMPTY", "EBUSY", "EEXIST"}
    assert a.call("os.close(fd); os.rmdir('s')") is None


def test_what_is_not_there_on_nfs(nodes: tuple[nfs.Client, nfs.Client]) -> None:
    a, _ = nodes
    a.call("Path('p').touch(); Path('q').touch()")
    assert a.call("failing(lambda: os.link('p', 'q'))") == "EEXIST"
    assert a.call("failing(lambda: os.open('.', os.O_TMPFILE | os.O_RDWR))") in {"ENOTSUP", "EOPNOTSUPP", "EISDIR"}
    assert a.call("failing(lambda: os.setxattr('p', 'user.kvfs', b'1'))") in {"ENOTSUP", "EOPNOTSUPP", "EPERM"}
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.renameat2(-100, b"p", -100, b"fresh", 1), errno.errorcode.get(ctypes.get_errno())
"""
    assert a.call(code) == [-1, "EINVAL"]


def test_a_lock_holds_for_both(nodes: tuple[nfs.Client, nfs.Client]) -> None:
    a, b = nodes
    code = "import fcntl; lock = os.open('lock', os.O_CREAT | os.O_RDWR); "
    a.call(code + "fcntl.flock(lock, fcntl.LOCK_EX)")
    taken = "failing(lambda: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB))"
    assert b.call(code + taken) == "EAGAIN"
    a.call("os.close(lock)")
    assert b.call(f"until(lambda: {taken} is None); os.close(lock)") is None


# --- kvfs on it ---


@pytest.fixture(scope="module")
def stored(bed: nfs.Bed) -> nfs.Bed:
    """The bed with an empty store on the volume, and kvfs imported on both nodes."""
    a, b = bed.guests
    together(lambda: a.call(KVFS, 120), lambda: b.call(KVFS, 120))
    a.call("samples.new_store(Path('/mnt/nfs/store')).close()")
    return bed


def test_a_thousand_races_for_the_same_keys_leave_one_file_each(stored: nfs.Bed) -> None:
    code = """
from hashlib import sha256
from tests.small import SMALL
with Store.open("/mnt/nfs/store") as store:
    store.register(SMALL, {"name": "small"})
    created = []
    for n in range(1000):
        key = sha256(b"race %d" % n).digest()
        temp = store.reserve(SMALL.ns)
        meta = chunk.PartMeta(SMALL.ns, key, bytes(32), 256, 0, SMALL.parts[0])
        chunk.write_part(temp.fd, SMALL, meta, payload(key, SMALL.parts[0], SMALL))
        os.close(temp.fd)
        created.append(store.publish(SMALL.ns, temp.name, key, SMALL.parts[0]))
created
"""
    begun = time.monotonic()
    first, second = together(*(lambda guest=guest: guest.call(code, 240) for guest in stored.guests))
    print(f"1000 races: {time.monotonic() - begun:.1f} s, won {sum(first)} : {sum(second)}")  # noqa: T201
    assert [a + b for a, b in zip(first, second, strict=True)] == [1] * 1000
    check = """
from kvfs.verify import Verifier
with Store.open("/mnt/nfs/store") as store:
    verifier, found = Verifier(store), list(store.scan(SMALL.ns))
    for each in found:
        fd = store.open_part(SMALL.ns, each.key, each.part)
        verifier.check(fd, SMALL.ns, each.key, each.part)
        os.close(fd)
    temps = os.listdir(store.path / SMALL.ns_hex / "tmp")
len(found), temps
"""
    for guest in stored.guests:
        assert guest.call(check, 120) == [1000, []]


def test_an_engine_finds_what_another_host_has_stored_after_a_miss(stored: nfs.Bed) -> None:
    a, b = stored.guests
    key = os.urandom(32).hex()
    b.call(f"client = StoreClient('/mnt/nfs/store'); key = bytes.fromhex('{key}')")
    assert b.call("client.lookup(NS, [key], timeout=5)") == [0]
    a.call(f"key = bytes.fromhex('{key}'); store = Store.open('/mnt/nfs/store'); samples.put(store, key)")
    waited = b.call("until(lambda: client.lookup(NS, [key], timeout=5) == [MANIFEST.all_parts])")
    print(f"found {waited:.2f} s after it was stored, although it had been absent")  # noqa: T201
    assert waited < 5
    b.call("client.close()")
    a.call("store.close()")


def test_daemons_of_two_hosts(stored: nfs.Bed) -> None:
    a, b = stored.guests
    together(lambda: a.call(DAEMON, 120), lambda: b.call(DAEMON, 120))
    offices = together(
        *(
            lambda guest=guest: guest.call("until(lambda: host.member.office.holder); bool(host.member.epoch)")
            for guest in (a, b)
        )
    )
    assert sorted(offices) == [False, True]
    janitor, other = (a, b) if offices[0] else (b, a)
    # Published on one, found on the other: by what is told, within its interval.
    waits = []
    for _ in range(10):
        key = os.urandom(32).hex()
        other.call(f"host.catalog.lookup(NS, [bytes.fromhex('{key}')])")
        janitor.call(f"host.put(bytes.fromhex('{key}'))")
        found = f"host.catalog.lookup(NS, [bytes.fromhex('{key}')]) == [MANIFEST.all_parts]"
        waits.append(other.call(f"until(lambda: {found})"))
    print(f"found on the other host after {min(waits):.2f} to {max(waits):.2f} s")  # noqa: T201
    assert max(waits) < 6
    # Evicted on one while the other reads: what it holds is whole.
    other.call(f"key = bytes.fromhex('{key}'); opened = host.catalog.lease('r', 1, NS, [(key, p) for p in PARTS])")
    janitor.call("until(lambda: host.member.board.held())")
    freed = janitor.call("list(host.catalog.evict(None, 1 << 40))")
    assert freed[0] >= 9
    code = """
for o, part in zip(opened, PARTS):
    with chunk.open_part(os.dup(o.fd), MANIFEST, key, part) as file:
        assert bytes(file.verify()) == payload(key, part)
host.catalog.lookup(NS, [key])
"""
    assert other.call(code) == [15]
    # Leased so lately that the janitor did not know: the name goes, the bytes stay.
    fresh = os.urandom(32).hex()
    janitor.call(f"key = bytes.fromhex('{fresh}'); host.put(key)")
    other.call(f"fresh = bytes.fromhex('{fresh}'); until(lambda: host.catalog.lookup(NS, [fresh]) == [15])")
    janitor.call("host.member._stop.set(); host.member._thread.join()")  # deaf
    other.call("late = host.catalog.lease('r', 2, NS, [(fresh, p) for p in PARTS])")
    assert janitor.call("host.catalog.evict(None, 1 << 40).chunks") == 1
    code = """
for o, part in zip(late, PARTS):
    os.posix_fadvise(o.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with chunk.open_part(os.dup(o.fd), MANIFEST, fresh, part) as file:
        assert bytes(file.verify()) == payload(fresh, part)
for o in [*opened, *late]:
    os.close(o.fd)
host.catalog.leases.drop('r')
"""
    other.call(code)
    # The janitor is dead (it says nothing any more): the other takes over within 30 s, and frees the trash.
    waited = other.call("until(lambda: host.member.epoch)")
    print(f"the office was taken over after {waited:.1f} s")  # noqa: T201
    assert waited <= 30
    assert janitor.call("host.member.epoch") == 0
    assert other.call("host.member.tick(); host.member.trash > 0")
    late = "failing(lambda: host.store.remove(NS, left, PARTS, epoch=1))"
    other.call(f"left = {key!r}")
    janitor.call(f"left = bytes.fromhex('{key}')")
    assert janitor.call(late) == "EBUSY", "a removal of the old epoch"
    assert other.call("until(lambda: not list(host.store.trash.entries()), 60); host.member.trash") == 0
    together(lambda: a.call("host.close()", 120), lambda: b.call("host.close()", 120))


def test_the_server_dies_and_comes_back(stored: nfs.Bed) -> None:
    """Calls return within their deadlines all the while; what was acknowledged is there and whole afterwards."""
    a, b = stored.guests
    code = """
from hashlib import sha256
client, slow, errors, acknowledged, stop = StoreClient("/mnt/nfs/store"), [], [], [], threading.Event()
def work():
    n = 0
    while not stop.is_set():
        n += 1
        key = sha256(b"%s %d" % (os.uname().nodename.encode(), n)).digest()
        begun = time.monotonic()
        try:
            client.lookup(NS, [key], timeout=0.05)
        except KvfsError as e:
            errors.append(type(e).__name__)
        slow.append(time.monotonic() - begun)
        try:
            with client.reserve(NS, 200_000, timeout=0.5) as reservation:
                meta = chunk.PartMeta(NS, key, bytes(32), 256, 0, PARTS[0])
                chunk.write_part(reservation.fd, MANIFEST, meta, payload(key, PARTS[0]))
                if client.publish(NS, reservation, key, PARTS[0], timeout=2):
                    acknowledged.append(key)
        except (KvfsError, OSError) as e:
            errors.append(type(e).__name__)
worker = threading.Thread(target=work); worker.start()
"""
    for guest in (a, b):
        guest.call(code)
    time.sleep(3)
    stored.kill_server()
    time.sleep(8)
    stored.start_server()
    time.sleep(12)
    check = """
stop.set(); worker.join(60)
counts = {"lookups": len(slow), "slowest": max(slow), "stored": len(acknowledged), "errors": sorted(set(errors))}
client.close()
"""
    for guest in (a, b):
        counts = guest.call(f"{check}counts", 120)
        print(f"node{guest.node}: {json.dumps(counts)}")  # noqa: T201
        assert counts["slowest"] < 1.0, "a lookup has 50 ms; the guest has one slow core"
        assert counts["stored"] > 10
    whole = """
with Store.open("/mnt/nfs/store") as store:
    for key in acknowledged:
        fd = store.open_part(NS, key, PARTS[0])
        with chunk.open_part(fd, MANIFEST, key, PARTS[0]) as file:
            assert bytes(file.verify()) == payload(key, PARTS[0])
len(acknowledged)
"""
    for guest in (a, b):
        assert guest.call(whole, 120) > 10


def test_a_clock_that_is_wrong_changes_nothing(stored: nfs.Bed) -> None:
    """The guest's clock is 5 min ahead: temp files of others are not taken for old, nor is the janitor for dead."""
    a, b = stored.guests
    a.call("store = Store.open('/mnt/nfs/store'); temp = store.reserve(NS)")
    b.call("time.clock_settime(time.CLOCK_REALTIME, time.time() + 300)")
    assert b.call("store = Store.open('/mnt/nfs/store'); reaped = store.reap_temps(NS); store.close(); reaped") == 0
    a.call("os.close(temp.fd); store.discard(NS, temp.name); store.close()")


def test_fsck_finds_nothing_afterwards(stored: nfs.Bed) -> None:
    code = """
from kvfs.fsck import Fsck
with Fsck(Path("/mnt/nfs/store"), dry_run=True) as check:
    found = [list(map(str, each)) for each in check.run() if each.is_damage]
found
"""
    assert stored.guests[0].call(code, 120) == []
