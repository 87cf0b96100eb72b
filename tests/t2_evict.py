"""Budgets: a store stays within them, and what goes is what may go."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.config import Amount, Config
from kvfs.daemon import wear
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.wear import Wear
from kvfs.errors import ChunkNotFound, StoreFull
from kvfs.identity import PartId
from kvfs.index import Index
from kvfs.kinds import parse_budgets
from kvfs.store import Store
from kvfs.upkeep import evict
from kvfs.upkeep.evict import Evictor
from kvfs.upkeep.leases import Leases
from kvfs.upkeep.policy import POLICIES
from tests.conftest import Logs
from tests.daemons import catalog_of, file_of
from tests.samples import MANIFEST, new_key, new_store, put
from tests.small import CHUNK, NO_FLOOR, NS, PART, SMALL, budget, names, text


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store", SMALL) as found:
        yield found


@contextlib.contextmanager
def limited(store: Store, **config: object) -> Iterator[Catalog]:
    """A catalog whose evictor runs only when it is told."""
    with catalog_of(store.path, **{**NO_FLOOR, **config}) as catalog:
        yield catalog
        catalog.index.check_integrity()
        catalog.leases.check_integrity()


# --- budgets ---


def test_what_is_over_the_budget_goes_to_the_low_watermark(store: Store) -> None:
    texts = [text(store, 5) for _ in range(20)]
    with limited(store, budget=budget(80), high_watermark=0.95, low_watermark=0.75) as catalog:
        catalog.evictor.tick()
        assert catalog.index.totals() == (60, 60 * CHUNK)
        kept = names(store)
        assert len(kept) == 60
        for keys in texts:
            here = [key in kept for key in keys]
            assert here == sorted(here, reverse=True), "a parent went before its child"
        assert catalog.stats()["eviction"]["evicted"] == {"budget": 40}
        catalog.evictor.tick()
        assert catalog.index.totals()[0] == 60


def test_a_namespace_has_a_budget_of_its_own(store: Store) -> None:
    other = SMALL.with_adapter("ee" * 32)
    store.register(other, {"name": "other", "revision": "r2"})
    text(store, 30)
    text(store, 30, other)
    word = f"other@r2={10 * CHUNK}B"
    for budgets in (word, f"other={10 * CHUNK}B", f"{other.ns_hex[:12]}={10 * CHUNK}B"):
        with limited(store, namespace_budgets=parse_budgets(budgets)) as catalog:
            catalog.evictor.tick()
            assert catalog.index.totals(NS)[0] == 30
            assert catalog.index.totals(other.ns)[0] <= 10


def test_the_least_used_namespace_gives_first(store: Store) -> None:
    other = SMALL.with_adapter("ee" * 32)
    store.register(other, {"name": "other"})
    mine, theirs = text(store, 10), text(store, 10, other)
    with limited(store, budget=budget(10)) as catalog:
        catalog.index.touch(NS, mine, now=2000)
        catalog.index.touch(other.ns, theirs, now=1000)
        catalog.evictor.evict(catalog.index.namespaces(), 10 * CHUNK, "request")
    assert names(store) == set(mine)


def test_free_space_is_kept_whatever_the_budget(store: Store) -> None:
    text(store, 10)
    free = os.statvfs(store.path).f_bavail * os.statvfs(store.path).f_frsize
    with limited(store, min_free=Amount(free * 2, 0.0)) as catalog:
        with pytest.raises(StoreFull) as e:
            catalog.reserve(NS, 100)
        assert e.value.reason == "space"
        catalog.evictor.tick()
        assert catalog.index.totals() == (0, 0)
        assert catalog.stats()["eviction"]["evicted"] == {"space": 10}


# --- what stays ---


def test_leased_pinned_and_their_beginnings_stay(store: Store) -> None:
    leased, pinned, free = text(store, 3), text(store, 3), text(store, 3)
    with limited(store) as catalog:
        for opened in catalog.lease("me", 1, NS, [(leased[1], PART)]):
            os.close(opened.fd)
        catalog.pin(NS, pinned[2], True)
        assert catalog.evict(None, 1 << 40).chunks == 4
        assert names(store) == {*leased[:2], *pinned}
        catalog.leases.drop("me")
        catalog.pin(NS, pinned[2], False)
        assert catalog.evict(NS, 1 << 40).bytes == 5 * CHUNK
        assert free[0] not in names(store)
        with pytest.raises(ChunkNotFound):
            catalog.pin(NS, pinned[2], True)


def test_a_pin_survives_a_restart(store: Store) -> None:
    keys = text(store, 3)
    with limited(store) as catalog:
        catalog.evictor.tick()  # reads the headers
        catalog.pin(NS, keys[1], True)
    with limited(store) as again:
        assert again.evict(None, 1 << 40).chunks == 1
        row = again.index.get(NS, keys[1])
        assert row is not None
        assert row.pinned


def test_nothing_goes_while_holders_of_before_a_restart_may_come_back(store: Store) -> None:
    text(store, 3)
    with catalog_of(store.path, resumed=True, budget=budget(1), **NO_FLOOR) as catalog:
        catalog.evictor.tick()
        assert catalog.index.totals()[0] == 3


def test_a_hit_keeps_a_text_by_lookup_lease_and_open(store: Store) -> None:
    for way in ("lookup", "lease", "open"):
        old = [text(store, 4) for _ in range(5)]
        with limited(store) as catalog:
            catalog.reconcile()
            catalog.evictor.tick()
            for n, keys in enumerate(old):
                catalog.index.touch(NS, keys, now=1000 + n)
            if way == "lookup":
                catalog.lookup(NS, [*old[0], new_key()])
            elif way == "lease":
                os.close(catalog.lease("me", 1, NS, [(old[0][3], PART)])[0].fd)
                catalog.leases.drop("me")
            else:
                catalog.touch(NS, [old[0][3]])
            catalog.evict(None, 16 * CHUNK)
            assert names(store) == set(old[0])
            catalog.evict(None, 4 * CHUNK)


# --- what goes by itself ---


def test_what_nobody_used_for_long_goes(store: Store) -> None:
    old, new = text(store, 6), text(store, 6)
    with limited(store, ttl=3600.0) as catalog:
        catalog.evictor.tick()
        assert catalog.index.totals()[0] == 12
        catalog.index.touch(NS, old, now=time.time() - 7200)
        catalog.index.touch(NS, new[:1])
        catalog.evictor.tick()
        assert names(store) == set(new)
        assert catalog.stats()["eviction"]["evicted"] == {"ttl": 6}


def test_head_slices_without_the_others_are_reaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "PARTIAL", 0.2)
    with new_store(tmp_path / "s") as store:
        key, whole = new_key(), new_key()
        put(store, key, PartId("full", 0), PartId("swa512", 0), PartId("swa512", 1))
        put(store, whole)
        with limited(store) as catalog:
            catalog.evictor.tick()
            assert catalog.lookup(MANIFEST.ns, [key])[0].bit_count() == 3
            time.sleep(0.25)
            catalog.evictor.tick()
            masks = catalog.lookup(MANIFEST.ns, [key, whole])
            assert masks == [MANIFEST.mask_of("swa512"), MANIFEST.all_parts]
            assert not file_of(store.path, key, PartId("full", 0)).exists()
            assert catalog.index.totals()[1] == sum(f.entry.stat().st_size for f in store.scan(MANIFEST.ns) if f)


def test_a_tail_goes_when_a_longer_one_has_taken_its_place(store: Store) -> None:
    keys = text(store, 2)
    tail, longer, other = new_key(), new_key(), new_key()
    put(store, tail, manifest=SMALL, tokens=48, position=512, parent=keys[1])
    put(store, other, manifest=SMALL, tokens=64, position=512, parent=keys[1])
    with limited(store) as catalog:
        catalog.evictor.tick()
        catalog.index.touch(NS, [tail])
        catalog.lookup(NS, [new_key(), tail, new_key()])
        put(store, longer, manifest=SMALL, tokens=96, position=512, parent=keys[1])
        catalog.refresh(NS, longer, PART)
        catalog.evict(None, 1)
        assert names(store) == {*keys, longer, other}


def test_damage_met_while_reading_headers_is_put_away(store: Store, logs: Logs) -> None:
    keys = text(store, 2)
    path = store.path / NS.hex() / keys[0].hex()[:3] / f"{keys[0].hex()}.{PART}.safetensors"
    path.chmod(0o640)
    path.write_bytes(b"x" * CHUNK)
    with limited(store) as catalog:
        catalog.evictor.tick()
        logs.claim("lost.found")
        assert catalog.lookup(NS, keys) == [0, 1]
        assert catalog.evict(None, 1 << 40).chunks == 1


def test_it_runs_without_a_daemon(store: Store) -> None:
    text(store, 10)
    index = Index(store, POLICIES["lru"])
    index.reconcile()
    gone: list[str] = []
    config = Config(budget=budget(4), **NO_FLOOR)  # type: ignore[arg-type]
    evictor = Evictor(store, index, Leases(), config, lambda *what: gone.append(what[3]), lambda *_: None)
    evictor.start()
    deadline = time.monotonic() + 10
    while index.totals()[0] > 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    evictor.close()
    assert len(names(store)) == index.totals()[0] <= 4
    assert set(gone) == {"budget"}


# --- what may be written ---


def test_a_full_budget_refuses_and_says_why(store: Store) -> None:
    text(store, 4)
    with limited(store, budget=budget(4.5)) as catalog:
        kept = catalog.reserve(NS, CHUNK // 4)
        with pytest.raises(StoreFull, match="budget") as e:
            catalog.reserve(NS, CHUNK // 3)
        assert e.value.reason == "budget"
        os.close(kept.fd)
        catalog.discard(NS, kept.name)
        other = catalog.reserve(NS, CHUNK // 3)
        os.close(other.fd)
        catalog.discard(NS, other.name)
        assert catalog.stats()["eviction"]["refused"] == {"budget": 1}
        assert catalog.admission.pending == 0


def test_beyond_the_write_budget_only_the_second_offer_is_taken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wear, "AGAIN", 1)
    with limited(store, write_budget=Amount(CHUNK, 0.0)) as catalog:
        key, other = new_key(), new_key()
        catalog.wear.wrote(CHUNK)
        for _ in range(2):  # two parts of one chunk
            with pytest.raises(StoreFull, match="writes"):
                catalog.reserve(NS, 100, key)
        with pytest.raises(StoreFull):
            catalog.reserve(NS, 100)
        time.sleep(1.1)
        for _ in range(2):
            os.close(catalog.reserve(NS, 100, key).fd)
        with pytest.raises(StoreFull):
            catalog.reserve(NS, 100, other)
        eviction = catalog.stats()["eviction"]
        assert eviction["refused"] == {"writes": 4}
        assert eviction["written_day"] == eviction["write_budget"] == CHUNK
        assert 0 < eviction["drive_writes_per_day"] < 1


def test_what_was_written_is_remembered_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    first = Wear(tmp_path / "w", 100)
    first.wrote(60)
    first.save()
    again = Wear(tmp_path / "w", 100)
    assert again.today() == 60
    assert again.admits(None, 40)
    assert not again.admits(None, 41)
    monkeypatch.setattr(wear.time, "time", lambda: now + 25 * 3600)
    assert again.today() == 0
    (tmp_path / "w").write_text("[]")
    assert Wear(tmp_path / "w", None).today() == 0
