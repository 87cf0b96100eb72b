"""The index: rows follow the tree, a snapshot is quick and disposable, a chunk costs little memory."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfs.identity import PartId
from kvfs.index import Index
from kvfs.names import part_path
from kvfs.store import Store
from kvfs.upkeep.policy import POLICIES
from tests.samples import MANIFEST, new_key, new_store, put

NS, PARTS = MANIFEST.ns, MANIFEST.parts


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with new_store(tmp_path / "store") as s:
        yield s


def test_reconcile_finds_what_appeared_and_what_vanished(store: Store) -> None:
    a, b, c = (new_key() for _ in range(3))
    put(store, a)
    put(store, b)
    index = Index(store)
    assert index.reconcile() == (8, 0)
    size = index.totals()[1]
    assert size == sum(f.entry.stat().st_size for f in store.scan(NS) if f)
    put(store, c, PARTS[0])
    store.remove(NS, a, PARTS)
    store.remove(NS, b, PARTS[:1])
    heard: list[tuple[bytes, bool]] = []
    assert index.reconcile(lambda _ns, key, _part, appeared: heard.append((key, appeared))) == (1, 5)
    assert heard.count((a, False)) == 4
    assert index.masks(NS, [a, b, c]) == [0, MANIFEST.all_parts & ~1, 1]
    index.check_integrity()


def test_a_snapshot_gives_back_every_row_and_its_history(store: Store) -> None:
    keys = [new_key() for _ in range(50)]
    for k in keys:
        put(store, k, PARTS[0])
    index = Index(store)
    index.reconcile()
    index.touch(NS, keys[:10], now=1234)
    index.discard(NS, keys[20])
    index.save()
    again = Index(store)
    assert again.load()
    again.check_integrity()
    assert [again.get(NS, k) for k in keys] == [index.get(NS, k) for k in keys]
    row = again.get(NS, keys[0])
    assert row is not None
    assert (row.hits, row.last) == (1, 1234.0)
    assert again.reconcile() == (1, 0)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped", "garbage"])
def test_a_damaged_snapshot_is_not_used(store: Store, damage: str) -> None:
    put(store, new_key())
    index = Index(store)
    index.reconcile()
    index.save()
    raw = index.snapshot_path.read_bytes()
    bad = {"empty": b"", "cut": raw[:-3], "flipped": raw[:-3] + b"?" + raw[-2:], "garbage": os.urandom(500)}
    if damage == "absent":
        index.snapshot_path.unlink()
    else:
        index.snapshot_path.write_bytes(bad[damage])
    fresh = Index(store)
    assert not fresh.load()
    assert fresh.reconcile() == (4, 0)


def test_a_retired_namespace_is_forgotten(store: Store) -> None:
    put(store, new_key())
    index = Index(store)
    index.reconcile()
    index.save()
    store.retire(NS)
    again = Index(store)
    again.load()
    again.reconcile()
    assert again.totals() == (0, 0)


def test_a_namespace_made_anew_during_a_listing_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, new_key())
    index, key, listed = Index(store), new_key(), store.namespaces
    index.reconcile()

    def meanwhile() -> list[bytes]:
        """What the store holds between a retirement and the next use, both of which come while it is listed."""
        store.retire(NS)
        index.forget(NS)
        found = listed()
        index.register(store.register(MANIFEST))
        put(store, key)
        for part in MANIFEST.parts:
            index.add(NS, key, part, 4096)
        return found

    monkeypatch.setattr(store, "namespaces", meanwhile)
    index.reconcile()
    assert index.masks(NS, [key]) == [MANIFEST.all_parts]


def test_a_namespace_that_another_process_made_anew_is_listed_as_it_is(store: Store) -> None:
    put(store, new_key())
    index, key = Index(store), new_key()
    index.reconcile()
    with Store.open(store.path) as other:
        other.retire(NS)
        other.register(MANIFEST)
        put(other, key)
    index.reconcile()
    assert index.page(NS, 0, 1 << 20).keys == [key]


def test_a_namespace_that_comes_disturbs_nobody_who_goes_through_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, other = Index(store), dataclasses.replace(MANIFEST, weights="ef" * 32)
    index.register(NS)
    store.register(other)
    thread = threading.Thread(target=lambda: index.register(other.ns))

    def meanwhile() -> list[bytes]:
        thread.start()
        thread.join(0.3)  # by then it has come, unless it has to wait
        return []

    monkeypatch.setattr(index._tables[NS], "pinned", meanwhile)
    assert index.pinned() == []
    thread.join(5)
    assert index.namespaces() == sorted([NS, other.ns])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_chunk_costs_at_most_300_bytes_of_memory(store: Store, policy: str) -> None:
    """100,000 chunks, in a process of its own: resident memory before and after."""
    code = """
import os, sys
from kvfs.store import Store
from kvfs.chunk import PartMeta
from kvfs.upkeep.policy import POLICIES
from kvfs.index import Index
from tests.samples import MANIFEST
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
index = Index(Store.open(sys.argv[1]), POLICIES[sys.argv[2]])
index.register(MANIFEST.ns)
before = rss()
parent = bytes(32)
for i in range(100_000):
    key, at = os.urandom(32), i % 20
    for part in MANIFEST.parts:
        index.add(MANIFEST.ns, key, part, 4096, PartMeta(MANIFEST.ns, key, parent, 256, at * 256, part))
    parent = key
print((rss() - before) / 100_000)
"""
    command = [sys.executable, "-c", code, store.path, policy]
    r = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert float(r.stdout) <= 300


class IndexAgainstModel(RuleBasedStateMachine):
    """Random additions and removals, against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.tmp = tempfile.TemporaryDirectory()
        self.store = new_store(Path(self.tmp.name) / "s")
        self.index = Index(self.store)
        self.index.register(NS)
        self.model: dict[bytes, dict[PartId, int]] = {}

    @rule(k=st.integers(0, 5), part=st.sampled_from(PARTS), size=st.integers(1, 10000))
    def add(self, k: int, part: PartId, size: int) -> None:
        parts = self.model.setdefault(bytes([k]) * 32, {})
        assert self.index.add(NS, bytes([k]) * 32, part, size) == (part not in parts)
        parts.setdefault(part, size)

    @rule(k=st.integers(0, 5), part=st.sampled_from([None, *PARTS]))
    def discard(self, k: int, part: PartId | None) -> None:
        key = bytes([k]) * 32
        parts = self.model.get(key, {})
        self.index.discard(NS, key, part, parts.get(part, 0) if part else 0)
        if part is None:
            parts.clear()
        parts.pop(part, None)
        if not parts:
            self.model.pop(key, None)

    @rule()
    def restart(self) -> None:
        self.index.save()
        self.index = Index(self.store)
        assert self.index.load()

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        assert self.index.totals() == (len(self.model), sum(sum(p.values()) for p in self.model.values()))
        for key, parts in self.model.items():
            assert self.index.masks(NS, [key]) == [sum(MANIFEST.bit(p) for p in parts)]

    def teardown(self) -> None:
        self.store.close()
        self.tmp.cleanup()


TestIndexAgainstModel = IndexAgainstModel.TestCase
TestIndexAgainstModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_foreign_names_in_the_tree_are_skipped(store: Store) -> None:
    key = new_key()
    put(store, key, PARTS[0])
    leaf = store.path / NS.hex() / part_path(key, PARTS[0])[:3]
    for name in (".nfs0001", "x.safetensors", key.hex() + ".full.h9.safetensors", key.hex() + ".swa512.h0"):
        (leaf / name).write_text("x")
    assert Index(store).reconcile() == (1, 0)
