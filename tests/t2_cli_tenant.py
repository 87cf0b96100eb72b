"""``kvfs tenant`` on a store that nobody serves; what a live daemon does is in t4_tenants."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from kvfs import errors, tenants
from kvfs.cli.main import kvfs_command
from kvfs.store import Store
from tests import samples

if TYPE_CHECKING:
    from pathlib import Path


def run(*words: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(kvfs_command, [str(word) for word in words], input=answer)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFS_CONFIG", str(tmp_path / "kvfs.toml"))
    (tmp_path / "kvfs.toml").write_text('budget = "1GiB"\n')
    samples.new_store(tmp_path / "kv").close()
    return tmp_path / "kv"


def add(store: Path, name: str = "alice", *more: object) -> Result:
    return run("tenant", "add", name, "--uid", 4711, "--budget", "100MiB", "--at", store, *more)


def test_add_list_set_and_remove(store: Path) -> None:
    told = json.loads(add(store, "alice", "--mode", "700", "--json").stdout)
    assert told == {"name": "alice", "uid": 4711, "gid": 4711, "mode": "0700", "budget": "100MiB"}
    assert "tenants/bob into its containers" in add(store, "bob", "--gid", "12").stdout
    with Store.open(tenants.place(store, "bob")) as own:
        own.register(samples.MANIFEST)
        samples.put(own, bytes(32))
    rows = json.loads(run("tenant", "list", "--at", store, "--json").stdout)
    assert [(row["name"], row["gid"], row["chunks"]) for row in rows] == [("alice", 4711, 0), ("bob", 12, 1)]
    assert rows[1]["bytes"] > 100_000
    assert run("tenant", "list", "--at", store).stdout.splitlines()[2].split()[:4] == ["bob", "4711", "12", "0750"]
    changed = run("tenant", "set", "bob", "--uid", 4712, "--budget", "0%", "--at", store)
    assert (changed.exit_code, changed.stdout) == (0, "bob is changed\n")
    bob = tenants.load(store, "bob")
    assert (bob.uid, bob.gid, bob.mode, bob.budget) == (4712, 4712, 0o750, (0, 0.0))
    assert run("tenant", "rm", "bob", "--at", store, answer="n\n").exit_code == 1
    assert tenants.names(store) == ["alice", "bob"]
    assert run("tenant", "rm", "bob", "--at", store, answer="y\n").exit_code == 0
    assert json.loads(run("tenant", "rm", "alice", "-y", "--at", store, "--json").stdout) == {"name": "alice"}
    assert os.listdir(store / "tenants") == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["add", "Alice", "--uid", "1", "--budget", "1MiB"], "lower-case letter"),
        (["add", "bob", "--budget", "1MiB"], "--uid USER --budget SIZE"),
        (["add", "bob", "--uid", "1"], "--uid USER --budget SIZE"),
        (["add", "alice", "--uid", "1", "--budget", "1MiB"], "kvfs tenant set alice"),
        (["add", "bob", "--uid", "no-such-user", "--budget", "1MiB"], "there is no such user"),
        (["add", "bob", "--uid", "1", "--gid", "staff", "--budget", "1MiB"], "write the number of a group"),
        (["add", "bob", "--uid", "1", "--budget", "much"], "write a size such as 500GiB"),
        (["add", "bob", "--uid", "1", "--budget", "1MiB", "--mode", "0777"], "one of 0700, 0750"),
        (["add", "bob", "--uid", "1", "--budget", "950MiB"], "924 MiB of the store's 1.0 GiB are left"),
        (["set", "alice", "--budget", "1025MiB"], "1.0 GiB of the store's 1.0 GiB are left"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(store: Path, words: list[str], complaint: str) -> None:
    add(store)
    before = tenants.load(store, "alice")
    done = run("tenant", *words, "--at", store)
    assert done.exit_code == errors.ConfigError.exit_code
    assert complaint in done.stderr
    assert [tenants.load(store, name) for name in tenants.names(store)] == [before]


@pytest.mark.parametrize("words", [["set", "alise", "--budget", "1MiB"], ["rm", "alise", "-y"]])
def test_unknown_tenants_are_named_with_the_nearest(store: Path, words: list[str]) -> None:
    add(store)
    done = run("tenant", *words, "--at", store)
    assert done.exit_code == errors.TenantNotFound.exit_code
    assert "the nearest name is alice" in done.stderr


def test_a_damaged_record_is_written_anew_by_all_options(store: Path) -> None:
    add(store)
    (store / "tenants" / "alice.json").write_text("?")
    done = run("tenant", "set", "alice", "--budget", "1MiB", "--at", store)
    assert "kvfs tenant set alice" in done.stderr
    words = ["--uid", "1", "--gid", "2", "--mode", "0700", "--budget", "1MiB"]
    assert run("tenant", "set", "alice", *words, "--at", store).exit_code == 0
    assert (tenants.load(store, "alice").uid, tenants.load(store, "alice").gid) == (1, 2)


def test_a_tenant_has_no_tenants(store: Path) -> None:
    add(store)
    done = add(tenants.place(store, "alice"), "bob")
    assert done.exit_code == errors.ConfigError.exit_code
    assert "that of tenant alice" in done.stderr


def test_other_commands_know_tenants(store: Path) -> None:
    add(store)
    home = tenants.place(store, "alice")
    with Store.open(home) as own:
        own.register(samples.MANIFEST, {"name": "hers"})
        samples.put(own, bytes(32))
    assert "tenant alice" in run("status", "--at", store).stdout
    assert "hers" in run("ls", "--at", home).stdout
    assert "hers" not in run("ls", "--at", store).stdout
    assert "all whole" in run("verify", "--at", home).stdout
    assert "nothing wrong" in run("fsck", store).stdout
    assert run("quarantine", "list", "--at", home).exit_code == 0
    assert "1 chunks" in run("evict", "1GiB", "--at", home).stdout
    assert "tenants" in run("doctor", store).stdout
