"""Compaction of a store: what becomes smaller, how far, what comes back, and that nothing is lost on the way."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs import codec
from kvfs.codec import gate
from kvfs.config import Amount, Config
from kvfs.daemon import compact
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.coder import Coder
from kvfs.errors import DaemonUnavailable, IdentityError, StoreReadOnly
from kvfs.identity import GroupKind, Manifest
from kvfs.metrics import Metrics
from tests.coded import (
    EXACT,
    LONG_AGO,
    LOSSY,
    NO_FLOOR,
    PARTS,
    exact,
    forms_of,
    grow_old,
    new_store,
    on_disk,
    put_coded,
    put_raw,
    read,
)
from tests.daemons import catalog_of
from tests.mounted import until
from tests.samples import new_key, put

if TYPE_CHECKING:
    from tests.conftest import Logs

NS = EXACT.ns
RAW = 135168
"""Bytes of a raw part's file."""
ALL = [EXACT, LOSSY]


# --- how far ---


def test_an_exact_namespace_is_compacted_losslessly(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        keys = [new_key() for _ in range(3)]
        for key in keys:
            put_raw(store, EXACT, key)
        before = on_disk(store)
        with catalog_of(store.path) as catalog:
            grow_old(catalog)
            swept = catalog.sweep(None, None, 30)
            catalog.index.check_integrity()
            assert (swept.chunks, swept.before, swept.after, swept.done) == (3, before, on_disk(store), True)
            assert catalog.index.totals() == (3, on_disk(store))
            assert catalog.index.forms().saved > 0
            for key in keys:
                assert forms_of(store, EXACT, key) == ["cachegen-lossless"] * 2
                assert read(catalog, EXACT, key) == exact(key)
            assert catalog.sweep(None, 0, 30).chunks == 0, "done once"


def test_only_the_cold_unless_asked(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        for key in (cold := new_key(), warm := new_key(), held := new_key()):
            put_raw(store, EXACT, key)
        with catalog_of(store.path) as catalog:
            grow_old(catalog)
            catalog.touch(NS, [warm])
            for opened in catalog.lease("reader", 1, NS, [(held, PARTS[0])]):
                os.close(opened.fd)
            catalog.index.touch(NS, [held], time.time() - LONG_AGO)
            assert catalog.sweep(NS, None, 30).chunks == 1
            assert [forms_of(store, EXACT, key) for key in (cold, warm, held)] == [
                ["cachegen-lossless"] * 2, ["raw"] * 2, ["raw"] * 2
            ]  # fmt: skip
            catalog.touch(NS, [warm])
            time.sleep(1.1)  # stamps are of whole seconds
            assert catalog.sweep(NS, 0, 30).chunks == 1
            catalog.leases.drop("reader")
            assert catalog.sweep(NS, 0, 30).chunks == 1


def test_a_lossy_namespace_goes_as_far_as_was_measured(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", LOSSY) as store, catalog_of(store.path) as catalog:
        put_raw(store, LOSSY, key := new_key())
        catalog.reconcile()
        grow_old(catalog, LOSSY.ns)
        catalog.sweep(None, None, 30)
        assert forms_of(store, LOSSY, key) == ["cachegen-lossless"] * 2, "nothing has been measured"
        assert read(catalog, LOSSY, key) == exact(key)
        lossless = on_disk(store)

        gate.record(store.derived, LOSSY.ns, codec.level("medium"), {"medium": {}})
        assert catalog.sweep(None, None, 30).chunks == 1, "the next rung of the ladder"
        assert forms_of(store, LOSSY, key) == ["cachegen-medium"] * 2
        assert on_disk(store) < lossless / 2
        assert read(catalog, LOSSY, key) != exact(key)
        catalog.index.check_integrity()
        [namespace] = catalog.stats()["compaction"]["namespaces"]
        assert (namespace["level"], namespace["forced"]) == ("medium", False)

        catalog.compactor.force(LOSSY.ns, codec.level("low"))
        [namespace] = catalog.stats()["compaction"]["namespaces"]
        assert (namespace["level"], namespace["forced"]) == ("low", True)


def test_an_exact_namespace_never_loses_anything(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store, catalog_of(store.path) as catalog:
        put_raw(store, EXACT, key := new_key())
        catalog.reconcile()
        with pytest.raises(IdentityError, match="exact"):
            catalog.compactor.force(NS, codec.level("medium"))
        gate.record(store.derived, NS, codec.level("lowest"), None)  # whoever writes the file
        assert catalog.compactor.target(NS).lossless
        grow_old(catalog)
        catalog.sweep(None, None, 30)
        assert forms_of(store, EXACT, key) == ["cachegen-lossless"] * 2
        assert read(catalog, EXACT, key) == exact(key)


def test_what_the_codec_cannot_make_smaller_stays_raw(tmp_path: Path) -> None:
    noise = Manifest("aa" * 32, {}, "bfloat16", "BF16", (GroupKind("full", (0,), 1, 64, 64),))
    odd = Manifest("bb" * 32, {}, "bfloat16", "BF16", (GroupKind("full", (0,), 1, 20, 20),))
    with new_store(tmp_path / "s", noise, odd) as store, catalog_of(store.path) as catalog:
        for manifest in (noise, odd):
            put(store, new_key(), manifest=manifest)
        catalog.reconcile()
        for manifest in (noise, odd):
            grow_old(catalog, manifest.ns)
        assert catalog.sweep(None, None, 30).chunks == 2
        assert {found.coded for ns in store.namespaces() for found in store.scan(ns)} == {False}
        assert catalog.sweep(None, None, 30).chunks == 0, "tried once"
        assert not list(store.path.glob("*/tmp/*"))


def test_read_only_stores_are_left_alone(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_raw(store, EXACT, new_key())
        with catalog_of(store.path, read_only=True) as catalog, pytest.raises(StoreReadOnly):
            catalog.sweep(None, 0, 30)


def test_a_plan_tells_what_a_sweep_does(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT, LOSSY) as store:
        for manifest in ALL:
            put_raw(store, manifest, new_key())
            put_raw(store, manifest, new_key())
        with catalog_of(store.path) as catalog:
            for manifest in ALL:
                grow_old(catalog, manifest.ns)
            before = on_disk(store)
            rows = {row["ns"]: row for row in catalog.sweeper.plan(None, None)}
            forced = catalog.sweeper.plan(LOSSY.ns, None, codec.level("medium"))
            assert on_disk(store) == before
            swept = catalog.sweep(NS, None, 30)
            row = rows[EXACT.ns_hex]
            assert (row["chunks"], row["bytes"], row["level"]) == (2, swept.before, "lossless")
            assert row["saving"] == pytest.approx(swept.before - swept.after, rel=0.05)
            assert forced[0]["saving"] > 2 * rows[LOSSY.ns_hex]["saving"]


# --- heat ---


def test_heat_brings_a_chunk_back(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, key := new_key(), "lossless")
        with catalog_of(store.path, heat_hits=2, **NO_FLOOR) as catalog:
            seen: list[str] = []
            catalog.on_change(lambda event, *_: seen.append(event))
            catalog.compactor.start()
            assert read(catalog, EXACT, key) == exact(key)
            time.sleep(1.1)  # uses within one second are one
            assert read(catalog, EXACT, key) == exact(key)
            until(lambda: forms_of(store, EXACT, key) == ["cachegen-lossless"] * 2 + ["raw"] * 2)
            until(lambda: seen.count("changed") == 2)
            catalog.compactor.close()
            assert read(catalog, EXACT, key) == exact(key)
            assert catalog.metrics.snapshot()["kvfs_heated_total"] == 1
            catalog.index.check_integrity()
            assert catalog.index.totals() == (1, on_disk(store))
            coded = {f.entry.name: f.entry.inode() for f in store.scan(NS) if f.coded}
            grow_old(catalog)
            catalog.sweep(None, None, 30)  # cold again: the raw form goes, and nothing is coded anew
            assert {f.entry.name: f.entry.inode() for f in store.scan(NS)} == coded


def test_no_heat_without_room(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, key := new_key(), "lossless")
        with catalog_of(store.path, budget=Amount(2 * RAW, 0.0), **NO_FLOOR) as catalog:
            assert not catalog.compactor.bring_back(NS, key)
        with catalog_of(store.path, budget=Amount(4 * RAW, 0.0), write_budget=Amount(RAW, 0.0), **NO_FLOOR) as catalog:
            assert not catalog.compactor.bring_back(NS, key), "it would be more than may be written in a day"
        with catalog_of(store.path, budget=Amount(4 * RAW, 0.0), **NO_FLOOR) as catalog:
            assert catalog.compactor.bring_back(NS, key)


# --- pressure ---


def test_under_pressure_chunks_shrink_before_any_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder: raw, lossless, gone; those used last stay as they are."""
    monkeypatch.setattr(compact, "GRACE", 30.0)
    with new_store(tmp_path / "s", EXACT) as store:
        keys = [new_key() for _ in range(8)]
        for key in keys:
            put_raw(store, EXACT, key)
        settings = {"budget": Amount(int(16.2 * RAW), 0.0), "compact_share": 1.0, **NO_FLOOR}
        with catalog_of(store.path, **settings) as catalog:
            catalog.index.touch(NS, keys[:-1], time.time() - 2 * compact.RECENT)
            catalog.touch(NS, keys[-1:])
            catalog.compactor.start()
            try:
                until(lambda: (catalog.evictor.tick(), on_disk(store))[1] < 16.2 * RAW * 0.9)
                until(lambda: catalog.compactor.is_idle)
                assert catalog.index.totals() == (8, on_disk(store)), "none has gone"
                assert forms_of(store, EXACT, keys[-1]) == ["raw"] * 2, "too fresh"
                more = [new_key() for _ in range(8)]
                for key in more:
                    put_raw(store, EXACT, key)
                catalog.reconcile()
                catalog.touch(NS, more)  # nothing is left to compact fast enough
                until(lambda: (catalog.evictor.tick(), on_disk(store))[1] < 16.2 * RAW * 0.98)
            finally:
                catalog.compactor.close()
            catalog.index.check_integrity()
            assert catalog.index.totals() == (len({f.key for f in store.scan(NS)}), on_disk(store))
            assert set(catalog.index.page(NS, 0, 1 << 20).keys) < {*keys, *more}, "some had to go"


def test_eviction_does_not_wait_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: Logs) -> None:
    logs.claim("a coder that hangs; nothing is compacted", logging.ERROR)
    monkeypatch.setattr(compact, "GRACE", 0.3)
    with new_store(tmp_path / "s", EXACT) as store:
        for _ in range(4):
            put_raw(store, EXACT, new_key())
        stuck = threading.Event()

        def make(*_: object) -> object:
            stuck.wait(20)
            raise DaemonUnavailable(store.path, "a coder that hangs")

        config = Config(budget=Amount(int(8 * RAW * 1.01), 0.0), **NO_FLOOR)
        catalog = Catalog(store, config, Metrics(), make=make)
        grow_old(catalog)
        catalog.compactor.start()
        try:
            catalog.evictor.tick()
            assert catalog.index.totals()[0] == 4, "given a chance"
            until(lambda: (catalog.evictor.tick(), catalog.index.totals()[0])[1] < 4)
        finally:
            stuck.set()
            catalog.compactor.close()


# --- the process that codes ---


def test_the_coder_is_a_process_that_comes_last(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_raw(store, EXACT, key := new_key())
        child = Coder(store.path)
        try:
            until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "kvfs-coder\n")
            catalog = Catalog(store, Config(), Metrics(), make=child.make)
            catalog.compactor.compact(NS, key)
            assert forms_of(store, EXACT, key) == ["cachegen-lossless"] * 2
            assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == 19
            if (group := Path(f"/proc/{child.pid}/autogroup")).exists():
                assert group.read_text().split()[1:] == ["nice", "19"]
            others = {
                os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{child.pid}/fd") if fd > "2"
            }
            assert all(each.startswith(("socket:", str(store.path))) for each in others), "it holds nothing else"
            assert catalog.compactor.bring_back(NS, key)
            assert read(catalog, EXACT, key) == exact(key)

            os.kill(child.pid, signal.SIGKILL)
            grow_old(catalog)
            store.remove(NS, key, PARTS, [True])
            catalog.reconcile()
            with pytest.raises(DaemonUnavailable):
                catalog.compactor.compact(NS, key)
            assert read(catalog, EXACT, key) == exact(key)
        finally:
            child.close()
