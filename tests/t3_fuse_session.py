"""The session on /dev/fuse where no file is passed through, and where the store is slow."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

import pytest

from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.fuse import connection
from kvfs.daemon.fuse.nodes import Nodes
from kvfs.daemon.fuse.passthrough import Borrower, Lender, privileged
from kvfs.daemon.fuse.session import Session
from kvfs.daemon.view import View
from kvfs.metrics import Metrics
from kvfs.store import Store
from tests import samples
from tests.mounted import needs_mount, output, place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_mount

KEYS = [bytes([i]) * 32 for i in (1, 2)]
PART = samples.MANIFEST.parts[0]
SLOW = 3.0
THREADS = 3


class SlowView(View):
    """A view whose disk takes ``SLOW`` seconds to open a part of the first chunk."""

    def open_file(self, path: str, flags: int) -> int | bytes:
        if KEYS[0].hex() in path:
            self.before_slow()
            time.sleep(SLOW)
        return super().open_file(path, flags)


@contextlib.contextmanager
def served(path: Path, point: Path, kind: type[View] = View, user: int = 0, lend: bool = False) -> Iterator[None]:
    """A mount served by a child of its own, as ``user``; it reads itself unless this process is to ``lend``."""
    fd = connection.mount(point, path, ["nosuid", "nodev", "default_permissions"])
    connection.negotiate(fd)
    lending, borrowing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ready, starting = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(user, user, user)
            lending.close()
            serve(fd, path, kind, Borrower(borrowing) if lend else None, starting)
        except BaseException:  # noqa: BLE001 - a child of a test must not go on as a second one
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    borrowing.close()
    os.close(starting)
    lender = threading.Thread(target=Lender(fd, path).serve, args=(lending,))
    lender.start()
    try:
        assert os.read(ready, 5) == b"ready"
        yield
        connection.umount(point)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        lender.join()
        os.close(ready)
        os.close(fd)


def serve(fd: int, path: Path, kind: type[View], borrower: Borrower | None, ready: int) -> None:
    """What the child does."""
    assert privileged() == (os.geteuid() == 0)
    config, metrics = Config(store=path), Metrics()
    view = kind(Catalog(Store.open(path), config, metrics), config, "")
    session = Session(fd, view, Nodes(os.memfd_create("nodes")), borrower, metrics, THREADS)
    session.start()
    os.write(ready, b"ready")
    session.wait()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with samples.new_store(tmp_path / "kv") as store:
        for key in KEYS:
            samples.put(store, key)
    return tmp_path / "kv"


def test_without_passthrough_the_server_reads(store: Path, mountpoint: Path) -> None:
    with served(store, mountpoint):
        for key in KEYS:
            content = place(store, key, PART).read_bytes()
            with place(mountpoint, key, PART).open("rb") as file:
                assert file.read() == content
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                    assert mapped[:] == content
        assert reads(mountpoint) > 0
        output(
            "diff",
            "-r",
            store / samples.MANIFEST.ns_hex / KEYS[0].hex()[:3],
            mountpoint / samples.MANIFEST.ns_hex / KEYS[0].hex()[:3],
        )


def test_a_server_without_rights_borrows(store: Path, mountpoint: Path) -> None:
    for path in [store, *store.rglob("*")]:
        os.chown(path, 65534, 65534)
    for folder in store.parents:
        if folder.stat().st_uid == os.geteuid() and folder.stat().st_mode & 0o011 != 0o011:
            folder.chmod(folder.stat().st_mode | 0o011)  # of this run: it must be able to pass
    with served(store, mountpoint, user=65534, lend=True):
        for _ in range(2):
            for key in KEYS:
                content = place(store, key, PART).read_bytes()
                with place(mountpoint, key, PART).open("rb") as file:
                    assert file.read() == content
        assert reads(mountpoint) == 0


def reads(mount: Path) -> float:
    """How often the kernel has asked the server for bytes."""
    counted = json.loads((mount / ".kvfs" / "stats.json").read_text())["metrics"]["kvfs_fuse_requests_total"]
    return float(counted["op=read,result=ok"])


def test_a_slow_disk_holds_nobody_else_up(store: Path, mountpoint: Path) -> None:
    with served(store, mountpoint, SlowView):
        waiting = subprocess.Popen(
            ["timeout", "-k", "5", "30", "cat", place(mountpoint, KEYS[0], PART)], stdout=subprocess.PIPE
        )
        time.sleep(0.3)
        begun = time.monotonic()
        assert place(mountpoint, KEYS[1], PART).read_bytes() == place(store, KEYS[1], PART).read_bytes()
        assert time.monotonic() - begun < SLOW / 2
        assert waiting.poll() is None
        content, _ = waiting.communicate(timeout=30)
        assert content == place(store, KEYS[0], PART).read_bytes()


def test_an_interrupted_open_lets_go(store: Path, mountpoint: Path) -> None:
    program = f"import os; print('go', flush=True); os.open({str(place(mountpoint, KEYS[0], PART))!r}, os.O_RDONLY)"
    with served(store, mountpoint, SlowView):
        waiting = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"go\n"
        time.sleep(0.3)
        assert waiting.poll() is None
        begun = time.monotonic()
        waiting.kill()
        waiting.communicate(timeout=SLOW)
        assert time.monotonic() - begun < SLOW / 2
        time.sleep(SLOW)  # until the thread that was late finds its answer unwanted
        assert place(mountpoint, KEYS[1], PART).read_bytes() == place(store, KEYS[1], PART).read_bytes()
