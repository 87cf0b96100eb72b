"""Coded parts through both clients, and what a check of the tree makes of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvfs import chunk
from kvfs.client import Client, connect
from kvfs.coded import open_coded
from kvfs.names import part_path
from tests import fscks
from tests.coded import EXACT, LOSSY, PARTS, data_of, new_store, put_coded, put_raw
from tests.daemons import catalog_of, damage, serving
from tests.samples import new_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.store import Store

NS = EXACT.ns


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store", EXACT, LOSSY) as made:
        yield made


@pytest.fixture(params=["mount", "store"])
def client(request: pytest.FixtureRequest, store: Store, tmp_path: Path) -> Iterator[Client]:
    if request.param == "store":
        with connect(store=store.path) as found:
            yield found
    else:
        mount = tmp_path / "mnt"
        with catalog_of(store.path) as catalog, serving(catalog, mount), connect(mount=mount) as found:
            yield found
            catalog.index.check_integrity()
            catalog.reader.area.close()


def test_a_lease_gives_what_its_holder_takes(client: Client, store: Store) -> None:
    both, coded = new_key(), new_key()
    put_coded(store, EXACT, both, "lossless", keep_raw=True)
    put_coded(store, EXACT, coded, "lossless")
    refs = [(key, part) for key in (both, coded) for part in PARTS]
    with client.lease(NS, refs, 10) as lease:
        assert [leased.form for leased in lease.parts] == ["raw"] * 4
        assert [leased.verified for leased in lease.parts] == [False, False, True, True], "decoding verifies"
        for leased in lease.parts:
            with chunk.open_part(os.dup(leased.fd), EXACT, leased.key, leased.part) as part:
                assert part.verify() == data_of(leased.key, leased.part)
    with client.lease(NS, refs, 10, coded=True) as lease:
        assert [leased.form for leased in lease.parts] == ["raw"] * 2 + ["cachegen-lossless"] * 2
        for leased in lease.parts[2:]:
            with open_coded(os.dup(leased.fd), EXACT, leased.key, leased.part) as file:
                assert file.header.decode(file.read()) == data_of(leased.key, leased.part)
        client.report(NS, coded, PARTS[0], None)
    with client.lease(NS, refs, 10, coded=True) as lease:
        assert [leased.verified for leased in lease.parts] == [False, False, True, False], "it has been vouched for"


def test_a_holder_reports_damage_of_a_coded_part(client: Client, store: Store, logs: object) -> None:
    put_coded(store, LOSSY, key := new_key(), "medium")
    damage(store.path / LOSSY.ns_hex / part_path(key, PARTS[0], coded=True))
    if not hasattr(client, "network"):
        logs.claim("damaged .checksum.")  # type: ignore[attr-defined]
    with client.lease(LOSSY.ns, [(key, PARTS[0])], 10, coded=True) as lease:
        assert (lease.parts[0].form, lease.parts[0].verified) == ("cachegen-medium", False)
        client.report(LOSSY.ns, key, PARTS[0], "checksum")
    assert [entry.reason for entry in store.lost.entries()] == ["checksum"]


def test_fsck_knows_coded_parts(store: Store) -> None:
    put_coded(store, EXACT, fscks.KEY, "lossless")
    put_coded(store, EXACT, fscks.OTHER, "lossless", keep_raw=True)
    assert fscks.fsck(store.path, data=True) == []
    where = f"{EXACT.ns_hex}/{part_path(fscks.KEY, PARTS[0], coded=True)}"
    path = store.path / where
    wrong = path.with_name(path.name.replace("h0.cachegen", "h0.cachegem"))
    path.rename(wrong)
    fscks.check(store.path, "misplaced", str(wrong.relative_to(store.path)), f"moved to {where}")
    damage(path)
    fscks.check(store.path, "checksum", where, "moved to lost+found", data=True)
    put_raw(store, EXACT, fscks.KEY)
    path.write_bytes(b"no part")
    path.chmod(0o440)
    found = fscks.check(store.path, "header", where, "moved to lost+found")
    assert found.is_damage
