"""A daemon starts, says so, refuses what it cannot do, and ends without a trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs.config import Config
from kvfs.daemon import keeper
from kvfs.daemon.fuse import connection, libfuse
from kvfs.daemon.notify import notify
from kvfs.errors import MountError, NotAStore, StoreBusy
from tests import samples
from tests.mounted import mounted, needs_mount, output, place, processes, run, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_mount

KEY = bytes([3]) * 32
PART = samples.MANIFEST.parts[0]
FOREGROUND = """
import sys
from pathlib import Path
from kvfs.config import Config
from kvfs.daemon import keeper
keeper.mount(Path(sys.argv[1]), Path(sys.argv[2]), config=Config(), foreground=True, transport=sys.argv[3])
"""


@pytest.fixture(params=["kernel", "libfuse"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with samples.new_store(tmp_path / "kv") as store:
        samples.put(store, KEY)
    return tmp_path / "kv"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def foreground(store: Path, point: Path, transport: str = "kernel") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FOREGROUND, str(store), str(point), transport]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(store: Path, mountpoint: Path, transport: str, number: signal.Signals) -> None:
    with mounted(store, mountpoint, transport):
        os.kill(processes(store)["keeper"], number)
        until(lambda: not processes(store))
        assert connection.mounted_at(mountpoint) is None
    assert os.listdir(mountpoint) == []


def test_an_ordinary_umount_ends_the_daemon(store: Path, mountpoint: Path, transport: str) -> None:
    with mounted(store, mountpoint, transport):
        output("umount", mountpoint)
        until(lambda: not processes(store))


def test_umount_returns_when_the_daemon_has_ended(store: Path, mountpoint: Path, transport: str) -> None:
    with mounted(store, mountpoint, transport):
        keeper.umount(mountpoint)
        with mounted(store, mountpoint, transport):
            assert place(mountpoint, KEY, PART).exists()
    with pytest.raises(MountError, match="no kvfs mount"):
        keeper.umount(mountpoint)


def test_a_mount_in_use_stays_unless_lazy(store: Path, mountpoint: Path, transport: str) -> None:
    content = place(store, KEY, PART).read_bytes()
    with mounted(store, mountpoint, transport), place(mountpoint, KEY, PART).open("rb") as held:
        with pytest.raises(MountError, match=r"in use|busy"):
            keeper.umount(mountpoint)
        assert place(mountpoint, KEY, PART).read_bytes() == content
        keeper.umount(mountpoint, lazy=True)
        assert connection.mounted_at(mountpoint) is None
        if transport == "kernel":  # its bytes come from the store
            assert held.read() == content


def test_open_files_survive_a_signal(store: Path, mountpoint: Path) -> None:
    content = place(store, KEY, PART).read_bytes()
    with mounted(store, mountpoint), place(mountpoint, KEY, PART).open("rb") as held:
        os.kill(processes(store)["keeper"], signal.SIGTERM)
        until(lambda: not processes(store))
        assert connection.mounted_at(mountpoint) is None
        assert held.read() == content


def test_a_second_daemon_is_refused(store: Path, mountpoint: Path, tmp_path: Path, transport: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    samples.new_store(tmp_path / "kv2").close()
    with mounted(store, mountpoint, transport):
        with pytest.raises(StoreBusy, match=f"{store} is in use by the daemon at {mountpoint}"):
            keeper.mount(store, other, config=Config(), transport=transport)
        with pytest.raises(StoreBusy, match=f"{mountpoint} is in use by a daemon that serves {store}"):
            keeper.mount(tmp_path / "kv2", mountpoint, config=Config(), transport=transport)
        assert place(mountpoint, KEY, PART).exists()
        assert os.listdir(other) == []


def test_two_that_start_at_once(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    samples.new_store(tmp_path / "kv2").close()
    both = [foreground(path, mountpoint) for path in (store, tmp_path / "kv2")]
    until(lambda: any(p.poll() is not None for p in both))
    loser = next(p for p in both if p.poll() is not None)
    winner = next(p for p in both if p is not loser)
    assert "StoreBusy" in loser.communicate(timeout=20)[1]
    until(lambda: connection.mounted_at(mountpoint))
    winner.terminate()
    winner.communicate(timeout=20)
    assert winner.returncode == 0


def test_what_cannot_be_mounted_says_why(store: Path, tmp_path: Path, mountpoint: Path) -> None:
    with pytest.raises(NotAStore, match="kvfs init"):
        keeper.mount(tmp_path / "nothing", mountpoint, config=Config())
    with pytest.raises(MountError, match="must be a folder"):
        keeper.mount(store, tmp_path / "nowhere", config=Config())
    with pytest.raises(MountError, match="must be a folder"):
        keeper.mount(store, store / "kvfs-store.json", config=Config())
    with pytest.raises(MountError, match="Invalid argument"):
        keeper.mount(store, mountpoint, config=Config(), transport="kernel", fuse_options=["max_read=x"])
    until(lambda: not processes(store))
    assert connection.mounted_at(mountpoint) is None


@pytest.mark.parametrize("lacking", ["fusermount3", "/dev/fuse"])
def test_without_rights_it_says_what_to_do(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # other users cannot reach that of the tests
        store, mountpoint = Path(folder, "kv"), Path(folder, "mnt")
        samples.new_store(store).close()
        mountpoint.mkdir()
        if lacking == "/dev/fuse":
            assert libfuse.missing() is None  # and is loaded: a new interpreter might not be reachable for this user
            monkeypatch.setattr(connection, "DEVICE", Path(folder, "fuse"))
            connection.DEVICE.touch(0o600)
        else:
            monkeypatch.setenv("PATH", "/nowhere")
        for path in [Path(folder), mountpoint, store, *store.rglob("*")]:
            os.chown(path, 65534, 65534)
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                keeper.mount(store, mountpoint, config=Config(), foreground=True)
            except MountError as e:
                os._exit(0 if lacking in str(e) or f"{connection.DEVICE}: Permission denied" in str(e) else 1)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_service_manager_is_told(
    store: Path, mountpoint: Path, transport: str, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    daemon = foreground(store, mountpoint, transport)
    heard = ""
    while "READY=1" not in heard:
        heard += manager.recv(4096).decode() + "\n"
    assert f"STATUS=serving {mountpoint}" in heard
    assert place(mountpoint, KEY, PART).exists()
    begun = time.monotonic()
    while "WATCHDOG=1" not in manager.recv(4096).decode():
        assert time.monotonic() - begun < 4
    daemon.terminate()
    while "STOPPING=1" not in manager.recv(4096).decode():
        pass
    _, complained = daemon.communicate(timeout=20)
    assert daemon.returncode == 0
    assert "Traceback" not in complained


def test_notify(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    notify(READY=1, STATUS="well")
    assert manager.recv(100) == b"READY=1\nSTATUS=well"
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/socket")
    notify(READY=1)
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify(READY=1)


def test_a_restart_reads_the_snapshot(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        place(mountpoint, KEY, PART).read_bytes()
        hits = os.getxattr(place(mountpoint, KEY, PART), "user.kvfs.hits")
    with mounted(store, mountpoint):
        assert os.getxattr(place(mountpoint, KEY, PART), "user.kvfs.hits") == hits


def test_log_and_command_lines_help_people(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        for pid in processes(store).values():
            assert f"\0{store}\0{mountpoint}\0" in Path(f"/proc/{pid}/cmdline").read_text()
    assert run("ls", mountpoint).stdout == ""
