"""``kvfs compact``, and what ``status``, ``ls``, ``show`` and ``verify`` say of coded parts."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from kvfs.cli.main import kvfs_command
from kvfs.codec import gate
from kvfs.errors import ChunkCorrupt, ConfigError, IdentityError, StoreBusy
from kvfs.names import part_path
from kvfs.store import Store
from tests.coded import EXACT, LOSSY, PARTS, new_store, put_coded, put_raw
from tests.daemons import damage
from tests.mounted import mounted, needs_mount

if TYPE_CHECKING:
    from pathlib import Path

KEY = bytes(range(32))


def run(*words: object) -> Result:
    return CliRunner().invoke(kvfs_command, [str(word) for word in words])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with new_store(tmp_path / "s", EXACT, LOSSY) as store:
        for manifest in (EXACT, LOSSY):
            put_raw(store, manifest, KEY)
            put_raw(store, manifest, bytes(32))
    time.sleep(1.1)  # stamps are of whole seconds: what came in this one is in use
    return tmp_path / "s"


def coded(place: Path) -> list[bool]:
    with Store.open(place) as store:
        return [found.coded for ns in store.namespaces() for found in store.scan(ns)]


def test_compact_a_store_that_nobody_serves(place: Path) -> None:
    assert json.loads(run("compact", "--at", place, "--json").stdout)["done"]["chunks"] == 0, "none is cold"
    planned = json.loads(run("compact", "--now", "--dry-run", "--at", place, "--json").stdout)
    assert planned["done"] is None
    assert [(row["chunks"], row["level"]) for row in planned["planned"]] == [(2, "lossless")] * 2
    assert 0.2 < planned["planned"][0]["saving"] / planned["planned"][0]["bytes"] < 0.5
    shown = run("compact", "--now", "--dry-run", "--at", place).stdout
    assert "sample-exact" in shown
    assert "lossless" in shown
    assert coded(place) == [False] * 8
    told = run("compact", "sample-exact", "--now", "--at", place).stdout
    assert told.startswith("compacted 2 chunks, ")
    assert sum(coded(place)) == 4
    assert json.loads(run("compact", "--now", "--at", place, "--json").stdout)["done"]["chunks"] == 2
    assert all(coded(place))


def test_a_level_is_for_one_lossy_namespace(place: Path) -> None:
    assert run("compact", "--level", "medium", "--at", place).exit_code == ConfigError.exit_code
    assert run("compact", "sample-lossy", "--level", "finest", "--at", place).exit_code == ConfigError.exit_code
    assert run("compact", "sample-exact", "--level", "medium", "--at", place).exit_code == IdentityError.exit_code
    planned = run("compact", "sample-lossy", "--level", "medium", "--now", "--dry-run", "--at", place, "--json")
    [row] = json.loads(planned.stdout)["planned"]
    assert row["level"] == "medium"
    assert row["saving"] / row["bytes"] > 0.7
    with Store.open(place) as store:
        assert gate.allowed(store.derived, LOSSY.ns)[0].lossless, "a dry run decides nothing"
    assert run("compact", "sample-lossy", "--level", "medium", "--now", "--at", place).exit_code == 0
    with Store.open(place) as store:
        assert gate.allowed(store.derived, LOSSY.ns)[1], "noted as the operator's word"
    rows = json.loads(run("ls", "sample-lossy", "--at", place, "--json").stdout)
    assert {row["form"] for row in rows} == {"cachegen-medium"}


def test_a_served_store_is_left_to_its_daemon(place: Path) -> None:
    with Store.open(place) as store:
        store.lock_daemon("another")
        assert run("compact", "--now", "--at", place).exit_code == StoreBusy.exit_code


def test_what_is_shown_of_coded_parts(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, KEY, "lossless")
        size = sum(found.entry.stat().st_size for found in store.scan(EXACT.ns))
    [row] = json.loads(run("ls", "sample-exact", "--at", store.path, "--json").stdout)
    assert (row["form"], row["bytes"], row["tokens"]) == ("cachegen-lossless", size, 256)
    shown = json.loads(run("show", KEY.hex()[:8], "--at", store.path, "--json").stdout)
    assert {part["form"] for part in shown["parts"].values()} == {"cachegen-lossless"}
    assert sum(part["bytes"] for part in shown["parts"].values()) == size
    assert json.loads(run("verify", "--at", store.path, "--json").stdout)["damaged"] == []
    damage(store.path / EXACT.ns_hex / part_path(KEY, PARTS[0], coded=True))
    result = run("verify", "--at", store.path, "--json")
    assert result.exit_code == ChunkCorrupt.exit_code
    [damaged] = json.loads(result.stdout)["damaged"]
    assert (damaged["reason"], damaged["quarantined"]) == ("checksum", True)
    entry = run("quarantine", "show", KEY.hex(), "--at", store.path)
    assert f"{KEY.hex()}.full.h0, 256 tokens" in entry.stdout


@needs_mount
def test_compact_through_a_mount(place: Path, mountpoint: Path) -> None:
    with mounted(place, mountpoint) as mount:
        told = json.loads(run("compact", "sample-lossy", "--level", "medium", "--now", "--at", mount, "--json").stdout)
        assert told["done"]["chunks"] == 2
        assert told["done"]["after"] < told["done"]["before"] / 3
        status = run("status", "--at", mount).stdout
        assert "2 cachegen-medium; " in status
        assert "sample-lossy to medium, forced by the operator" in status
        rows = json.loads(run("ls", "sample-lossy", "--at", mount, "--json").stdout)
        assert {row["form"] for row in rows} == {"cachegen-medium"}
        assert sum(row["bytes"] for row in rows) == told["done"]["after"]
        assert json.loads(run("verify", "--at", mount, "--json").stdout)["damaged"] == []
