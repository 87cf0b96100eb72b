"""The commands for an operator: fsck, verify --sample, quarantine, and what status tells; bare and through a mount."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from kvfs import config, errors
from kvfs.cli.main import kvfs_command
from kvfs.client import MountClient
from kvfs.daemon import control
from kvfs.identity import PartId
from kvfs.quarantine import Quarantine
from kvfs.store import Store
from tests.daemons import catalog_of, damage, file_of, serving
from tests.mounted import mounted, needs_mount, until
from tests.samples import MANIFEST, new_key, new_store, put

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NS = MANIFEST.ns
FULL0 = PartId("full", 0)
KEYS = [bytes([n] * 32) for n in range(1, 6)]
PART_BYTES = 4096 + 256 * 64 * 2 * 2


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for row in config.SETTINGS.values():
        monkeypatch.delenv(row.env, raising=False)
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv(config.ENV_FILE, str(tmp_path / "empty.toml"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store") as made:
        for key in KEYS:
            put(made, key)
        yield made


def invoke(*args: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(kvfs_command, [str(arg) for arg in args], prog_name="kvfs", **kwargs)


def answer(*args: object, code: int = 0) -> Any:
    done = invoke(*args, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------- fsck


def test_fsck_of_a_sound_store(store: Store) -> None:
    done = invoke("fsck", store.path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.fullmatch(r"20 parts, [\d.]+ MiB: nothing wrong\n", done.stdout)
    assert answer("fsck", "--at", store.path)["findings"] == []
    assert invoke("fsck", store.path, "--at", store.path).exit_code == errors.ConfigError.exit_code


def test_fsck_tells_repairs_and_exits_by_what_it_found(store: Store) -> None:
    (store.path / "notes").write_text("dear")
    dry = invoke("fsck", "--dry-run", store.path)
    assert dry.exit_code == errors.ChunkCorrupt.exit_code
    assert dry.stdout.splitlines()[0] == (
        "notes: foreign: no part: 4 bytes are too few for a header; would be moved to lost+found"
    )
    report = answer("fsck", store.path, code=errors.ChunkCorrupt.exit_code)
    [found] = report["findings"]
    assert (report["damage"], found["kind"], found["path"], found["done"], found["damage"]) == (
        1, "foreign", "notes", True, True,
    )  # fmt: skip
    assert invoke("fsck", store.path).exit_code == 0


def test_what_a_crash_leaves_is_repaired_and_no_damage(store: Store) -> None:
    temp = store.path / MANIFEST.ns_hex / "tmp" / ("a" * 32)
    temp.touch()
    os.utime(temp, (1, 1))
    done = invoke("fsck", store.path)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].endswith(": 1 findings, 0 of them damage")
    assert not temp.exists()


def test_what_cannot_be_repaired_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    temp = store.path / MANIFEST.ns_hex / "tmp" / ("a" * 32)
    temp.touch()
    os.utime(temp, (1, 1))
    monkeypatch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "not permitted")))
    done = invoke("fsck", store.path)
    assert done.exit_code == errors.KvfsError.exit_code
    assert "that failed: not permitted; could not be removed" in done.stdout


def test_fsck_data_reads_the_payload(store: Store) -> None:
    damage(file_of(store.path, KEYS[0], FULL0))
    assert invoke("fsck", store.path).exit_code == 0
    assert answer("fsck", "--data", store.path, code=4)["findings"][0]["kind"] == "checksum"


def test_fsck_of_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    assert invoke("fsck", tmp_path).exit_code == errors.NotAStore.exit_code
    assert (tmp_path / "letter").exists()


def test_fsck_of_a_store_in_use(store: Store) -> None:
    with Store.open(store.path) as daemon:
        daemon.lock_daemon("the daemon at /mnt/kv (pid 1)")
        done = invoke("fsck", store.path)
    assert done.exit_code == errors.StoreBusy.exit_code
    assert "/mnt/kv" in done.stderr
    assert "stop it" in done.stderr


# ------------------------------------------------------------------------------------------------------- sampling


def test_a_sample_is_of_the_size_asked_for_and_repeatable(store: Store) -> None:
    for sample, count in (("5", 5), ("25%", 5), ("1%", 1), ("99", 20), ("100%", 20), ("12.5%", 3), ("0", 0)):
        report = answer("verify", "--sample", sample, "--at", store.path)
        assert (report["parts"], report["of"]) == (count, 20)
    damage(file_of(store.path, KEYS[2], FULL0))
    found = {seed: seen(store, seed) for seed in range(12)}
    assert found == {seed: seen(store, seed) for seed in range(12)}
    assert set(found.values()) == {0, 1}


def seen(store: Store, seed: int) -> int:
    done = invoke("verify", "--dry-run", "--json", "--sample", "50%", "--seed", seed, "--at", store.path)
    report = json.loads(done.stdout)
    assert report["seed"] == seed
    assert done.exit_code == (errors.ChunkCorrupt.exit_code if report["damaged"] else 0)
    return len(report["damaged"])


def test_the_seed_of_a_sample_is_told(store: Store) -> None:
    out = invoke("verify", "--sample", "5", "--at", store.path).stdout
    assert re.fullmatch(r"5 parts of 20 \(seed \d+\), [\d.]+ KiB: all whole\n", out)


@pytest.mark.parametrize("sample", ["", "x", "-1", "101%", "5 %", "1e3", "%"])
def test_a_sample_that_is_none(store: Store, sample: str) -> None:
    done = invoke("verify", f"--sample={sample}", "--at", store.path)
    assert done.exit_code == errors.ConfigError.exit_code
    assert "write a number of parts" in done.stderr


# ------------------------------------------------------------------------------------------------------- quarantine


def put_away(store: Store) -> None:
    """A damaged part and something foreign, with reasons."""
    store.quarantine(NS, KEYS[0], FULL0, "checksum")
    (store.path / "notes").write_text("dear")
    assert invoke("fsck", store.path).exit_code == 4


def test_quarantine_list_and_show(store: Store) -> None:
    assert answer("quarantine", "list", "--at", store.path) == []
    put_away(store)
    part, foreign = answer("quarantine", "list", "--at", store.path)
    assert (part["reason"], part["bytes"], part["is_part"]) == ("checksum", PART_BYTES, True)
    assert (foreign["reason"], foreign["path"], foreign["bytes"], foreign["is_part"]) == ("foreign", "notes", 4, False)
    lines = invoke("quarantine", "list", "--at", store.path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["REASON", "checksum", "foreign"]
    shown = answer("quarantine", "show", KEYS[0].hex()[:8], "--at", store.path)
    assert (shown["note"]["reason"], shown["note"]["key"]) == ("checksum", KEYS[0].hex())
    assert shown["header"].startswith(f"{KEYS[0].hex()}.full.h0, 256 tokens")
    assert "detail  no part: 4 bytes" in invoke("quarantine", "show", "notes", "--at", store.path).stdout
    assert invoke("quarantine", "show", "absent", "--at", store.path).exit_code == errors.ChunkNotFound.exit_code
    assert invoke("quarantine", "show", ".", "--at", store.path).exit_code == errors.ConfigError.exit_code


def test_quarantine_purge_asks_and_spares_what_is_young(store: Store) -> None:
    put_away(store)
    assert answer("quarantine", "purge", "--older-than", "1h", "--at", store.path) == {"entries": 0, "bytes": 0}
    assert invoke("quarantine", "purge", "--at", store.path, input="n\n").exit_code == 1
    assert len(store.lost.entries()) == 2
    assert invoke("quarantine", "purge", "notes", "--at", store.path, input="y\n").exit_code == 0
    assert [entry.reason for entry in store.lost.entries()] == ["checksum"]
    done = answer("quarantine", "purge", "--yes", "--older-than", "0s", "--at", store.path)
    assert done == {"entries": 1, "bytes": PART_BYTES}
    assert os.listdir(store.path / "lost+found") == []
    done = invoke("quarantine", "purge", "--older-than", "soon", "--at", store.path)
    assert done.exit_code == errors.ConfigError.exit_code


def test_a_namespace_and_a_riddle_are_purged_too(store: Store) -> None:
    (store.path / MANIFEST.ns_hex / "manifest.json").unlink()
    invoke("fsck", store.path)
    (store.path / "lost+found" / "mine").write_text("who put this here?")
    namespace, riddle = sorted(store.lost.entries(), key=lambda entry: entry.name == "mine")
    assert (namespace.reason, riddle.reason) == ("manifest", "not recorded")
    assert namespace.size > 20 * PART_BYTES
    assert answer("quarantine", "purge", "--yes", "--at", store.path)["entries"] == 2
    assert os.listdir(store.path / "lost+found") == []


def test_damaged_parts_cannot_fill_the_disk(store: Store) -> None:
    """The oldest go, as many as are too many; nothing else goes."""
    (store.path / "notes").write_bytes(bytes(100 * PART_BYTES))
    invoke("fsck", store.path)
    limited = Quarantine(os.open(store.path, os.O_RDONLY))
    limited.limit = 10 * PART_BYTES
    keys = [new_key() for _ in range(25)]
    for n, key in enumerate(keys):
        put(store, key, FULL0)
        folder = os.open(store.path / MANIFEST.ns_hex, os.O_RDONLY)
        assert limited.take_part(folder, NS, key, FULL0, "checksum")
        os.close(folder)
        parts = [entry for entry in limited.entries() if entry.is_part]
        assert sum(entry.size for entry in parts) <= limited.limit
        assert len(parts) + limited.purged == n + 1
        assert key.hex() in parts[-1].name
    names = "".join(entry.name for entry in limited.entries())
    assert [key.hex() in names for key in keys] == [n >= limited.purged for n in range(25)]
    assert len(os.listdir(store.path / "lost+found")) == 2 * (25 - limited.purged + 1)
    assert limited.totals()[0] == len(limited.entries())
    os.close(limited._root)


def test_status_tells_of_lost_and_found(store: Store) -> None:
    put_away(store)
    assert answer("status", "--at", store.path)["lost_found"] == {"entries": 2, "bytes": PART_BYTES + 4, "purged": 0}
    assert re.search(r"lost\+found +2 entries, 68.0 KiB\n", invoke("status", "--at", store.path).stdout)


# ------------------------------------------------------------------------------------------------------- mounted


@needs_mount
def test_a_mounted_store(store: Store, mountpoint: Path) -> None:
    """The daemon has the store: fsck goes through it, lost+found is seen beside it, scrub and counts are in status."""
    damage(file_of(store.path, KEYS[1], FULL0))
    with mounted(store.path, mountpoint, logs="is damaged", scrub_rate=1 << 30):
        until(lambda: answer("status", "--at", mountpoint)["scrub"]["damaged"] == 1)
        [entry] = answer("quarantine", "list", "--at", mountpoint)
        assert (entry["reason"], KEYS[1].hex() in entry["name"]) == ("checksum", True)
        assert answer("quarantine", "purge", "--yes", "--at", mountpoint)["entries"] == 1
        status = invoke("status", "--at", mountpoint).stdout
        assert re.search(r"scrub +(first pass|every part read since .*); [\d.]+ MiB read, 1 damaged", status)
        assert "lost+found   0 entries, 0 B" in status

        assert invoke("fsck", store.path).exit_code == errors.StoreBusy.exit_code
        assert str(mountpoint) in invoke("fsck", store.path).stderr
        assert invoke("fsck", "--dry-run", "--at", mountpoint).exit_code == errors.Unsupported.exit_code
        report = answer("fsck", "--at", mountpoint)
        assert (report["damage"], report["parts"]) == (0, 19)

        damage(file_of(store.path, KEYS[3], FULL0))
        report = answer("fsck", "--data", "--at", mountpoint, code=errors.ChunkCorrupt.exit_code)
        assert [(f["kind"], f["done"]) for f in report["findings"]] == [("unreadable", True)]  # of EIO from the daemon
        assert [each["reason"] for each in answer("quarantine", "list", "--at", mountpoint)] == ["checksum"]
    assert invoke("fsck", store.path).exit_code == 0


def test_reconciling_is_for_administrators(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by a daemon of another user."""
    with catalog_of(store.path) as catalog, serving(catalog, tmp_path / "mnt"):
        put(store, new_key())
        store.remove(NS, KEYS[0], MANIFEST.parts)
        with MountClient(tmp_path / "mnt") as client:
            assert client.reconcile() == (4, 4)
            assert client.reconcile() == (0, 0)
        real = control.Peer
        monkeypatch.setattr(control, "Peer", lambda pid, _, gid: real(pid, 4711, gid))
        with MountClient(tmp_path / "mnt") as stranger, pytest.raises(errors.StoreReadOnly, match="4711"):
            stranger.reconcile()
