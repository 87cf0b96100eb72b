"""The scrubber finds damage at rest, goes on where it was, and is not felt."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvfs import chunk
from kvfs.config import Config
from kvfs.daemon import scrub
from kvfs.daemon.scrub import Scrubber
from kvfs.daemon.service import Service
from kvfs.identity import GroupKind, PartId
from tests.daemons import catalog_of, damage, file_of
from tests.mounted import until
from tests.samples import MANIFEST, new_store, put

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.daemon.catalog import Catalog
    from kvfs.store import Store
    from tests.conftest import Logs

NS = MANIFEST.ns
FULL0 = PartId("full", 0)
FAST = 1 << 34
KEYS = [bytes([16 * n] * 32) for n in range(4)]
"""One leaf folder each: 000, 101, 202, 303."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store") as made:
        for key in KEYS:
            put(made, key)
        yield made


@pytest.fixture
def catalog(store: Store) -> Iterator[Catalog]:
    with catalog_of(store.path) as found:
        yield found


@contextlib.contextmanager
def scrubbing(catalog: Catalog, rate: int = FAST) -> Iterator[Scrubber]:
    scrubber = Scrubber(catalog, rate)
    scrubber.start()
    try:
        yield scrubber
    finally:
        scrubber.close()


def value(catalog: Catalog, name: str) -> float:
    return float(catalog.metrics.snapshot()[name])


def read_so_far(catalog: Catalog) -> float:
    return value(catalog, "kvfs_scrub_bytes_total")


ALL = sum(chunk.layout(MANIFEST, part, 256).nbytes for part in MANIFEST.parts) * len(KEYS)


def leaves(scrubber: Scrubber) -> list[str]:
    return [leaf for _, leaf in scrubber._due()]


# ------------------------------------------------------------------------------------------------------- finding


def test_everything_is_read_once_and_marked(catalog: Catalog) -> None:
    with scrubbing(catalog):
        until(lambda: read_so_far(catalog) == ALL)
        time.sleep(0.2)  # not again: it is not due
    assert read_so_far(catalog) == ALL
    for key in KEYS:
        for part in MANIFEST.parts:
            opened = catalog.verifier.open(NS, key, part)
            os.close(opened.fd)
            assert opened.verified
    assert value(catalog, "kvfs_scrub_damaged_total") == 0


@pytest.mark.parametrize("at", [-1, 4096, 70, 4096 + 32 * 1024])
def test_damage_is_put_away_counted_and_logged(catalog: Catalog, store: Store, logs: Logs, at: int) -> None:
    logs.claim("is damaged")
    damage(file_of(store.path, KEYS[2], FULL0), at)
    with scrubbing(catalog):
        until(lambda: value(catalog, "kvfs_scrub_damaged_total") == 1)
    [entry] = store.lost.entries()
    assert entry.reason == ("header" if at == 70 else "checksum")
    assert catalog.lookup(NS, [KEYS[2]]) == [MANIFEST.all_parts & ~MANIFEST.bit(FULL0)]
    stats = catalog.stats()
    assert stats["scrub"]["damaged"] == sum(stats["quarantined"].values()) == stats["lost_found"]["entries"] == 1


def test_what_was_checked_before_is_read_all_the_same(catalog: Catalog, store: Store, logs: Logs) -> None:
    """Decay leaves times as they were: what is known of a file decides the order only."""
    logs.claim("is damaged")
    path = file_of(store.path, KEYS[1], FULL0)
    damage(path)
    catalog.verifier.mark(path.stat())
    with scrubbing(catalog):
        until(lambda: value(catalog, "kvfs_scrub_damaged_total") == 1)


def test_parts_never_checked_come_first_then_those_of_long_ago(catalog: Catalog, store: Store) -> None:
    order = [MANIFEST.parts[n] for n in (2, 0, 3, 1)]
    for part in order[1:]:
        catalog.verifier.mark(file_of(store.path, KEYS[0], part).stat())
    seen: list[PartId] = []
    scrubber = Scrubber(catalog, FAST)
    scrubber._read_part = lambda _, found: seen.append(found.part) or True  # type: ignore[method-assign]
    assert scrubber.read_leaf(NS, "000")
    assert seen == order


