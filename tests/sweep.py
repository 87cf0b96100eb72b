"""One job again and again, each time with another system call of it going wrong (strace does that).

Run as ``python -m tests.sweep`` this is a process that forks itself for each job, so that a run costs no imports. The
fork waits until strace is attached; what it does then lies between two calls of ``getppid``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvfs import chunk
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.errors import KvfsError
from kvfs.fsck import Fsck
from kvfs.metrics import Metrics
from kvfs.store import Store
from tests.samples import new_store, payload, put
from tests.small import CHUNK, NO_FLOOR, NS, PART, SMALL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEYS: Final = [bytes([n]) * 32 for n in (0x11, 0x22, 0x33, 0x44)]
"""The text that is in the store before: each chunk continues the one before it."""
NEW: Final = [b"\x99" * 32, b"\xaa" * 32]
"""What a job publishes."""
MARK: Final = "getppid"

FILES: Final = frozenset(
    [
        "openat",
        "open",
        "creat",
        "read",
        "pread64",
        "preadv",
        "preadv2",
        "readv",
        "write",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "writev",
        "close",
        "fstat",
        "newfstatat",
        "stat",
        "lstat",
        "statx",
        "access",
        "faccessat",
        "faccessat2",
        "statfs",
        "fstatfs",
        "getdents64",
        "fsync",
        "fdatasync",
        "ftruncate",
        "fchmod",
        "fchmodat",
        "chmod",
        "link",
        "linkat",
        "unlink",
        "unlinkat",
        "rename",
        "renameat",
        "renameat2",
        "mkdir",
        "mkdirat",
        "rmdir",
        "fallocate",
        "copy_file_range",
        "fcntl",
        "flock",
        "lseek",
        "utimensat",
        "readlink",
        "readlinkat",
        "dup",
    ]
)
"""Calls that change files or tell of them. Between two of them nothing happens that a crash could cut."""

ERRORS: Final = {
    "ENOSPC": "write pwrite64 pwritev openat mkdirat mkdir linkat link rename renameat fsync close fallocate ftruncate "
    "copy_file_range",
    "EDQUOT": "write pwrite64 pwritev openat mkdirat mkdir linkat link rename renameat fsync close fallocate "
    "copy_file_range",
    "EIO": "read pread64 preadv readv write pwrite64 pwritev openat close fstat newfstatat getdents64 fsync ftruncate "
    "fchmod linkat unlinkat rename renameat mkdirat statfs lstat copy_file_range",
    "EMFILE": "openat dup",
    "ESTALE": "read pread64 preadv openat fstat newfstatat getdents64 fsync linkat unlinkat rename renameat mkdirat "
    "faccessat2 faccessat lstat",
    "EROFS": "openat mkdirat mkdir linkat unlinkat rename renameat fchmod ftruncate",
    "EINTR": "read pread64 preadv write pwrite64 pwritev openat close fsync fcntl flock ftruncate",
    "short": "write pwrite64 pwritev",
}
"""What may go wrong with which calls. ``short``: nothing is written, and that is said."""


@dataclass
class Done:
    """How a job ended: ``acks`` are the keys it acknowledged, ``errors`` what it met, by type."""

    acks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ what is done


@contextlib.contextmanager
def catalog(path: Path) -> Iterator[Catalog]:
    """A daemon's catalog."""
    with Store.open(path, "full") as store:
        yield Catalog(store, Config(durability="full", **NO_FLOOR), Metrics())  # type: ignore[arg-type]


def meta(key: bytes, position: int = 0, parent: bytes = bytes(32)) -> chunk.PartMeta:
    return chunk.PartMeta(NS, key, parent, 256, position, PART)


@contextlib.contextmanager
def noting(done: Done) -> Iterator[None]:
    """What goes wrong is part of the result."""
    try:
        yield
    except Exception as e:  # noqa: BLE001 - which types there are is what the test asks
        done.errors.append(type(e).__name__ if isinstance(e, KvfsError | OSError) else repr(e))


def publish(path: Path, done: Done) -> None:
    """As a writer without a daemon."""
    with Store.open(path, "full") as store:
        for key in NEW:
            with noting(done):
                temp = store.reserve(NS)
                try:
                    chunk.write_part(temp.fd, SMALL, meta(key), payload(key, PART, SMALL))
                except BaseException:
                    store.discard(NS, temp.name)
                    raise
                finally:
                    os.close(temp.fd)
                store.publish(NS, temp.name, key, PART)
                done.acks.append(key.hex())


def admit(path: Path, done: Done) -> None:
    """As a daemon for its client."""
    with noting(done), catalog(path) as daemon:
        for key in NEW:
            with noting(done):
                temp = daemon.reserve(NS, CHUNK, key)
                try:
                    chunk.write_part(temp.fd, SMALL, meta(key), payload(key, PART, SMALL))
                except BaseException:
                    daemon.discard(NS, temp.name)
                    raise
                finally:
                    os.close(temp.fd)
                daemon.publish_file(NS, temp.name, key, PART)
                done.acks.append(key.hex())
        daemon.close()


def evict(path: Path, done: Done) -> None:
    """Two of the chunks have to go: the last ones."""
    with noting(done), catalog(path) as daemon:
        daemon.evict(None, 2 * CHUNK)
        daemon.close()


