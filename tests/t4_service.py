"""kvfs as a service: the worker's sandbox, a fresh worker on demand, a mount that outlives its keeper."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs.client import connect
from kvfs.config import Config
from kvfs.daemon import keeper
from kvfs.daemon.fuse import connection
from kvfs.errors import ConfigError, MountError, StoreReadOnly, Unsupported
from tests import samples
from tests.mounted import mounted, needs_mount, output, place, processes, run, until
from tests.t4_mount_restart import masks, next_worker, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_mount

KEYS = [bytes([i]) * 32 for i in range(1, 5)]
PARTS = samples.MANIFEST.parts
NOBODY = 65534
PROGRAM = Path(sys.executable).with_name("kvfs")

FOREGROUND = """
import sys
from pathlib import Path
from kvfs.config import Config
from kvfs.daemon import keeper
keeper.mount(Path(sys.argv[1]), Path(sys.argv[2]), config=Config(), foreground=True)
"""
PASS_ON = """
import os, sys
names = sys.argv[1].split(":") if sys.argv[1] else []
fds = [int(fd) for fd in sys.argv[2].split(",") if fd]
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=":".join(names))
high = []
for fd in fds:
    while fd < 3 + len(fds):
        fd = os.dup(fd)
    high.append(fd)
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i, inheritable=True)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[3:]])
"""
"""What a service manager does for a service whose descriptors it has kept."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with samples.new_store(tmp_path / "kv") as store:
        for key in KEYS:
            samples.put(store, key)
    return tmp_path / "kv"


# ----------------------------------------------------------------------------------------------- the worker's sandbox