def test_large_parts_are_read_piece_by_piece(tmp_path: Path) -> None:
    big = dataclasses.replace(
        MANIFEST, kinds=(GroupKind("full", (0, 1, 2), 4, 128, 128), GroupKind("mla", (3,), 1, 4096, 0))
    )
    with new_store(tmp_path / "store", big) as made:
        key = bytes(32)
        put(made, key, manifest=big)
        with catalog_of(made.path) as catalog, scrubbing(catalog) as scrubber:
            total = sum(chunk.layout(big, part, 256).nbytes for part in big.parts)
            until(lambda: read_so_far(catalog) == total)
            assert len(scrubber._buffer) == max(scrub.WINDOW, 256 * 4096 * 2)


@pytest.mark.parametrize("window", [1, 1000, 32 * 1024, 100_000, 1 << 30])
def test_windows_cover_every_piece_once(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "WINDOW", window)
    layout = chunk.layout(MANIFEST, MANIFEST.parts[0], 256)
    runs = list(scrub.windows(layout.bounds))
    assert [first for first, _ in runs] == [0, *(last for _, last in runs[:-1])]
    assert runs[-1][1] == len(layout.bounds) - 1
    sizes = np.diff(layout.bounds[[0, *(last for _, last in runs)]])
    assert all(size <= window or last - first == 1 for size, (first, last) in zip(sizes, runs, strict=True))


# ------------------------------------------------------------------------------------------------------- going on


