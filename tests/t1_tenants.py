"""Tenants on disk: their records, secrets and stores, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from typing import TYPE_CHECKING

import pytest

from kvfs import tenants
from kvfs.client import StoreClient
from kvfs.errors import ConfigError, TenantNotFound, Unsupported
from kvfs.fsck import Fsck
from kvfs.kinds import Amount
from kvfs.store import Store
from kvfs.tenants import Tenant
from tests import samples

if TYPE_CHECKING:
    from pathlib import Path

ALICE = Tenant("alice", 1001, 1002, 0o750, Amount(1 << 30, 0.0))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    samples.new_store(tmp_path / "kv").close()
    tenants.add(tmp_path / "kv", ALICE)
    return tmp_path / "kv"


def test_a_tenant_is_a_record_a_secret_and_a_store(store: Path) -> None:
    assert tenants.names(store) == ["alice"]
    assert tenants.load(store, "alice") == ALICE
    assert len(tenants.read_secret(store, "alice")) == 32
    assert stat.S_IMODE((store / "tenants" / "alice.secret").stat().st_mode) == 0o600
    with Store.open(store / "tenants" / "alice") as own:
        assert own.namespaces() == []
    with Store.open(store) as whole:
        assert len(whole.namespaces()) == 1


def test_each_has_a_secret_of_its_own_and_keeps_it_when_it_changes(store: Path) -> None:
    tenants.add(store, dataclasses.replace(ALICE, name="bob"))
    before = [tenants.read_secret(store, name) for name in ("alice", "bob")]
    assert len(set(before)) == 2
    changed = dataclasses.replace(ALICE, uid=7, mode=0o700, budget=Amount(0, 0.25))
    tenants.change(store, changed)
    assert tenants.load(store, "alice") == changed
    assert [tenants.read_secret(store, name) for name in ("alice", "bob")] == before


@pytest.mark.parametrize("name", ["", "A", "Alice", "1a", "a" * 33, "a/b", "..", "a.b", "a_b", "-a", "é", "a\n"])
def test_names_that_cannot_be(store: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="lower-case letter"):
        tenants.add(store, dataclasses.replace(ALICE, name=name))
    with pytest.raises(TenantNotFound):
        tenants.load(store, name)


def test_the_longest_name_fits_into_the_table_of_nodes() -> None:
    from kvfs.daemon.fuse.nodes import MAX_PATH
    from kvfs.daemon.tree import path_of, tenant_path
    from kvfs.identity import PartId

    name, part = "a" * 32, PartId("chunked9999999", 63)
    assert tenants.is_name(name)
    assert len(tenant_path(name, path_of(bytes(32), bytes(32), part))) <= MAX_PATH


def test_there_can_be_one_of_a_name_and_not_too_many(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="already; `kvfs tenant set alice`"):
        tenants.add(store, ALICE)
    monkeypatch.setattr(tenants, "MAX_TENANTS", 1)
    with pytest.raises(ConfigError, match="more than 1"):
        tenants.add(store, dataclasses.replace(ALICE, name="bob"))


def test_unknown_ones_are_told_with_the_nearest_name(store: Path) -> None:
    for do in (tenants.check, tenants.load):
        with pytest.raises(TenantNotFound, match="no tenant alise; the nearest name is alice"):
            do(store, "alise")
    with pytest.raises(TenantNotFound):
        tenants.forget(store, "bob")


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        json.dumps({"format": "kvfs-tenant/2", "uid": 1, "gid": 1, "mode": "0750", "budget": "1GiB"}),
        json.dumps({"format": "kvfs-tenant/1", "uid": -1, "gid": 1, "mode": "0750", "budget": "1GiB"}),
        json.dumps({"format": "kvfs-tenant/1", "uid": 1, "gid": 1 << 32, "mode": "0750", "budget": "1GiB"}),
        json.dumps({"format": "kvfs-tenant/1", "uid": 1, "gid": 1, "mode": "0777", "budget": "1GiB"}),
        json.dumps({"format": "kvfs-tenant/1", "uid": 1, "gid": 1, "mode": "0750", "budget": "lots"}),
        "[" * 100_000,
    ],
)
def test_damaged_records_are_refused(store: Path, record: str) -> None:
    (store / "tenants" / "alice.json").write_text(record)
    with pytest.raises(ConfigError, match=r"alice\.json cannot be used .*kvfs tenant set alice"):
        tenants.load(store, "alice")


def test_links_are_not_followed(store: Path, tmp_path: Path) -> None:
    for name in ("alice.json", "alice.secret"):
        path = store / "tenants" / name
        path.rename(tmp_path / name)
        path.symlink_to(tmp_path / name)
    with pytest.raises(TenantNotFound):
        tenants.load(store, "alice")
    with pytest.raises(ConfigError):
        tenants.read_secret(store, "alice")


def test_what_a_removed_tenant_had_is_gone_for_the_next_of_its_name(store: Path) -> None:
    home, secret = tenants.place(store, "alice"), tenants.read_secret(store, "alice")
    with Store.open(home) as own:
        own.register(samples.MANIFEST)
        samples.put(own, bytes(32))
    tenants.forget(store, "alice")  # and its remover dies
    assert tenants.names(store) == []
    tenants.add(store, ALICE)
    with Store.open(home) as own:
        assert own.namespaces() == []
    assert tenants.read_secret(store, "alice") != secret
    tenants.forget(store, "alice")
    tenants.clear(store, "alice")
    assert os.listdir(store / "tenants") == []
    assert os.listdir(store / ".kvfs") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_what_root_makes_belongs_to_the_owner_of_the_store(store: Path) -> None:
    os.chown(store, 990, 991)
    tenants.add(store, dataclasses.replace(ALICE, name="bob"))
    made = [store / "tenants", *(store / "tenants").glob("bob*"), *(store / "tenants" / "bob").rglob("*")]
    assert len(made) > 4
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(990, 991)}


def test_without_a_daemon_nobody_uses_a_tenants_store(store: Path) -> None:
    with StoreClient(tenants.place(store, "alice")) as client:
        with pytest.raises(Unsupported, match="tenant alice without a daemon"):
            client.register(samples.MANIFEST)
        with pytest.raises(Unsupported, match="tenant alice without a daemon"):
            client.salts()
    with StoreClient(store) as client:
        assert client.salts() == (b"", b"")
        assert client.register(samples.MANIFEST) == samples.MANIFEST.ns
        assert [row["name"] for row in client.stats()["tenants"]] == ["alice"]


# ---------------------------------------------------------------------------------------------------------------- fsck


def findings(store: Path, **options: bool) -> set[tuple[str, str]]:
    with Fsck(store, **options) as check:
        return {(each.kind, each.path) for each in check.run()}


def test_fsck_finds_nothing_wrong_with_sound_tenants_and_counts_their_parts(store: Path) -> None:
    with Store.open(tenants.place(store, "alice")) as own:
        own.register(samples.MANIFEST)
        samples.put(own, bytes(32))
    with Fsck(store, data=True) as check:
        assert list(check.run()) == []
        assert check.parts == 4


def test_fsck_repairs_a_tenants_store_as_any_other(store: Path) -> None:
    with Store.open(tenants.place(store, "alice")) as own:
        own.register(samples.MANIFEST)
    (tenants.place(store, "alice") / "stray").write_text("?")
    assert findings(store, dry_run=True) == {("foreign", "tenants/alice/stray")}
    assert findings(store) == {("foreign", "tenants/alice/stray")}
    assert len(list((tenants.place(store, "alice") / "lost+found").glob("stray.*.json"))) == 1
    assert findings(store) == set()


def test_fsck_knows_what_belongs_beside_tenants(store: Path) -> None:
    folder = store / "tenants"
    (folder / "alice.secret").chmod(0o644)
    (folder / "Bob").mkdir()
    (folder / "carol.secret").write_bytes(bytes(32))
    (folder / "dave").mkdir()
    (folder / "erin.json").mkdir()
    (folder / ("0" * 32)).write_text("half")
    os.utime(folder / ("0" * 32), (0, 0))
    wanted = {
        ("mode", "tenants/alice.secret"),
        ("foreign", "tenants/Bob"),
        ("retired", "tenants/carol.secret"),
        ("tenant", "tenants/dave"),
        ("foreign", "tenants/erin.json"),
        ("temp", f"tenants/{'0' * 32}"),
    }
    assert {f for f in findings(store, dry_run=True) if "erin." not in f[1]} == {
        f for f in wanted if "erin." not in f[1]
    }
    assert findings(store) >= wanted
    assert sorted(os.listdir(folder)) == ["alice", "alice.json", "alice.secret"]
    assert findings(store) == set()


def test_fsck_makes_lost_secrets_and_stores_anew_and_tells_of_records(store: Path) -> None:
    secret = tenants.read_secret(store, "alice")
    (store / "tenants" / "alice.secret").write_bytes(b"short")
    (store / "tenants" / "alice").rename(store.parent / "aside")
    assert findings(store) == {("tenant", "tenants/alice.secret"), ("tenant", "tenants/alice")}
    assert tenants.read_secret(store, "alice") != secret
    Store.open(tenants.place(store, "alice")).close()
    (store / "tenants" / "alice.json").write_text("?")
    assert findings(store) == {("tenant", "tenants/alice.json")}