@pytest.fixture
def owned(store: Path) -> Path:
    """The store as a user's own, who can reach it."""
    for folder in store.parents:
        if str(folder) != "/tmp" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    for path in (store, *store.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return store


def status(pid: int) -> list[dict[str, str]]:
    """What the kernel says of each thread of a process."""
    return [
        dict(re.findall(r"^(\w+):\s*(.*)$", (task / "status").read_text(), re.MULTILINE))
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]


def test_every_thread_of_the_worker_has_given_up_its_rights(owned: Path, mountpoint: Path) -> None:
    with mounted(owned, mountpoint, worker_user=str(NOBODY)):
        worker = processes(owned)["worker"]
        [coder] = map(int, Path(f"/proc/{worker}/task/{worker}/children").read_text().split())
        threads = status(worker)
        assert len(threads) > 1
        for thread in (*threads, *status(coder)):
            assert thread["NoNewPrivs"] == "1"
            assert thread["Uid"].split() == [str(NOBODY)] * 4
            assert thread["Gid"].split() == [str(NOBODY)] * 4
            assert {thread[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb", "CapInh")} == {"0" * 16}
        limits = Path(f"/proc/{worker}/limits").read_text()
        soft, hard = re.findall(r"Max open files\s+(\w+)\s+(\w+)", limits)[0]
        assert soft == hard
        if (group := Path(f"/proc/{coder}/autogroup")).exists():
            assert group.read_text().endswith("nice 19\n"), "compaction has the share of a whole session"


def test_a_sandboxed_worker_does_all_its_work(owned: Path, mountpoint: Path, tmp_path: Path) -> None:
    """Reading with passthrough, publishing over both ways, removing, quarantine, its own snapshots."""
    with samples.new_store(tmp_path / "outside") as outside:
        samples.put(outside, b"n" * 32)
    with mounted(owned, mountpoint, worker_user=str(NOBODY), logs="checksum"):
        path = place(mountpoint, KEYS[0], PARTS[0])
        with path.open("rb") as held:
            assert held.read() == place(owned, KEYS[0], PARTS[0]).read_bytes()
            os.kill(processes(owned)["worker"], signal.SIGSTOP)
            content = os.pread(held.fileno(), 1 << 20, 0)  # through the kernel: nobody else is there to read
            assert content == place(owned, KEYS[0], PARTS[0]).read_bytes()
            os.kill(processes(owned)["worker"], signal.SIGCONT)
        for part in PARTS:
            output("cp", place(tmp_path / "outside", b"n" * 32, part), place(mountpoint, b"n" * 32, part))
        assert place(owned, b"n" * 32, PARTS[0]).stat().st_uid == NOBODY
        output("rm", place(mountpoint, b"n" * 32, PARTS[0]))
        bad = place(owned, KEYS[1], PARTS[0])
        bad.chmod(0o640)
        with bad.open("r+b") as file:
            file.seek(5000)
            file.write(b"damage")
        assert run("cat", place(mountpoint, KEYS[1], PARTS[0])).returncode == 1
        assert list((owned / "lost+found").iterdir())
        output(PROGRAM, "reload", mountpoint)
    assert list((owned / ".kvfs").glob("index.*"))


CONFINED = """
import errno, os, socket, sys
from pathlib import Path
from kvfs.config import Config
from kvfs.daemon import sandbox
store, elsewhere = map(Path, sys.argv[1:])
sandbox.enter(Config(store=store, worker_user="65534"))
def refused(do):
    try:
        do()
    except OSError as e:
        return e.errno in {errno.EACCES, errno.EPERM, errno.EXDEV}
    return False
assert refused(lambda: (elsewhere / "new").touch())
assert refused(lambda: (elsewhere / "file").open("ab"))
assert refused(lambda: (elsewhere / "file").unlink())
assert refused(lambda: (elsewhere / "folder").mkdir())
assert refused(lambda: (elsewhere / "file").rename(store / "file"))
assert refused(lambda: os.link(elsewhere / "file", store / "file"))
assert refused(lambda: os.execv("/bin/true", ["true"]))
assert refused(lambda: os.setresuid(0, 0, 0))
assert (elsewhere / "file").read_text() == "theirs"
(store / "mine").write_text("x")
(store / "mine").rename(store / ".kvfs" / "mine")
os.link(store / ".kvfs" / "mine", store / "mine")
with socket.socket() as sock:
    assert refused(lambda: sock.bind(("127.0.0.1", 0)))
    assert refused(lambda: sock.connect(("127.0.0.1", 9)))
"""


def test_the_sandbox_ends_at_the_store(owned: Path, tmp_path: Path) -> None:
    """Even where the permissions of the files would allow more."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("theirs")
    for path in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "file"):
        path.chmod(0o777)
    done = run(sys.executable, "-c", CONFINED, owned, tmp_path / "elsewhere")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_that_stays_root_keeps_five_capabilities(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        for thread in status(processes(store)["worker"]):
            assert thread["NoNewPrivs"] == "1"
            assert int(thread["CapBnd"], 16).bit_count() <= 5
            assert int(thread["CapEff"], 16).bit_count() <= 5


def test_a_user_that_cannot_be_is_refused(store: Path, mountpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no such user"):
        keeper.mount(store, mountpoint, config=Config(worker_user="nobody-of-that-name"))
    with pytest.raises(MountError, match=r"must own|Permission denied"):
        keeper.mount(store, mountpoint, config=Config(worker_user=str(NOBODY)))
    with pytest.raises(ConfigError, match="libfuse"):
        keeper.mount(store, mountpoint, config=Config(worker_user="root"), transport="libfuse")
    until(lambda: not processes(store))
    assert connection.mounted_at(mountpoint) is None


# ------------------------------------------------------------------------------------------------------------- reload


def test_reload_is_not_noticed_by_readers(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    with mounted(store, mountpoint), reading(mountpoint, tmp_path / "stop"):
        for _ in range(2):
            worker = processes(store)["worker"]
            output(PROGRAM, "reload", mountpoint)
            assert processes(store)["worker"] != worker
            assert output("stat", "-c", "%F", place(mountpoint, KEYS[3], PARTS[0])) == "regular file\n"


def test_reload_keeps_leases(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint), connect(mount=mountpoint) as client:
        until(lambda: masks(client) == [15])
        lease = client.lease(samples.MANIFEST.ns, [(KEYS[0], PARTS[0])], timeout=5)
        output(PROGRAM, "reload", mountpoint)
        until(lambda: masks(client) == [15])
        until(lambda: os.getxattr(place(mountpoint, KEYS[0], PARTS[0]), "user.kvfs.leases") == b"1")
        lease.release()


def test_sighup_reloads(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        worker = processes(store)["worker"]
        os.kill(processes(store)["keeper"], signal.SIGHUP)
        next_worker(store, worker)
        assert place(mountpoint, KEYS[0], PARTS[0]).read_bytes()


def test_reload_without_a_keeper_says_so(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, "libfuse"):
        done = run(PROGRAM, "reload", mountpoint)
        assert done.returncode == Unsupported.exit_code
        os.kill(processes(store)["keeper"], signal.SIGHUP)
        assert place(mountpoint, KEYS[0], PARTS[0]).read_bytes()


# ------------------------------------------------------------------------------------- a mount that outlives its keeper


class Manager:
    """A service manager: hears what a service says, keeps the descriptors that it leaves."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(os.fspath(path))
        self.sock.settimeout(30)
        self.path = path
        self.kept: dict[str, int] = {}

    def hear(self, word: str) -> None:
        """Wait until the service says ``word``."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.sock, 4096, 4)
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTORE" in fields:
                self.kept[fields["FDNAME"]] = fds[0]
            if "FDSTOREREMOVE" in fields:
                os.close(self.kept.pop(fields["FDNAME"]))
            if word in fields:
                return

    def start(self, store: Path, point: Path) -> subprocess.Popen[str]:
        """Start the service, with what was kept of an earlier one."""
        names, fds = ":".join(self.kept), ",".join(map(str, self.kept.values()))
        return subprocess.Popen(
            [sys.executable, "-c", PASS_ON, names, fds, FOREGROUND, str(store), str(point)],
            pass_fds=list(self.kept.values()),
            env={**os.environ, "NOTIFY_SOCKET": str(self.path)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self.sock.close()
        for fd in self.kept.values():
            os.close(fd)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def end(manager: Manager, daemon: subprocess.Popen[str]) -> str:
    """End the service in order; what it logged."""
    daemon.terminate()
    manager.hear("STOPPING")
    _, said = daemon.communicate(timeout=20)
    assert daemon.returncode == 0, said
    return said


def test_a_mount_outlives_its_keeper(store: Path, mountpoint: Path, manager: Manager, tmp_path: Path) -> None:
    first = manager.start(store, mountpoint)
    manager.hear("READY")
    assert len(manager.kept) == 3
    there = connection.mounted_at(mountpoint)
    with reading(mountpoint, tmp_path / "stop"), connect(mount=mountpoint) as client:
        until(lambda: masks(client) == [15])
        first.kill()
        first.communicate(timeout=20)
        until(lambda: not processes(store))
        waiting = subprocess.Popen(
            ["timeout", "-k", "5", "30", "cat", place(mountpoint, KEYS[3], PARTS[0])], stdout=subprocess.PIPE
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.communicate(timeout=0.3)
        second = manager.start(store, mountpoint)
        manager.hear("READY")
        content, _ = waiting.communicate(timeout=30)
        assert content == place(store, KEYS[3], PARTS[0]).read_bytes()
        assert connection.mounted_at(mountpoint) == there
        until(lambda: masks(client) == [15])
    assert "goes on where" in end(manager, second)
    while manager.kept:
        manager.hear("FDSTOREREMOVE")
    assert connection.mounted_at(mountpoint) is None


def test_descriptors_of_a_mount_that_is_gone_are_given_back(store: Path, mountpoint: Path, manager: Manager) -> None:
    manager.kept = {"fuse-1-0": os.open("/dev/null", os.O_RDONLY), "nodes": os.memfd_create("nodes")}
    daemon = manager.start(store, mountpoint)
    manager.hear("READY")
    assert "fuse-1-0" not in manager.kept
    assert len(manager.kept) == 3
    assert place(mountpoint, KEYS[0], PARTS[0]).read_bytes()
    end(manager, daemon)


def test_a_reload_is_told_to_the_manager(store: Path, mountpoint: Path, manager: Manager) -> None:
    daemon = manager.start(store, mountpoint)
    manager.hear("READY")
    daemon.send_signal(signal.SIGHUP)
    manager.hear("RELOADING")
    manager.hear("READY")
    manager.hear("WATCHDOG")
    end(manager, daemon)


# -------------------------------------------------------------------------------- what a worker plants for its keeper


@pytest.mark.parametrize("plant", ["link", "hard link", "fifo", "folder is a link"])
def test_root_writes_nowhere_else_for_those_who_own_the_store(
    store: Path, mountpoint: Path, tmp_path: Path, plant: str
) -> None:
    """The keeper is root, the store may be another's: its lock and log must not become a way to other files."""
    secret = tmp_path / "secret"
    secret.mkdir()
    names = [f"daemon.{socket.gethostname()}.{kind}" for kind in ("lock", "log")]
    for name in names:
        (secret / name).write_text("theirs")
    folder = store / ".kvfs"
    folder.mkdir(exist_ok=True)
    for name in names:
        match plant:
            case "link":
                (folder / name).symlink_to(secret / name)
            case "hard link":
                (folder / name).hardlink_to(secret / name)
            case "fifo":
                os.mkfifo(folder / name)
    if plant == "folder is a link":
        folder.rename(tmp_path / "away")
        folder.symlink_to(secret)
    with pytest.raises(StoreReadOnly, match=r"planted|symbolic|directory"):
        keeper.mount(store, mountpoint, config=Config())
    assert [(secret / name).read_text() for name in names] == ["theirs"] * 2
    assert connection.mounted_at(mountpoint) is None


def test_the_log_is_not_for_everyone(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        (path,) = (store / ".kvfs").glob("daemon.*.log")
        assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0
