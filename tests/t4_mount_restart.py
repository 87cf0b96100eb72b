"""The worker dies or hangs: readers of the mount, clients of its socket and maps of its files go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, BinaryIO

import pytest

from kvfs.client import connect
from kvfs.daemon.fuse import connection
from kvfs.daemon.supervisor import PING_LIMIT, TICK
from tests import samples
from tests.mounted import check_log, mounted, needs_mount, output, place, processes, run, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_mount

KEYS = [bytes([i]) * 32 for i in range(1, 9)]
PARTS = samples.MANIFEST.parts
NS = samples.MANIFEST.ns_hex

READER = """
import mmap, os, sys
names = sys.argv[1:]
content = {name: open(name, "rb").read() for name in names}
held = os.open(names[0], os.O_RDONLY)
mapped = mmap.mmap(held, 0, prot=mmap.PROT_READ)
print("ready", flush=True)
rounds = 0
while not os.path.exists(os.environ["STOP"]):
    assert mapped[:] == content[names[0]]
    assert os.pread(held, 100, 5000) == content[names[0]][5000:5100]
    for name in names:
        assert os.stat(name).st_size == len(content[name])
        with open(name, "rb") as file:
            assert file.read() == content[name]
        assert os.path.basename(name) in os.listdir(os.path.dirname(name))
    rounds += 1
print("rounds", rounds)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with samples.new_store(tmp_path / "kv") as store:
        for key in KEYS:
            samples.put(store, key)
    return tmp_path / "kv"


