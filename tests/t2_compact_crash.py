"""Compaction and what may come between: damage, readers, removal, and death at any point."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from kvfs import chunk, codec
from kvfs.codec import gate
from kvfs.coded import open_coded, open_stored
from kvfs.config import Config
from kvfs.daemon import coder
from kvfs.daemon.catalog import Catalog
from kvfs.errors import KvfsError
from kvfs.fsck import Fsck
from kvfs.metrics import Metrics
from kvfs.names import part_path
from kvfs.store import Store
from tests.coded import (
    EXACT,
    LOSSY,
    NO_FLOOR,
    PARTS,
    data_of,
    exact,
    forms_of,
    grow_old,
    new_store,
    on_disk,
    put_coded,
    put_raw,
    read,
)
from tests.daemons import catalog_of, damage
from tests.mounted import until
from tests.samples import new_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Logs

NS = EXACT.ns


def test_a_damaged_raw_part_is_never_replaced_by_its_code(tmp_path: Path, logs: Logs) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_raw(store, EXACT, key := new_key())
        damage(store.path / EXACT.ns_hex / part_path(key, PARTS[0]))
        with catalog_of(store.path) as catalog:
            logs.claim("damaged .checksum.")
            grow_old(catalog)
            catalog.sweep(None, None, 30)
            assert [(f.part, f.coded) for f in store.scan(NS)] == [(PARTS[1], True)]
            assert catalog.index.masks(NS, [key]) == [EXACT.bit(PARTS[1])]
            assert [entry.reason for entry in store.lost.entries()] == ["checksum"]


def test_a_damaged_coded_part_is_not_what_a_raw_one_is_retired_for(tmp_path: Path, logs: Logs) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, key := new_key(), "lossless", keep_raw=True)
        damage(store.path / EXACT.ns_hex / part_path(key, PARTS[0], coded=True))
        with catalog_of(store.path) as catalog:
            logs.claim("damaged .checksum.")
            grow_old(catalog)
            catalog.sweep(None, None, 30)
            assert read(catalog, EXACT, key) == exact(key)


def test_readers_see_the_same_bytes_while_forms_change(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_raw(store, EXACT, key := new_key())
        with catalog_of(store.path, hydrate_limit=1 << 20, **NO_FLOOR) as catalog:
            stop, wrong, reads = threading.Event(), [], []

            def reader(number: int) -> None:
                while not stop.is_set():
                    try:
                        opened = catalog.lease(number, 1, NS, [(key, part) for part in PARTS], coded=number % 2 == 0)
                    except (KvfsError, OSError) as e:
                        wrong.append(e)
                        return
                    for part, each in zip(PARTS, opened, strict=True):
                        if each.form == "raw":
                            with chunk.open_part(each.fd, EXACT, key, part) as file:
                                same = file.verify() == data_of(key, part)
                        else:
                            with open_coded(each.fd, EXACT, key, part) as coded:
                                same = coded.header.decode(coded.read()) == data_of(key, part)
                        if not same:
                            wrong.append(part)
                    catalog.leases.release(number, 1)
                    reads.append(number)

            threads = [threading.Thread(target=reader, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(10):
                seen = len(reads)
                catalog.compactor.compact(NS, key)
                until(lambda seen=seen: len(reads) > seen + 8 or wrong)
                catalog.compactor.bring_back(NS, key)
                until(lambda seen=seen: len(reads) > seen + 16 or wrong)
            stop.set()
            for thread in threads:
                thread.join(30)
            assert wrong == []
            catalog.index.check_integrity()
            assert catalog.index.totals() == (1, on_disk(store))


def test_what_is_removed_while_it_is_compacted_does_not_come_back(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_raw(store, EXACT, key := new_key())

        def make(*job: object) -> object:
            made = real(*job)
            catalog.remove_chunk(NS, key)
            return made

        catalog = Catalog(store, Config(), Metrics(), make=make)
        real = functools.partial(coder.make, store)
        catalog.compactor.compact(NS, key)
        assert list(store.scan(NS)) == []
        assert catalog.index.totals() == (0, 0)


EVENTS = ("open", "os.link", "os.remove", "os.chmod", "os.utime", "os.mkdir")


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a child that kills itself at its ``step``-th system call on files; False if it came to its
    end."""
    pid = os.fork()
    if not pid:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in EVENTS:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("kind", ["compact", "bring back", "next level"])
def test_killed_at_any_point_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    """A daemon that dies between any two calls of the filesystem leaves each part with a whole form."""
    manifest, key = (LOSSY if kind == "next level" else EXACT), new_key()
    with new_store(tmp_path / "template", manifest) as store:
        if kind == "compact":
            put_raw(store, manifest, key)
        else:
            put_coded(store, manifest, key, "lossless")
        if kind == "next level":
            gate.record(store.derived, manifest.ns, codec.level("medium"), None)
    path = tmp_path / "s"

    def work() -> None:
        with catalog_of(path, **NO_FLOOR) as catalog:
            if kind == "bring back":
                catalog.compactor.bring_back(manifest.ns, key)
            else:
                catalog.compactor.compact(manifest.ns, key)

    step, alive = 0, False
    while not alive:
        step += 2
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "template", path)
        alive = not killed_at(step, work)
        with Store.open(path) as store:
            for part in PARTS:
                with open_stored(store, manifest.ns, key, part) as file:
                    file.verify()
                    if file.header.form in ("raw", "cachegen-lossless"):
                        data = file.read() if file.header.form == "raw" else file.header.decode(file.read())
                        assert data == data_of(key, part), f"step {step}"
                    else:
                        assert kind == "next level"
        if step % 10 == 0:
            with Fsck(path) as check:
                assert [each for each in check.run() if each.is_damage] == [], f"step {step}"
            with catalog_of(path, **NO_FLOOR) as catalog:  # the next daemon goes on
                catalog.reconcile()
                grow_old(catalog, manifest.ns)
                catalog.compactor.compact(manifest.ns, key)
                catalog.index.check_integrity()
                assert catalog.index.totals() == (1, on_disk(catalog.store))
                assert len(forms_of(catalog.store, manifest, key)) == 2
    assert step > 20, "it was killed many times"
