"""Files of a chunk change while somebody looks at them: what the index knows in the end is what is there."""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvfs.folders
import kvfs.store
from kvfs import chunk
from kvfs.daemon.catalog import Catalog
from kvfs.errors import ChunkCorrupt, ChunkNotFound
from kvfs.store import Store
from tests.conftest import Logs
from tests.daemons import catalog_of, damage, file_of
from tests.samples import MANIFEST, new_key, new_store, payload, put

NS, PARTS = MANIFEST.ns, MANIFEST.parts
PART = PARTS[0]
Go = Callable[[Catalog, bytes], None]
HEAD_START = 0.3
"""Seconds for the other, who has done it by then unless it has to wait."""


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    new_store(tmp_path / "store").close()
    with catalog_of(tmp_path / "store") as found:
        yield found
        found.index.check_integrity()


class Cut:
    """Cuts the next call of a method in two: another thread comes after what the method does, or ``before`` it, and
    before its caller goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._threads: list[threading.Thread] = []

    def __call__(self, owner: object, name: str, work: Callable[[], object], before: bool = False) -> None:
        real = getattr(owner, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self._monkeypatch.setattr(owner, name, real)
            if before:
                self._run(work)
            try:
                return real(*args, **kwargs)
            finally:
                if not before:
                    self._run(work)

        self._monkeypatch.setattr(owner, name, method)

    def _run(self, work: Callable[[], object]) -> None:
        self._threads.append(thread := threading.Thread(target=work))
        thread.start()
        thread.join(HEAD_START)

    def done(self) -> None:
        """Wait until the others have done it; at least one must have begun."""
        assert self._threads
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    return Cut(monkeypatch)


def behind(catalog: Catalog, key: bytes) -> None:
    """Store a part behind the daemon's back."""
    with Store.open(catalog.store.path) as store:
        put(store, key, PART)


def publish(catalog: Catalog, key: bytes) -> None:
    temp = catalog.reserve(NS, 100_000, key)
    meta = chunk.PartMeta(NS, key, bytes(32), 256, 0, PART)
    chunk.write_part(temp.fd, MANIFEST, meta, payload(key, PART))
    os.close(temp.fd)
    assert catalog.publish_file(NS, temp.name, key, PART)


def remove(catalog: Catalog, key: bytes) -> None:
    catalog.remove_chunk(NS, key)


def evict(catalog: Catalog, _key: bytes) -> None:
    catalog.evict(NS, 1 << 30)


def retire(catalog: Catalog, _key: bytes) -> None:
    catalog.retire(NS)
    catalog.register(MANIFEST)


@pytest.mark.parametrize("go", [remove, evict, retire])
def test_a_chunk_that_goes_while_an_event_of_it_is_looked_into_is_gone(catalog: Catalog, cut: Cut, go: Go) -> None:
    publish(catalog, key := new_key())
    cut(catalog.verifier, "peek", lambda: go(catalog, key))
    catalog.refresh(NS, key, PART)
    cut.done()
    assert catalog.lookup(NS, [key]) == [0]


def test_a_chunk_that_comes_while_an_event_of_it_is_looked_into_is_there(catalog: Catalog, cut: Cut) -> None:
    key = new_key()
    cut(catalog.verifier, "peek", lambda: publish(catalog, key))
    catalog.refresh(NS, key, PART)
    cut.done()
    assert catalog.lookup(NS, [key]) == [MANIFEST.bit(PART)]


@pytest.mark.parametrize("go", [remove, retire])
def test_a_chunk_that_goes_while_it_is_listed_is_gone(catalog: Catalog, cut: Cut, go: Go) -> None:
    behind(catalog, key := new_key())
    cut(catalog.index, "add", lambda: go(catalog, key), before=True)
    catalog.reconcile()
    cut.done()
    assert catalog.lookup(NS, [key]) == [0]


