"""A server that dies and takes its mount with it, on old kernels and with libfuse: the store is mounted anew, nobody
hangs, and what was leased stays readable."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvfs.client import connect
from kvfs.daemon.fuse import connection
from tests import samples
from tests.mounted import mounted, needs_mount, output, place, processes, run, until
from tests.t4_mount_restart import KEYS, PARTS, masks, store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["store"]

pytestmark = needs_mount

FOREGROUND = """
import sys
from pathlib import Path
from kvfs.config import Config
from kvfs.daemon import keeper
from kvfs.daemon.fuse import connection
from kvfs.daemon.fuse.abi import Init
store, point, transport = sys.argv[1:]
connection.WANTED &= ~(Init.HAS_RESEND | Init.PASSTHROUGH)  # as if this kernel did not offer them
keeper.mount(Path(store), Path(point), config=Config(), foreground=True, transport=transport)
"""
SERVERS = {"kernel": "worker", "libfuse": "fuse.libfuse"}


@pytest.fixture(params=SERVERS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def serving(store: Path, point: Path, transport: str) -> Iterator[subprocess.Popen[str]]:
    """A keeper in the foreground on an old kernel, which must end in order."""
    command = [sys.executable, "-c", FOREGROUND, str(store), str(point), transport]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: connection.mounted_at(point) is not None)
        with connect(mount=point) as client:
            until(lambda: masks(client) == [15])
        yield running
    finally:
        running.terminate()
        _, said = running.communicate(timeout=30)
    assert running.returncode == 0, said
    assert "mounted anew" in said
    assert connection.mounted_at(point) is None
    until(lambda: not processes(store))


def kill(store: Path, transport: str) -> int:
    """Kill who serves; its pid."""
    pid = processes(store)[SERVERS[transport]]
    os.kill(pid, signal.SIGKILL)
    return pid


def test_it_is_mounted_anew_and_leases_go_on(store: Path, mountpoint: Path, transport: str) -> None:
    content = [place(store, key, PARTS[0]).read_bytes() for key in KEYS]
    with serving(store, mountpoint, transport), connect(mount=mountpoint) as client:
        until(lambda: masks(client) == [15])
        for _ in range(3):
            lease = client.lease(samples.MANIFEST.ns, [(KEYS[0], PARTS[0])], timeout=5)
            pid = kill(store, transport)
            for _ in range(100):
                assert os.pread(lease.parts[0].fd, len(content[0]), 0) == content[0]
            until(lambda pid=pid: processes(store).get(SERVERS[transport], pid) != pid)
            until(lambda: run("cmp", *(place(root, KEYS[1], PARTS[0]) for root in (mountpoint, store))).returncode == 0)
            assert os.pread(lease.parts[0].fd, len(content[0]), 0) == content[0]
            until(lambda: masks(client) == [15])
            until(lambda: os.getxattr(place(mountpoint, KEYS[0], PARTS[0]), "user.kvfs.leases") == b"1")
            lease.release()


def test_those_who_wait_get_an_error(store: Path, mountpoint: Path, transport: str) -> None:
    with serving(store, mountpoint, transport):
        os.kill(processes(store)[SERVERS[transport]], signal.SIGSTOP)
        path = place(mountpoint, KEYS[0], PARTS[0])
        waiting = subprocess.Popen(["timeout", "-k", "5", "60", "cat", path], stderr=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.communicate(timeout=0.3)
        kill(store, transport)
        _, complaint = waiting.communicate(timeout=30)
        assert waiting.returncode == 1
        assert b"onnect" in complaint
        until(lambda: run("cp", path, "/dev/null").returncode == 0)


@pytest.mark.slow
def test_one_that_hangs_is_killed(store: Path, mountpoint: Path, transport: str) -> None:
    with serving(store, mountpoint, transport):
        pid = processes(store)[SERVERS[transport]]
        os.kill(pid, signal.SIGSTOP)
        until(lambda: processes(store).get(SERVERS[transport], pid) != pid)
        until(lambda: run("cp", place(mountpoint, KEYS[0], PARTS[0]), "/dev/null").returncode == 0)


def test_libfuse_ends_with_its_keeper(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, "libfuse"):
        os.kill(processes(store)["keeper"], signal.SIGKILL)
        until(lambda: connection.mounted_at(mountpoint) is None)
        until(lambda: not processes(store))
    with mounted(store, mountpoint, "libfuse"):
        assert output("ls", mountpoint)
