"""Budgets of stores that share a filesystem: set aside, shrunk together, and never at another's cost."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from kvfs.daemon.shares import Shares
from kvfs.errors import StoreFull
from kvfs.kinds import Amount
from tests import samples
from tests.daemons import catalog_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.daemon.catalog import Catalog

GIB = 1 << 30
DISK = 1000 * GIB


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[list[Catalog]]:
    """A store and two tenants' stores."""
    with contextlib.ExitStack() as stack:
        found = []
        for name in ("kv", "a", "b"):
            samples.new_store(tmp_path / name).close()
            found.append(
                stack.enter_context(catalog_of(tmp_path / name, budget=Amount(0, 0.9), min_free=Amount(20 * GIB, 0)))
            )
        yield found


def limits(parties: list[Catalog], free: int) -> list[int]:
    """What each may use of a disk with so much free space, in GiB."""
    found = []
    for catalog in parties:
        assert catalog.evictor.allowance is not None
        found.append(round(catalog.evictor.allowance(DISK, free) / GIB))
    return found


def test_budgets_are_set_aside_from_the_stores(parties: list[Catalog]) -> None:
    store, a, b = parties
    shares = Shares(store)
    shares.join("a", a, Amount(0, 0.1))
    shares.join("b", b, Amount(300 * GIB, 0))
    assert limits(parties, DISK) == [500, 100, 300]
    shares.join("b", b, Amount(200 * GIB, 0))
    assert limits(parties, DISK) == [600, 100, 200]
    shares.leave("b")
    assert limits([store, a], DISK) == [800, 100]
    shares.leave("a")
    assert store.evictor.allowance is None


def test_where_others_fill_the_disk_the_store_gives_way_then_all_tenants_alike(parties: list[Catalog]) -> None:
    store, a, b = parties
    shares = Shares(store)
    shares.join("a", a, Amount(100 * GIB, 0))
    shares.join("b", b, Amount(350 * GIB, 0))
    assert limits(parties, 580 * GIB) == [100, 100, 350]  # 550 beside the 30 to keep free
    assert limits(parties, 255 * GIB) == [0, 50, 175]
    assert limits(parties, 30 * GIB) == [0, 0, 0]


def test_promises_beyond_the_stores_budget_shrink_too(parties: list[Catalog]) -> None:
    store, a, b = parties
    shares = Shares(store)
    shares.join("a", a, Amount(600 * GIB, 0))
    shares.join("b", b, Amount(1200 * GIB, 0))
    assert limits(parties, DISK) == [0, 300, 600]


def test_what_one_stores_changes_nobody_elses_limit(parties: list[Catalog]) -> None:
    store, a, b = parties
    shares = Shares(store)
    shares.join("a", a, Amount(100 * GIB, 0))
    shares.join("b", b, Amount(350 * GIB, 0))
    before = limits(parties, 255 * GIB)
    samples.put(a.store, bytes(32))
    a.reconcile()
    used = a.index.totals()[1]
    assert used > 0
    assert limits(parties, 255 * GIB - used) == before


def test_one_at_its_limit_is_refused_and_evicts_its_own(parties: list[Catalog]) -> None:
    store, a, b = parties
    shares = Shares(store)
    for name, catalog in (("a", a), ("b", b)):
        for n in range(4):
            samples.put(catalog.store, bytes([n]) * 32)
        catalog.reconcile()
        shares.join(name, catalog, Amount(2 * catalog.index.totals()[1], 0))
    half = a.index.totals()[1] // 2
    shares.join("a", a, Amount(half, 0))
    with pytest.raises(StoreFull) as refused:
        a.reserve(samples.MANIFEST.ns, 1000)
    assert refused.value.reason == "budget"
    before = b.index.totals()
    for catalog in parties:
        catalog.evictor.tick()
    assert a.index.totals()[1] <= half
    assert b.index.totals() == before
    temp = b.reserve(samples.MANIFEST.ns, 1000)
    b.discard(samples.MANIFEST.ns, temp.name)
    os.close(temp.fd)
