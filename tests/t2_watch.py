"""What happens to a store behind the daemon's back reaches its index: by inotify, or else by listing."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs.daemon import watch
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.watch import Watcher
from kvfs.identity import PartId
from kvfs.store import Store
from tests.conftest import Logs
from tests.daemons import catalog_of, file_of
from tests.samples import MANIFEST, new_key, new_store, put

NS = MANIFEST.ns
WHOLE = MANIFEST.all_parts
FULL0 = PartId("full", 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The store as another process has it open."""
    with new_store(tmp_path / "store") as found:
        yield found


@pytest.fixture
def catalog(store: Store) -> Iterator[Catalog]:
    with catalog_of(store.path) as found:
        yield found
        found.index.check_integrity()


@pytest.fixture
def watcher(catalog: Catalog) -> Iterator[Watcher]:
    found = Watcher(catalog)
    found.start()
    eventually(lambda: found._next > 0)  # it has listed the store once
    yield found
    found.close()


def eventually(what: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_part_that_appears_is_found_and_one_that_vanishes_is_forgotten(
    catalog: Catalog, watcher: Watcher, store: Store
) -> None:
    key = new_key()
    put(store, key)
    begun = time.monotonic()
    eventually(lambda: catalog.lookup(NS, [key]) == [WHOLE])
    assert time.monotonic() - begun < 2.0
    assert catalog.index.totals()[1] == sum(file_of(store.path, key, part).stat().st_size for part in MANIFEST.parts)
    file_of(store.path, key, FULL0).unlink()
    eventually(lambda: catalog.lookup(NS, [key]) == [WHOLE & ~MANIFEST.bit(FULL0)])
    store.remove(NS, key, MANIFEST.parts)
    eventually(lambda: catalog.lookup(NS, [key]) == [0])


def test_own_publishing_is_not_counted_twice(catalog: Catalog, watcher: Watcher, tmp_path: Path) -> None:
    heard: list[str] = []
    catalog.on_change(lambda event, *_: heard.append(event))
    with new_store(tmp_path / "other") as other:
        for _ in range(5):
            key = new_key()
            put(other, key, FULL0)
            temp = catalog.reserve(NS, 1)
            with open(temp.fd, "wb") as f:
                f.write(file_of(other.path, key, FULL0).read_bytes())
            assert catalog.publish_file(NS, temp.name, key, FULL0)
            assert catalog.remove_chunk(NS, key)
    time.sleep(0.5)
    assert heard == ["added", "removed"] * 5
    assert catalog.index.totals() == (0, 0)


def test_a_copy_is_shown_when_it_is_whole(catalog: Catalog, watcher: Watcher, store: Store, tmp_path: Path) -> None:
    """A plain `cp` into the store: nothing while it is written, the part when it is closed."""
    key = new_key()
    with new_store(tmp_path / "other") as other:
        put(other, key, FULL0)
        data = file_of(other.path, key, FULL0).read_bytes()
    path = file_of(store.path, key, FULL0)
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as f:
        f.write(data[: len(data) // 2])
        f.flush()
        time.sleep(0.5)
        assert catalog.lookup(NS, [key]) == [0]
        f.write(data[len(data) // 2 :])
    eventually(lambda: catalog.lookup(NS, [key]) == [MANIFEST.bit(FULL0)])


def test_a_namespace_that_appears_is_found_and_one_that_is_taken_away_is_forgotten(
    catalog: Catalog, watcher: Watcher, store: Store
) -> None:
    other = MANIFEST.with_adapter("ab" * 32)
    store.register(other, {"name": "other"})
    key = new_key()
    put(store, key, manifest=other)
    eventually(lambda: other.ns in catalog.index.namespaces() and catalog.lookup(other.ns, [key]) == [WHOLE])
    heard: list[tuple[str, bytes]] = []
    catalog.on_change(lambda event, ns, *_: heard.append((event, ns)))
    store.retire(other.ns)
    eventually(lambda: other.ns not in catalog.index.namespaces())
    eventually(lambda: ("retired", other.ns) in heard)


def test_what_is_not_a_part_is_not_shown(catalog: Catalog, watcher: Watcher, store: Store) -> None:
    key = new_key()
    path = file_of(store.path, key, FULL0)
    path.parent.mkdir(exist_ok=True)
    path.write_text("not a part")
    (path.parent / "notes.txt").write_text("x")
    (store.path / "stray").mkdir()
    marker = new_key()
    put(store, marker)
    eventually(lambda: catalog.lookup(NS, [marker]) == [WHOLE])
    assert catalog.lookup(NS, [key]) == [0]


def test_a_flood_of_events_becomes_a_listing(
    catalog: Catalog, watcher: Watcher, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MAX_EVENTS", 10)
    first = watcher._next
    keys = [new_key() for _ in range(30)]
    for key in keys:
        put(store, key)
    eventually(lambda: catalog.lookup(NS, keys) == [WHOLE] * 30)
    assert watcher._next > first


@pytest.mark.parametrize("lack", ["watches", "instances"])
def test_without_inotify_the_store_is_listed(
    catalog: Catalog,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lack: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(watch, "LIST_EVERY_ALONE", 0.1)
    if lack == "watches":
        (tmp_path / "limit").write_text("0\n")
        monkeypatch.setattr(watch, "_MAX_WATCHES", tmp_path / "limit")
    else:
        monkeypatch.setattr(watch, "_MAX_WATCHES", tmp_path / "no inotify in this kernel")
    watcher = Watcher(catalog)
    with caplog.at_level("INFO", "kvfs.daemon.watch"):
        watcher.start()
        keys = [new_key(), new_key()]
        for key in keys:
            put(store, key)
            eventually(lambda key=key: catalog.lookup(NS, [key]) == [WHOLE])
        store.remove(NS, keys[0], MANIFEST.parts)
        eventually(lambda: catalog.lookup(NS, keys) == [0, WHOLE])
        watcher.close()
    assert [r.levelname for r in caplog.records if "no inotify" in r.message] == ["INFO"]


def test_a_store_that_goes_away_is_only_a_warning(
    catalog: Catalog, store: Store, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    monkeypatch.setattr(watch, "LIST_EVERY", 0.2)
    watcher = Watcher(catalog)
    watcher.start()
    eventually(lambda: watcher._next > 0)
    shutil.rmtree(store.path / MANIFEST.ns_hex)
    eventually(lambda: NS not in catalog.index.namespaces())
    watcher.close()
