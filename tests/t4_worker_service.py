"""A worker that the keeper did not start: it comes to a socket, is let in if it is who it should be, and may die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs.config import Config
from kvfs.daemon import keeper, rendezvous
from kvfs.daemon.fuse import connection
from kvfs.daemon.rendezvous import Door, meet
from kvfs.errors import ConfigError, MountError
from tests.mounted import check_log, mounted, needs_mount, output, place, processes, run, until
from tests.t4_mount_restart import KEYS, PARTS, reading, store

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["store"]

pytestmark = needs_mount

PROGRAM = Path(sys.executable).with_name("kvfs")
NOBODY = 65534
IMPATIENT = """
import sys
from pathlib import Path
from kvfs.config import Config
from kvfs.daemon import keeper, supervisor
supervisor.START_LIMIT = 0.2
store, point, door = map(Path, sys.argv[1:])
keeper.mount(store, point, config=Config(worker_user="0", worker_socket=door), foreground=True)
"""
KNOCK = """
import os, socket, sys
os.setresuid(65534, 65534, 65534)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect(sys.argv[1])
    print(sock.recv(1))
"""


@pytest.fixture
def door(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents):
        if folder not in {Path("/tmp"), Path("/")}:
            folder.chmod(folder.stat().st_mode | 0o011)
    return tmp_path / "door"


@contextlib.contextmanager
def worker(door: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker as a service manager starts it, here of root without a right."""
    running = subprocess.Popen([PROGRAM, "worker", str(door)], stderr=subprocess.PIPE, text=True, cwd="/")
    try:
        yield running
    finally:
        running.kill()
        running.communicate(timeout=20)


def ended_in_order(worker: subprocess.Popen[str]) -> None:
    _, said = worker.communicate(timeout=20)
    assert worker.returncode == 0, said
    assert not re.search(r"WARNING|ERROR|Traceback", said), said


def served(store: Path, point: Path, door: Path, logs: str = "") -> contextlib.AbstractContextManager[Path]:
    return mounted(store, point, logs=logs, worker_user="0", worker_socket=door)


def fresh(point: Path, number: int) -> None:
    """Ask what only a living worker can answer."""
    assert output("stat", "-c", "%F", place(point, KEYS[number], PARTS[0])) == "regular file\n"


def test_it_serves_without_a_right_and_stops_when_told(store: Path, mountpoint: Path, door: Path) -> None:
    with worker(door) as one:  # it waits for the keeper
        with served(store, mountpoint, door):
            assert set(processes(store)) == {"keeper"}
            for line in Path(f"/proc/{one.pid}/status").read_text().splitlines():
                if line.startswith(("CapPrm", "CapEff")):
                    assert line.split()[1] == "0" * 16
            path = place(mountpoint, KEYS[0], PARTS[0])
            with path.open("rb") as file:
                os.kill(one.pid, signal.SIGSTOP)
                content = file.read()  # passed through: nobody else is there to read
                os.kill(one.pid, signal.SIGCONT)
            assert content == place(store, KEYS[0], PARTS[0]).read_bytes()
        ended_in_order(one)
    assert not door.exists()


def test_the_next_takes_over_from_one_that_is_killed(store: Path, mountpoint: Path, door: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(worker(door))
        stack.enter_context(served(store, mountpoint, door, logs="died"))
        two, three = (stack.enter_context(worker(door)) for _ in range(2))  # wait for their turn
        with reading(mountpoint, tmp_path / "stop"):
            one.kill()
            fresh(mountpoint, 5)
            until(lambda: len(holders(two, three)) == 1)
            (holder,) = holders(two, three)
            holder.kill()
            fresh(mountpoint, 6)


def holders(*workers: subprocess.Popen[str]) -> list[subprocess.Popen[str]]:
    """Those that serve, and hold the connection to the kernel."""
    return [one for one in workers if any("fuse" in os.readlink(fd) for fd in Path(f"/proc/{one.pid}/fd").iterdir())]


@pytest.mark.slow
def test_one_that_hangs_is_killed(store: Path, mountpoint: Path, door: Path) -> None:
    with worker(door) as one, served(store, mountpoint, door, logs="died|silent"):
        os.kill(one.pid, signal.SIGSTOP)
        assert one.wait(20) == -signal.SIGKILL
        with worker(door):
            fresh(mountpoint, 5)


def test_it_leaves_in_order_when_told_to_end(store: Path, mountpoint: Path, door: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as workers:
        one = workers.enter_context(worker(door))
        with served(store, mountpoint, door), reading(mountpoint, tmp_path / "stop"):
            one.terminate()
            ended_in_order(one)
            two = workers.enter_context(worker(door))
            fresh(mountpoint, 5)
            keeper_pid = processes(store)["keeper"]
            until(lambda: two.poll() is not None or os.kill(keeper_pid, signal.SIGHUP))  # heard once it serves
            ended_in_order(two)
            workers.enter_context(worker(door))
            fresh(mountpoint, 6)


def test_strangers_are_sent_away(store: Path, mountpoint: Path, door: Path) -> None:
    with worker(door) as one, served(store, mountpoint, door, logs="sent away|died"):
        one.kill()
        assert output(sys.executable, "-c", KNOCK, door) == "b''\n"
        with worker(door):
            fresh(mountpoint, 5)


def test_a_keeper_gives_up_when_nobody_comes(store: Path, mountpoint: Path, door: Path) -> None:
    done = run(sys.executable, "-c", IMPATIENT, store, mountpoint, door)
    assert f"no worker has come to {door}" in done.stderr
    assert connection.mounted_at(mountpoint) is None


def test_doors_that_cannot_be(store: Path, mountpoint: Path, door: Path) -> None:
    with pytest.raises(ConfigError, match="worker_user"):
        keeper.mount(store, mountpoint, config=Config(worker_socket=door))
    door.write_text("theirs")
    with pytest.raises(MountError, match="worker_socket"):
        keeper.mount(store, mountpoint, config=Config(worker_socket=door, worker_user="0"))
    assert door.read_text() == "theirs"
    with pytest.raises(MountError, match="Not a directory"):
        meet(door / "below")
    until(lambda: not processes(store))
    check_log(store)


@pytest.mark.parametrize("option", [rendezvous.SO_PEERPIDFD, 9999], ids=["this kernel", "an old one"])
def test_a_dead_visitor_is_not_mistaken_for_another_process(
    door: Path, option: int, monkeypatch: pytest.MonkeyPatch, logs: object
) -> None:
    monkeypatch.setattr(rendezvous, "SO_PEERPIDFD", option)
    with contextlib.closing(Door(door, os.geteuid())) as listening:
        assert listening.admit() is None
        visit = f"import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect({str(door)!r})"
        subprocess.run([sys.executable, "-c", visit], check=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alive:
            alive.connect(os.fspath(door))
            logs.claim("sent away")  # type: ignore[attr-defined]
            channel, pidfd = listening.admit() or pytest.fail("nobody was let in")
            channel.close()
            os.close(pidfd)