@contextlib.contextmanager
def reading(mount: Path, stop: Path, readers: int = 2) -> Iterator[None]:
    """Processes that read and map without pause; each must have seen no error and the right bytes only."""
    names = [str(place(mount, key, part)) for key in KEYS[:2] for part in PARTS]
    running = [
        subprocess.Popen(
            ["timeout", "-k", "5", "60", sys.executable, "-c", READER, *names],
            env={**os.environ, "STOP": str(stop)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(readers)
    ]
    for reader in running:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        stop.touch()
        results = [(reader.communicate(timeout=60), reader.returncode) for reader in running]
    for (said, complained), code in results:
        assert (code, complained) == (0, "")
        assert int(said.split()[1]) > 0


def next_worker(store: Path, old: int) -> None:
    """Wait until another worker serves the store."""
    until(lambda: processes(store).get("worker", old) != old)


def test_killed_again_and_again_under_readers(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    with mounted(store, mountpoint, logs="died"), reading(mountpoint, tmp_path / "stop"):
        for _ in range(3):
            worker = processes(store)["worker"]
            os.kill(worker, signal.SIGKILL)
            # This waits for the next worker: nothing of it is in the kernel's caches.
            assert output("stat", "-c", "%F", place(mountpoint, KEYS[7], PARTS[0])) == "regular file\n"
            next_worker(store, worker)


def test_a_request_that_the_dead_worker_had_taken_is_answered(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, logs="died"):
        worker = processes(store)["worker"]
        os.kill(worker, signal.SIGSTOP)
        waiting = subprocess.Popen(
            ["timeout", "-k", "5", "30", "cat", place(mountpoint, KEYS[0], PARTS[0])], stdout=subprocess.PIPE
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.communicate(timeout=0.3)
        os.kill(worker, signal.SIGKILL)
        content, _ = waiting.communicate(timeout=30)
        assert content == place(store, KEYS[0], PARTS[0]).read_bytes()


@pytest.mark.slow
def test_a_stopped_worker_is_replaced(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    with mounted(store, mountpoint, logs="died|silent"), reading(mountpoint, tmp_path / "stop", readers=1):
        worker = processes(store)["worker"]
        os.kill(worker, signal.SIGSTOP)
        assert output("ls", mountpoint / NS / KEYS[7].hex()[:3])
        assert processes(store)["worker"] != worker


@pytest.mark.slow
def test_a_worker_that_was_paused_with_its_keeper_is_left_alone(store: Path, mountpoint: Path) -> None:
    """A guest that is suspended and goes on, a control group that is frozen."""
    with mounted(store, mountpoint):
        before = processes(store)
        for pid in before.values():
            os.kill(pid, signal.SIGSTOP)
        time.sleep(PING_LIMIT + 1)
        os.kill(before["keeper"], signal.SIGCONT)
        time.sleep(0.2)  # it looks before the worker can say anything
        os.kill(before["worker"], signal.SIGCONT)
        time.sleep(2 * TICK)
        assert processes(store) == before
        assert place(mountpoint, KEYS[0], PARTS[0]).exists()


def test_opens_of_before_and_after_share_their_backing_file(store: Path, mountpoint: Path) -> None:
    path, other = place(mountpoint, KEYS[0], PARTS[0]), place(mountpoint, KEYS[1], PARTS[0])
    content = place(store, KEYS[0], PARTS[0]).read_bytes()
    with mounted_and_killed(store, mountpoint, path, other) as held:
        assert held.read() == content
        assert path.read_bytes() == content  # a second open while the first lasts
        assert other.read_bytes() == place(store, KEYS[1], PARTS[0]).read_bytes()
        until(lambda: run("rm", path).returncode == 0)  # not before leases may have been claimed again
        held.seek(0)
        assert held.read() == content
        assert os.fstat(held.fileno()).st_size == len(content)
        assert not path.exists()


@contextlib.contextmanager
def mounted_and_killed(store: Path, point: Path, *paths: Path) -> Iterator[BinaryIO]:
    """A mount whose worker is the second one; ``paths[0]`` has been open since the first."""
    with mounted(store, point, logs="died"):
        for path in paths:
            path.read_bytes()
        with paths[0].open("rb") as held:
            worker = processes(store)["worker"]
            os.kill(worker, signal.SIGKILL)
            next_worker(store, worker)
            yield held


def test_files_that_go_while_no_worker_is_there_are_gone(store: Path, mountpoint: Path) -> None:
    path = place(mountpoint, KEYS[0], PARTS[0])
    with mounted(store, mountpoint, logs="died"):
        path.read_bytes()
        worker = processes(store)["worker"]
        os.kill(worker, signal.SIGSTOP)
        place(store, KEYS[0], PARTS[0]).unlink()
        os.kill(worker, signal.SIGKILL)
        next_worker(store, worker)
        until(lambda: run("cp", path, "/dev/null").returncode)
        assert path.name not in os.listdir(path.parent)


def test_clients_of_the_socket_go_on(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, logs="died"), connect(mount=mountpoint) as client:
        until(lambda: masks(client) == [15])
        lease = client.lease(samples.MANIFEST.ns, [(KEYS[0], PARTS[0])], timeout=5)
        worker = processes(store)["worker"]
        os.kill(worker, signal.SIGKILL)
        next_worker(store, worker)
        until(lambda: masks(client) == [15])
        until(lambda: os.getxattr(place(mountpoint, KEYS[0], PARTS[0]), "user.kvfs.leases") == b"1")
        assert os.pread(lease.parts[0].fd, 100, 0) == place(store, KEYS[0], PARTS[0]).read_bytes()[:100]
        lease.release()


def masks(client: object) -> list[int]:
    """What a client sees of the first chunk; nothing while its daemon is away."""
    from kvfs.errors import KvfsError

    try:
        return client.lookup(samples.MANIFEST.ns, KEYS[:1], timeout=1.0)  # type: ignore[attr-defined,no-any-return]
    except KvfsError:
        return []


@pytest.mark.slow
def test_workers_that_cannot_live_end_the_daemon(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, logs="died|ends|cannot|kvfs-store"):
        (store / "kvfs-store.json").rename(store / "away")
        os.kill(processes(store)["worker"], signal.SIGKILL)
        until(lambda: connection.mounted_at(mountpoint) is None, limit=60)
        (store / "away").rename(store / "kvfs-store.json")
        until(lambda: not processes(store))


def test_a_keeper_that_is_killed_takes_the_mount_with_it(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, logs="keeper is gone"):
        os.kill(processes(store)["keeper"], signal.SIGKILL)
        until(lambda: connection.mounted_at(mountpoint) is None)
        until(lambda: not processes(store))
    with mounted(store, mountpoint, logs="keeper is gone"):
        assert place(mountpoint, KEYS[0], PARTS[0]).read_bytes()


def test_killed_altogether_it_starts_again(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        for pid in processes(store).values():
            os.kill(pid, signal.SIGSTOP)
        for pid in processes(store).values():
            os.kill(pid, signal.SIGKILL)
        until(lambda: not processes(store))
        until(lambda: "not connected" in run("ls", mountpoint).stderr)  # at first perhaps: aborted
        assert connection.mounted_at(mountpoint) is not None  # stale
        with mounted(store, mountpoint):
            assert place(mountpoint, KEYS[0], PARTS[0]).read_bytes()
    check_log(store)