def snapshot(path: Path, done: Done) -> None:
    """Write what makes the next start quick."""
    with noting(done), catalog(path) as daemon:
        for key in KEYS:
            os.close(daemon.open_part(NS, key, PART))
        daemon.save()


def check(path: Path, done: Done) -> None:
    """Repair a store with something of everything (see `damage`)."""
    with Fsck(path, data=True) as fsck:
        for _ in fsck.run():
            pass
    done.acks.append("repaired")


def quarantine(path: Path, done: Done) -> None:
    """A reader has found a part damaged."""
    with noting(done), catalog(path) as daemon:
        daemon.damaged(NS, KEYS[1], PART, "checksum")
        daemon.close()


def retire(path: Path, done: Done) -> None:
    """Remove the namespace."""
    with noting(done), catalog(path) as daemon:
        daemon.retire(NS)
        done.acks.append("retired")


def register(path: Path, done: Done) -> None:
    """Make a store, and a namespace in it."""
    with Store.init(path.with_name("other"), "full") as store:
        done.acks.append("made")
        store.register(SMALL, {"name": "small"})
        done.acks.append(SMALL.ns_hex)


JOBS: Final[dict[str, Callable[[Path, Done], None]]] = {
    job.__name__: job for job in (publish, admit, evict, snapshot, check, quarantine, retire, register)
}


# --------------------------------------------------------------------------------------------- the process that does it


def serve() -> None:
    """Fork a process for each line on stdin, ``[job, path]``, and tell its pid."""
    warm_up()
    requests, answers = sys.stdin, sys.stdout
    while line := requests.readline():
        job, path, number = json.loads(line)
        link = socket.socket(fileno=os.dup(number))
        pid = os.fork()
        if pid == 0:
            _work(JOBS[job], Path(path), link)
        link.close()
        answers.write(f"{pid}\n")
        answers.flush()
        os.waitpid(pid, 0)
        answers.write("gone\n")
        answers.flush()


def warm_up() -> None:
    """Do every job once, so that none has to import anything."""
    for job in JOBS.values():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            with new_store(path, SMALL) as store:
                for key in KEYS:
                    put(store, key, manifest=SMALL)
            job(path, Done())


def _work(job: Callable[[Path, Done], None], path: Path, link: socket.socket) -> None:
    """Wait for a word, work, tell, and stay until told to go, so that others can see what is open."""
    done = Done()
    link.recv(1)
    os.getppid()
    with noting(done):
        job(path, done)
    os.getppid()
    link.sendall(json.dumps([done.acks, done.errors]).encode())
    link.recv(1)
    os._exit(0)


class Runner:
    """The other side of `serve`: runs a job under strace."""

    def __init__(self, folder: Path) -> None:
        self._trace = folder / "trace"
        self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.set_inheritable(True)
        self._number = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.sweep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[self._number],
            cwd=Path(__file__).parent.parent,
        )
        theirs.close()

    def run(self, job: str, path: Path, *inject: str) -> tuple[Done | None, list[str]]:
        """How the job ended, None if it was killed, and what strace wrote. It must give back what it opens."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([job, str(path), self._number]) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        strace = subprocess.Popen(
            ["strace", "-f", "-y", "-qq", "-s", "0", "-o", self._trace, "-p", str(pid), *inject], stderr=subprocess.PIPE
        )
        try:
            _attached(pid)
            before = _open_files(pid)
            self._mine.send(b"g")
            done = self._result(pid)
            if done is not None:
                left = _open_files(pid) - before
                if left and not any("close" in word for word in inject):
                    done.errors.append(f"left open: {left}")
                self._mine.send(b"e")
            assert self._process.stdout.readline() == "gone\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            strace.communicate(timeout=10)
        return done, self._trace.read_text(errors="replace").splitlines()

    def _result(self, pid: int) -> Done | None:
        assert self._process.stdout
        ready, _, _ = select.select([self._mine, self._process.stdout], [], [], 60)
        assert ready, f"process {pid} does not end"
        return Done(*json.loads(self._mine.recv(1 << 16))) if self._mine in ready else None

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)
        assert self._process.stdout
        self._process.stdout.close()
        self._mine.close()


def _attached(pid: int) -> None:
    deadline = time.monotonic() + 20
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0\n" in status.read_text():
        assert time.monotonic() < deadline, "strace does not attach"
        time.sleep(0.001)


def _open_files(pid: int) -> set[str]:
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{fd} {os.readlink(f'/proc/{pid}/fd/{fd}')}")
    return found


_CALL: Final = re.compile(r"(?:\d+ +)?(\w+)\(")


def calls(trace: list[str]) -> list[tuple[str, int]]:
    """The system calls of a job that concern files, each with its number among all of its name that strace saw."""
    counts: dict[str, int] = {}
    found, marks = [], 0
    for line in trace:
        if (m := _CALL.match(line)) is None:
            continue
        name = m[1]
        counts[name] = counts.get(name, 0) + 1
        marks += name == MARK
        if marks == 1 and name in FILES:
            found.append((name, counts[name]))
    assert marks == 2, trace[-5:]
    return found


if __name__ == "__main__":
    serve()
