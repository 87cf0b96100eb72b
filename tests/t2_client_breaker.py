"""A daemon or a filesystem that is dead, hung or restarting costs a client its deadline once, then nothing."""

import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs.client import Client, MountClient, StoreClient, connect
from kvfs.client.lane import Lane
from kvfs.errors import ChunkNotFound, DaemonUnavailable, DeadlineExceeded, KvfsError, NotAStore, StoreBusy
from kvfs.identity import PartId
from kvfs.store import Store
from tests import stoppable
from tests.daemons import Daemon, put, read
from tests.samples import MANIFEST, new_key, new_store, payload
from tests.samples import put as put_directly

NS = MANIFEST.ns
WHOLE = MANIFEST.all_parts
FULL0 = PartId("full", 0)
SLACK = 0.25
"""Seconds that a busy machine may add to a deadline."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_store(tmp_path / "store").close()
    return tmp_path / "store"


@pytest.fixture
def daemon(folder: Path, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(folder, tmp_path / "mnt") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[MountClient]:
    with MountClient(daemon.mount) as found:
        yield found


def eventually(what: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until ``what()`` is true; a KvfsError is not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(KvfsError):
            if what():
                return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fails_within(client: Client, seconds: float, timeout: float = 0.05) -> KvfsError:
    """A lookup fails in at most ``seconds``; the error."""
    begun = time.perf_counter()
    with pytest.raises(KvfsError) as e:
        client.lookup(NS, [new_key()], timeout=timeout)
    assert time.perf_counter() - begun < seconds
    return e.value


def fails_at_once(client: Client) -> None:
    """Failing lookups take microseconds, as a rule: the machine may be busy."""
    key, times = [new_key()], []
    for _ in range(200):
        begun = time.perf_counter()
        with pytest.raises(DaemonUnavailable):
            client.lookup(NS, key)
        times.append(time.perf_counter() - begun)
    assert statistics.median(times) < 200e-6


def test_nothing_runs_before_the_first_call(daemon: Daemon) -> None:
    before = threading.active_count()
    with connect(mount=daemon.mount) as mounted, connect(store=daemon.store) as bare:
        assert threading.active_count() == before
        mounted.stats()
        bare.stats()
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_a_stopped_daemon_costs_one_deadline(daemon: Daemon, client: MountClient) -> None:
    key = new_key()
    put(client, key)
    client.lookup(NS, [key], timeout=5.0)
    daemon.signal(signal.SIGSTOP)
    assert isinstance(fails_within(client, 0.05 + SLACK), DeadlineExceeded)
    fails_at_once(client)
    time.sleep(1.5)  # the link has tried again, in vain
    fails_at_once(client)
    daemon.signal(signal.SIGCONT)
    eventually(lambda: client.lookup(NS, [key]) == [WHOLE])


def test_a_killed_daemon_is_noticed_and_its_successor_too(daemon: Daemon, client: MountClient) -> None:
    key = new_key()
    put(client, key)
    client.lookup(NS, [key], timeout=5.0)
    daemon.kill()
    fails_within(client, 0.05 + SLACK)
    fails_at_once(client)
    daemon.start(resumed=True)
    eventually(lambda: client.lookup(NS, [key]) == [WHOLE])


def test_live_leases_are_claimed_again_after_a_restart(daemon: Daemon, client: MountClient) -> None:
    kept, released = new_key(), new_key()
    put(client, kept)
    put(client, released)
    lease = client.lease(NS, [(kept, FULL0)])
    gone = client.lease(NS, [(released, FULL0)])
    assert client.stats()["leases"] == 2
    daemon.kill()
    gone.release()
    assert read(lease.parts[0].fd, kept, FULL0) == payload(kept, FULL0)  # files need no daemon
    daemon.start()
    eventually(lambda: client.stats()["leases"] == 1)
    with pytest.raises(StoreBusy, match="1 leases"):
        client.remove(NS, kept)
    assert client.remove(NS, released)
    lease.release()
    eventually(lambda: client.stats()["leases"] == 0)
    assert client.remove(NS, kept)


def test_nothing_is_removed_while_leases_may_come_back(daemon: Daemon, client: MountClient) -> None:
    key = new_key()
    put(client, key)
    daemon.kill()
    daemon.start(resumed=True)
    with MountClient(daemon.mount) as other:
        with pytest.raises(StoreBusy, match="before the restart"):
            other.remove(NS, key)
        eventually(lambda: other.remove(NS, key))


def test_a_reservation_ends_with_its_connection(daemon: Daemon, client: MountClient) -> None:
    reservation = client.reserve(NS, 100)
    daemon.kill()
    daemon.start()
    eventually(lambda: bool(client.stats()))
    with pytest.raises(DaemonUnavailable, match="earlier connection"):
        client.publish(NS, reservation, new_key(), FULL0)


def hold_until_killed(mount: Path, key: bytes, ready: "multiprocessing.connection.Connection") -> None:
    lease = MountClient(mount).lease(NS, [(key, FULL0)], timeout=10.0)
    reservation = MountClient(mount).reserve(NS, 100, timeout=10.0)
    ready.send((len(lease.parts), reservation.token))
    signal.pause()


def test_what_a_killed_client_held_is_free_at_once(daemon: Daemon, client: MountClient) -> None:
    key = new_key()
    put(client, key)
    context = multiprocessing.get_context("spawn")
    ready, theirs = context.Pipe()
    holder = context.Process(target=hold_until_killed, args=(daemon.mount, key, theirs))
    holder.start()
    theirs.close()
    assert ready.recv()[0] == 1
    ready.close()
    assert client.stats()["leases"] == 1
    temps = daemon.store / MANIFEST.ns_hex / "tmp"
    assert len(list(temps.iterdir())) == 1
    holder.kill()
    holder.join()
    holder.close()
    eventually(lambda: client.stats()["leases"] == 0 and not list(temps.iterdir()), seconds=2.0)


def test_a_daemon_that_comes_late_is_found(folder: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mnt"
    with MountClient(mount) as client:
        assert isinstance(fails_within(client, 1.0, timeout=1.0), DaemonUnavailable)
        fails_at_once(client)
        with Daemon(folder, mount):
            eventually(lambda: client.lookup(NS, [new_key()]) == [0])


def test_a_closed_client_says_so(daemon: Daemon) -> None:
    clients: list[Client] = [MountClient(daemon.mount), StoreClient(daemon.store)]
    for client in clients:
        client.stats()
        client.close()
        client.close()
        with pytest.raises(DaemonUnavailable, match="closed"):
            client.lookup(NS, [new_key()])


def test_no_store_is_an_error_of_its_own(tmp_path: Path) -> None:
    with StoreClient(tmp_path / "nowhere") as client, pytest.raises(NotAStore):
        client.lookup(NS, [], timeout=1.0)


def test_a_slow_writer_does_not_delay_a_reader(client: MountClient, daemon: Daemon) -> None:
    """Writes have a connection of their own: while one waits, lookups are answered."""
    client.lookup(NS, [new_key()], timeout=5.0)
    with client._writes._turn:  # as if a publish were under way
        assert client.lookup(NS, [new_key()], timeout=5.0) == [0]
        with pytest.raises(DeadlineExceeded):
            client.stats(timeout=0.05)
    client.stats()


# --- a filesystem that hangs ---


@pytest.fixture
def hanging(folder: Path, mountpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs /dev/fuse")
    process = stoppable.show(folder, mountpoint)
    yield process
    process.send_signal(signal.SIGCONT)
    subprocess.run(["umount", "-l", mountpoint], check=False, timeout=10)
    process.kill()
    process.wait()


def test_a_store_on_a_hanging_filesystem_costs_one_deadline(
    hanging: subprocess.Popen[bytes], folder: Path, mountpoint: Path
) -> None:
    key = new_key()
    with Store.open(folder) as store:
        put_directly(store, key)
    with StoreClient(mountpoint) as client:
        assert client.lookup(NS, [key], timeout=5.0) == [WHOLE]
        hanging.send_signal(signal.SIGSTOP)
        assert isinstance(fails_within(client, 0.05 + SLACK), DeadlineExceeded)
        fails_at_once(client)
        hanging.send_signal(signal.SIGCONT)
        eventually(lambda: client.lookup(NS, [key]) == [WHOLE])
        with client.lease(NS, [(key, FULL0)], timeout=5.0) as lease:
            assert read(lease.parts[0].fd, key, FULL0) == payload(key, FULL0)


def test_a_mount_whose_paths_hang_costs_one_deadline(hanging: subprocess.Popen[bytes], mountpoint: Path) -> None:
    hanging.send_signal(signal.SIGSTOP)
    with MountClient(mountpoint) as client:
        assert isinstance(fails_within(client, 0.05 + SLACK), DeadlineExceeded)
        fails_at_once(client)
        hanging.send_signal(signal.SIGCONT)


# --- the lane itself ---


def test_a_result_that_comes_too_late_is_undone() -> None:
    lane, gate, undone = Lane("a test"), threading.Event(), []
    with pytest.raises(DeadlineExceeded):
        lane.call("work", 0.05, lambda: gate.wait(10) and "late", undone.append)
    with pytest.raises(DaemonUnavailable, match="hangs"):
        lane.call("work", 1.0, lambda: None)
    gate.set()
    eventually(lambda: lane.call("work", 1.0, lambda: True))
    assert undone == ["late"]
    assert lane.close()


def test_a_call_that_waits_behind_a_stuck_one_is_never_begun() -> None:
    lane, gate, begun = Lane("a test"), threading.Event(), []
    first = threading.Thread(target=lambda: lane.call("first", 10.0, lambda: gate.wait(10)))
    first.start()
    with pytest.raises(DeadlineExceeded):
        lane.call("second", 0.1, lambda: begun.append(1))
    gate.set()
    first.join()
    lane.call("third", 5.0, lambda: None)
    assert begun == []
    assert lane.close()


def test_errors_pass_through_a_lane() -> None:
    def fail(error: Exception) -> None:
        raise error

    lane = Lane("a test")
    with pytest.raises(ChunkNotFound):
        lane.call("work", 5.0, lambda: fail(ChunkNotFound("x")))
    with pytest.raises(DaemonUnavailable, match="Input/output error"):
        lane.call("work", 5.0, lambda: fail(OSError(5, "Input/output error")))
    with pytest.raises(ZeroDivisionError):
        lane.call("work", 5.0, lambda: 1 / 0)
    assert lane.close()
