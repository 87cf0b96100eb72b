"""Namespaces whose removal was cut short: the daemon finishes it, and touches nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvfs import retired
from tests.daemons import catalog_of
from tests.samples import MANIFEST, new_key, new_store, put

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store in which a namespace was about to go, and one is in use."""
    with new_store(tmp_path / "store") as store:
        put(store, new_key())
        (store.path / MANIFEST.ns_hex).rename(store.derived / retired.name_for(MANIFEST.ns_hex))
        store.register(MANIFEST)
        put(store, new_key())
    return tmp_path / "store"


def left(path: Path) -> list[str]:
    return [name for name in os.listdir(path / ".kvfs") if retired.is_retired(name)]


def test_a_daemon_removes_them(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "letter").touch()
    (path / ".kvfs" / "retired-link").symlink_to(elsewhere)
    (path / ".kvfs" / "retired-file").touch()
    with catalog_of(path) as catalog:
        assert len(left(path)) == 3
        catalog.reconcile()
        assert sorted(left(path)) == ["retired-file", "retired-link"]
        assert catalog.index.totals()[0] == 1
    assert os.listdir(elsewhere) == ["letter"]


def test_one_that_may_not_write_leaves_them(path: Path) -> None:
    with catalog_of(path, read_only=True) as catalog:
        catalog.reconcile()
    assert len(left(path)) == 1
