"""A disk that is really full: stores are no-ops that are counted, room is made, nothing is half-written."""

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs import chunk
from kvfs.client import MountClient
from kvfs.daemon.catalog import Catalog
from kvfs.errors import KvfsError, StoreFull
from kvfs.store import Store
from tests.daemons import catalog_of, meta, serving
from tests.samples import MANIFEST, new_key, new_store, payload


@pytest.fixture
def tmpfs(mountpoint: Path) -> Path:
    """A disk of 64 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "kvfs-test", str(mountpoint)]
    if subprocess.run(command, capture_output=True, timeout=10, check=False).returncode:
        pytest.skip("no right to mount a tmpfs")
    return mountpoint


def writer(mount: Path, seed: int, parts: int, counts: list[int]) -> None:
    """Write texts of 1 to 12 chunks until so many parts are stored; what is refused is passed over."""
    r = random.Random(seed)
    bytes_of = {part: payload(bytes([seed]) * 32, part) for part in MANIFEST.parts}
    with MountClient(mount) as client:
        while counts[0] < parts and counts[2] == 0:
            parent = bytes(32)
            for position in range(r.randint(1, 12)):
                key = r.randbytes(32)
                for part in MANIFEST.parts:
                    try:
                        size = len(bytes_of[part]) + chunk.ALIGNMENT
                        with client.reserve(MANIFEST.ns, size, timeout=10.0, key=key) as reservation:
                            about = meta(key, part)._replace(parent=parent, position=position * 256)
                            chunk.write_part(reservation.fd, MANIFEST, about, bytes_of[part])
                            client.publish(MANIFEST.ns, reservation, key, part, timeout=10.0)
                        counts[0] += 1
                    except StoreFull:
                        counts[1] += 1
                        time.sleep(0.002)
                    except KvfsError:
                        counts[2] += 1
                parent = key


@contextlib.contextmanager
def full_disk(tmpfs: Path, mount: Path) -> Iterator[tuple[Store, Catalog]]:
    """A served store on the small disk; the day's writes are not what limits it."""
    with (
        new_store(tmpfs / "store") as store,
        catalog_of(store.path, write_budget=None) as catalog,
        serving(catalog, mount / "m"),
    ):
        yield store, catalog


def test_eight_writers_on_a_full_disk(tmpfs: Path, tmp_path: Path) -> None:
    """Three times as much as fits is written; the store stays within its budget, and nothing is half-written."""
    with full_disk(tmpfs, tmp_path) as (store, catalog):
        limit = catalog.evictor.accounts[-1].limit
        assert limit == pytest.approx(0.9 * (64 << 20), rel=0.01)
        catalog.evictor.start()
        counts = [[0, 0, 0] for _ in range(8)]
        threads = [
            threading.Thread(target=writer, args=(tmp_path / "m", n, 400, mine)) for n, mine in enumerate(counts)
        ]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, catalog.index.totals()[1])
            time.sleep(0.005)
        for thread in threads:
            thread.join()
        catalog.evictor.close()
        stored, refused, failed = (sum(column) for column in zip(*counts, strict=True))
        assert failed == 0
        assert stored >= 8 * 400
        assert most <= limit
        figures = catalog.stats()
        assert sum(figures["eviction"]["refused"].values()) == refused
        assert figures["eviction"]["evicted"]["budget"] > 0
        catalog.index.check_integrity()
        assert catalog.reconcile() == (0, 0)
        assert os.listdir(store.path / MANIFEST.ns_hex / "tmp") == []
        for found in store.scan(MANIFEST.ns):
            fd = store.open_part(MANIFEST.ns, found.key, found.part)
            with chunk.open_part(fd, MANIFEST, found.key, found.part) as file:
                file.verify()


def test_a_disk_that_others_fill_is_freed_within_5_seconds(tmpfs: Path, tmp_path: Path) -> None:
    with full_disk(tmpfs, tmp_path) as (_, catalog):
        catalog.evictor.start()
        counts = [0, 0, 0]
        writer(tmp_path / "m", 1, 500, counts)
        assert counts[1:] == [0, 0]
        ballast = os.open(tmpfs / "ballast", os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(ballast, 0, os.statvfs(tmpfs).f_bavail * os.statvfs(tmpfs).f_frsize)
        os.close(ballast)
        begun = time.monotonic()
        refused = 0
        while time.monotonic() - begun < 20:
            try:
                os.close(catalog.reserve(MANIFEST.ns, 100_000, new_key()).fd)
                break
            except StoreFull:
                refused += 1
                time.sleep(0.05)
        assert time.monotonic() - begun < 5
        assert catalog.stats()["eviction"]["refused"] == {"space": refused}
        assert catalog.stats()["eviction"]["evicted"]["space"] > 0
        catalog.evictor.close()
        catalog.index.check_integrity()