def test_the_longest_unread_comes_first_across_restarts(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Scrubber(catalog, FAST)
    assert leaves(first) == ["000", "101", "202", "303"]
    assert first.read_leaf(NS, "202")
    assert first.read_leaf(NS, "000")
    first._read[NS][0x202] -= 10
    first.close()
    again = Scrubber(catalog, FAST)
    assert leaves(again) == ["101", "303"]
    monkeypatch.setattr(scrub, "AGAIN", -1.0)
    assert leaves(again) == ["101", "303", "202", "000"]
    assert catalog.metrics.snapshot()["kvfs_scrub_complete_since_seconds"] == 0
    begun = int(time.time())
    assert again.read_leaf(NS, "101")
    assert again.read_leaf(NS, "303")
    assert leaves(again)[0] == "202"
    assert begun - 11 <= catalog.stats()["scrub"]["complete_since"] <= begun


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_memory_means_reading_anew(catalog: Catalog, harm: str) -> None:
    scrubber = Scrubber(catalog, FAST)
    scrubber.read_leaf(NS, "000")
    scrubber.save()
    raw = scrubber._path.read_bytes()
    scrubber._path.write_bytes({"flip": raw[:-1] + bytes([raw[-1] ^ 1]), "cut": raw[:-1], "empty": b""}[harm])
    assert leaves(Scrubber(catalog, FAST)) == ["000", "101", "202", "303"]


def test_a_namespace_retired_under_it_is_passed_over(catalog: Catalog) -> None:
    scrubber = Scrubber(catalog, FAST)
    catalog.retire(NS)
    assert scrubber.read_leaf(NS, "000")
    assert leaves(scrubber) == []


def test_a_removed_part_is_passed_over(catalog: Catalog, store: Store) -> None:
    scrubber = Scrubber(catalog, FAST)
    found = next(scrubber._scan(NS, "000"))
    store.remove(NS, KEYS[0], MANIFEST.parts)
    assert scrubber._read_part(NS, found)


# ------------------------------------------------------------------------------------------------------- not felt


@pytest.mark.parametrize(("least", "rate"), [(1, ALL), (1 << 20, len(KEYS) * len(MANIFEST.parts) << 20)])
def test_the_rate_is_kept(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, least: int, rate: int) -> None:
    """Small parts count as more than they are: they cost processor time."""
    monkeypatch.setattr(scrub, "LEAST", least)
    monkeypatch.setattr(scrub, "RUN", rate // 16)
    begun = time.monotonic()
    with scrubbing(catalog, rate=rate):
        until(lambda: read_so_far(catalog) == ALL)
        took = time.monotonic() - begun
    assert 0.8 < took < 3


def test_small_parts_are_read_in_runs(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen parts that count as 1 MiB each, nine are a run: one pause, as long as the rate asks for them."""
    monkeypatch.setattr(scrub, "RUN", 17 << 19)
    scrubber, pauses = Scrubber(catalog, 18 << 20), list[float]()
    wait = scrubber._stop.wait

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return wait(seconds)

    monkeypatch.setattr(scrubber._stop, "wait", pause)
    assert all(scrubber.read_leaf(NS, leaf) for leaf in leaves(scrubber))
    assert len(pauses) <= 1
    assert all(0.4 < seconds < 0.6 for seconds in pauses)


def test_it_waits_while_engines_are_at_work(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "QUIET", 0.3)
    monkeypatch.setattr(scrub, "POLL", 0.02)
    with catalog_of(catalog.store.path) as other:  # reading is use
        os.close(other.open_part(NS, KEYS[0], FULL0))
        assert Scrubber(other, FAST)._is_busy()
    holder, stop = "engine", threading.Event()

    def load() -> None:
        while not stop.wait(0.05):
            for opened in catalog.lease(holder, 1, NS, [(KEYS[0], FULL0)]):
                os.close(opened.fd)
            catalog.leases.release(holder, 1)

    engine = threading.Thread(target=load)
    engine.start()
    until(lambda: catalog.last_use)
    with scrubbing(catalog):
        time.sleep(0.6)
        assert read_so_far(catalog) == 0
        stop.set()
        engine.join()
        until(lambda: read_so_far(catalog) == ALL)


def test_a_lease_under_load_holds_it_up_and_a_kept_one_does_not(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "QUIET", 0.0)
    monkeypatch.setattr(scrub, "LOADING", 0.3)
    for opened in catalog.lease("engine", 1, NS, [(KEYS[0], FULL0)]):
        os.close(opened.fd)
    scrubber = Scrubber(catalog, FAST)
    assert scrubber._is_busy()
    time.sleep(0.35)
    assert not scrubber._is_busy()
    catalog.leases.release("engine", 1)


def test_it_stops_at_once(catalog: Catalog) -> None:
    with scrubbing(catalog, rate=65536):
        until(lambda: read_so_far(catalog))
        begun = time.monotonic()
    assert time.monotonic() - begun < 1


def cached(path: Path) -> int:
    """Pages of a file in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # looking must not read ahead
        pages = 0
        for at in range(0, os.fstat(fd).st_size, 4096):
            with contextlib.suppress(BlockingIOError):
                pages += bool(os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT))
        return pages
    finally:
        os.close(fd)


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_the_page_cache_is_left_as_it_was(catalog: Catalog, store: Store) -> None:
    cold, warm = (file_of(store.path, key, MANIFEST.parts[0]) for key in KEYS[:2])
    for path in (cold, warm):
        drop(path)
    warm.read_bytes()
    try:
        before = cached(warm)
    except OSError as e:
        pytest.skip(f"this filesystem cannot tell what it has cached: {e}")
    assert before == warm.stat().st_size // 4096
    drop(cold)
    with scrubbing(catalog):
        until(lambda: read_so_far(catalog) == ALL)
    assert cached(warm) == before
    assert cached(cold) <= 2  # its header


def priorities() -> tuple[int, int]:
    """I/O class and niceness of the calling thread."""
    number = {"x86_64": 252, "aarch64": 31, "riscv64": 31}[platform.machine()]
    return ctypes.CDLL(None).syscall(number, 1, 0) >> 13, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_its_thread_is_idle_and_no_other() -> None:
    before, seen = priorities(), []
    worker = threading.Thread(target=lambda: (scrub.be_idle(), seen.append(priorities())))
    worker.start()
    worker.join()
    assert seen == [(3, 19)]
    assert priorities() == before != (3, 19)


# ------------------------------------------------------------------------------------------------------- in the daemon


def test_the_daemon_scrubs_and_remembers(store: Store) -> None:
    service = Service(Config(store=store.path, scrub_rate=FAST), resumed=False)
    until(lambda: read_so_far(service.catalog) == ALL)
    until(lambda: len(service._branch._scrubber._read) == 1 and service._branch._scrubber._due() == [])
    service.close()
    again = Service(Config(store=store.path, scrub_rate=FAST), resumed=False)
    try:
        time.sleep(0.2)
        assert read_so_far(again.catalog) == 0
        assert again.catalog.stats()["scrub"]["complete_since"] > time.time() - 60
    finally:
        again.close()


def test_off_is_off(store: Store) -> None:
    service = Service(Config(store=store.path, scrub_rate=0), resumed=False)
    time.sleep(0.2)
    assert read_so_far(service.catalog) == 0
    service.close()
    assert not list((store.path / ".kvfs").glob("scrub.*"))
