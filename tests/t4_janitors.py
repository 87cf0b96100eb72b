"""Processes that share a store: engines without a daemon elect their janitor, daemons of two hosts serve one folder."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvfs.client import MountClient, StoreClient
from kvfs.config import Config
from kvfs.daemon import keeper
from kvfs.daemon.fuse import connection
from kvfs.errors import ChunkNotFound, StoreBusy, StoreFull
from tests import daemons, samples
from tests.mounted import mounted, needs_mount, run, until
from tests.samples import MANIFEST, new_key, new_store
from tests.small import CHUNK, NO_FLOOR, SMALL, budget, names, text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.store import Store

ENGINE = """
import sys, time
from pathlib import Path
from kvfs.config import Config
from kvfs.kinds import Amount
from kvfs.store import Store
from kvfs.upkeep.office import Pace
from kvfs.upkeep.steward import Steward
from kvfs.verify import Verifier
store = Store.open(sys.argv[1], shared=True)
config = Config(budget=Amount(int(sys.argv[2]), 0.0), min_free=Amount(0, 0.0))
steward = Steward(Verifier(store), config, Pace(look=0.05, beat=0.2, stale=2.0, keep=0.5))
steward.start()
before = -1
while True:
    epoch = steward.member.epoch
    if epoch != before:
        print(epoch, flush=True)
    before = epoch
    time.sleep(0.005)
"""


class Engine:
    """A process with a steward; `epochs` are what it has said of its office, the last one now."""

    def __init__(self, store: Path, limit: int) -> None:
        command = [sys.executable, "-c", ENGINE, str(store), str(limit)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.epochs: list[int] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.epochs.extend(map(int, self.process.stdout))

    @property
    def epoch(self) -> int:
        return self.epochs[-1] if self.epochs else 0

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def engines(store: Path, count: int, limit: int) -> Iterator[list[Engine]]:
    started = [Engine(store, limit) for _ in range(count)]
    try:
        yield started
    finally:
        for each in started:
            each.end()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store", SMALL) as found:
        yield found


def test_engines_elect_a_janitor_who_is_followed_when_he_dies_or_hangs(store: Store) -> None:
    text(store, 12)
    with engines(store.path, 3, 10 * CHUNK) as all_of_them:
        until(lambda: any(each.epoch for each in all_of_them))
        until(lambda: len(names(store)) == 9)
        [first] = [each for each in all_of_them if each.epoch]
        text(store, 12)  # behind the back of a janitor, who lists once a minute; the next one lists at once
        first.signal(signal.SIGKILL)
        others = [each for each in all_of_them if each is not first]
        until(lambda: any(each.epoch for each in others))
        until(lambda: len(names(store)) <= 9)
        [second] = [each for each in others if each.epoch]
        [third] = [each for each in others if each is not second]
        text(store, 12)
        second.signal(signal.SIGSTOP)
        until(lambda: third.epoch)
        until(lambda: len(names(store)) <= 9)
        assert second.epoch > 0, "it did not notice yet"
        second.signal(signal.SIGCONT)
        until(lambda: second.epoch == 0)
        terms = [epoch for each in all_of_them for epoch in each.epochs if epoch]
        assert len(terms) == len(set(terms)), "an epoch belongs to one"
        assert third.epoch == max(terms)
        until(lambda: not list((store.path / "trash").rglob("*.safetensors.*")))


def test_an_engine_keeps_a_bare_store_within_its_budget(store: Store) -> None:
    text(store, 40)
    with StoreClient(store.path, upkeep=Config(budget=budget(20), **NO_FLOOR)) as client:  # type: ignore[arg-type]
        keys = sorted(names(store))
        assert any(client.lookup(SMALL.ns, keys, timeout=5.0))
        until(lambda: len(names(store)) <= 19)
        left = min(names(store))
        with client.lease(SMALL.ns, [(left, SMALL.parts[0])], timeout=5.0):
            assert client.stats()["leases"] == 1
            assert client.stats()["sharing"]["in_office"]
            text(store, 40)
            until(lambda: left in names(store) and len(names(store)) < 60)
        assert client.stats()["leases"] == 0
    assert not list(store.derived.glob("bulletin.*"))


def test_an_engine_stores_nothing_when_the_budget_is_used_up(store: Store) -> None:
    with StoreClient(store.path, upkeep=Config(budget=budget(0.5), **NO_FLOOR)) as client:  # type: ignore[arg-type]
        client.lookup(SMALL.ns, [new_key()], timeout=5.0)
        key = text(store, 1)[0]
        with client.lease(SMALL.ns, [(key, SMALL.parts[0])], timeout=5.0):
            until(lambda: client.stats()["sharing"]["full"])
            with pytest.raises(StoreFull) as e:
                client.reserve(SMALL.ns, 100)
            assert e.value.reason == "budget"


# --- two hosts ---


@contextlib.contextmanager
def other_host(name: str, store: Path, point: Path) -> Iterator[Path]:
    """A daemon with another host name."""
    point.mkdir()
    mount = f"from kvfs.cli.main import kvfs_command; kvfs_command(['mount', '--shared', 'yes', '{store}', '{point}'])"
    command = f'hostname {name} && exec {sys.executable} -c "{mount}"'
    done = run("unshare", "--uts", "sh", "-c", command, limit=60)
    try:
        assert done.returncode == 0, done
        yield point
    finally:
        if connection.mounted_at(point) is not None:
            keeper.umount(point, lazy=True)


@needs_mount
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_daemons_of_two_hosts_serve_one_store(tmp_path: Path, mountpoint: Path) -> None:
    with samples.new_store(tmp_path / "store") as store:
        path = store.path
    with (
        mounted(path, mountpoint, shared="yes"),
        other_host("hostb", path, tmp_path / "b") as there,
        MountClient(mountpoint) as a,
        MountClient(there) as b,
    ):
        assert [client.stats()["sharing"]["in_office"] for client in (a, b)] == [True, False]
        key, part = new_key(), MANIFEST.parts[0]
        daemons.put(a, key)
        begun = time.monotonic()
        until(lambda: b.lookup(MANIFEST.ns, [key], timeout=5.0) == [MANIFEST.all_parts])
        assert time.monotonic() - begun < 10
        with b.lease(MANIFEST.ns, [(key, part)], timeout=5.0) as lease:
            until(lambda: a.stats()["sharing"]["held_elsewhere"])
            assert a.evict(None, 1 << 40) == (0, 0)
            assert daemons.read(lease.parts[0].fd, key, part)
        with pytest.raises(StoreBusy, match="janitor"):
            b.evict(None, 1 << 40)
        until(lambda: a.evict(None, 1 << 40)[0] == 1)
        until(lambda: b.lookup(MANIFEST.ns, [key], timeout=5.0) == [0])
        with pytest.raises(ChunkNotFound):
            b.lease(MANIFEST.ns, [(key, part)], timeout=5.0)
    until(lambda: not list((path / ".kvfs").glob("bulletin.*")))