def test_a_chunk_that_comes_back_while_it_is_listed_is_there(catalog: Catalog, cut: Cut) -> None:
    publish(catalog, key := new_key())
    file_of(catalog.store.path, key, PART).unlink()
    cut(catalog.index, "discard", lambda: publish(catalog, key), before=True)
    catalog.reconcile()
    cut.done()
    assert catalog.lookup(NS, [key]) == [MANIFEST.bit(PART)]


def test_a_chunk_that_comes_back_while_a_reader_misses_it_is_there(catalog: Catalog, cut: Cut) -> None:
    publish(catalog, key := new_key())
    file_of(catalog.store.path, key, PART).unlink()
    cut(catalog.reader, "_on_lost", lambda: publish(catalog, key), before=True)
    with pytest.raises(ChunkNotFound):
        catalog.open_part(NS, key, PART)
    cut.done()
    assert catalog.lookup(NS, [key]) == [MANIFEST.bit(PART)]


def test_a_chunk_that_takes_the_place_of_a_damaged_one_is_left_alone(catalog: Catalog, cut: Cut, logs: Logs) -> None:
    publish(catalog, key := new_key())
    damage(file_of(catalog.store.path, key, PART), at=5000)

    def replace() -> None:
        assert catalog.damaged(NS, key, PART, "checksum")
        publish(catalog, key)

    cut(catalog.reader, "_on_lost", replace, before=True)
    with pytest.raises(ChunkCorrupt):
        catalog.open_part(NS, key, PART)
    cut.done()
    assert catalog.lookup(NS, [key]) == [MANIFEST.bit(PART)]
    logs.claim("is damaged")


def test_a_chunk_removed_before_its_publisher_says_so_is_gone(catalog: Catalog, cut: Cut) -> None:
    key = new_key()
    cut(catalog.admission, "admit", lambda: remove(catalog, key))
    publish(catalog, key)
    cut.done()
    assert catalog.lookup(NS, [key]) == [0]


def test_a_part_that_comes_to_the_next_victim_goes_with_it(catalog: Catalog, cut: Cut) -> None:
    publish(catalog, key := new_key())
    size = catalog.index.totals()[1]

    def second() -> None:
        with Store.open(catalog.store.path) as store:
            put(store, key, PARTS[1])
        catalog.refresh(NS, key, PARTS[1])

    cut(catalog.index, "victim", second)
    freed = catalog.evict(NS, 1)
    cut.done()
    assert (freed.chunks, freed.bytes) == (1, 2 * size)
    assert catalog.store.masks(NS, [key]) == [0]


@pytest.mark.parametrize("owner", ["index", "store"])
def test_a_namespace_that_is_retired_while_it_is_evicted_from_ends_no_round(
    catalog: Catalog, cut: Cut, owner: str
) -> None:
    other = dataclasses.replace(MANIFEST, weights="ef" * 32)
    catalog.register(other)
    publish(catalog, new_key())
    with Store.open(catalog.store.path) as store:
        put(store, key := new_key(), manifest=other)
    catalog.reconcile()
    catalog.touch(other.ns, [key])
    cut(getattr(catalog, owner), {"index": "victim", "store": "remove"}[owner], lambda: catalog.retire(NS))
    catalog.evict(None, 1 << 30)
    cut.done()
    assert catalog.index.totals() == (0, 0)


@pytest.mark.parametrize("before", [True, False])
def test_a_namespace_that_is_retired_while_it_is_registered_is_made_again(
    catalog: Catalog, cut: Cut, before: bool
) -> None:
    other = dataclasses.replace(MANIFEST, weights="ef" * 32)

    def retire() -> None:
        with Store.open(catalog.store.path) as store:
            store.retire(other.ns)

    cut(kvfs.store, "write_new", retire, before)
    catalog.register(other)
    cut.done()
    with Store.open(catalog.store.path) as store:
        assert store.manifest(other.ns) == other
        put(store, new_key(), manifest=other)


def test_retiring_leaves_no_descriptor_open_for_ever(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvfs.folders, "IN_USE", 0.0)
    publish(catalog, new_key())
    held = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        retire(catalog, b"")
        publish(catalog, new_key())
    assert len(os.listdir("/proc/self/fd")) <= held + 1
