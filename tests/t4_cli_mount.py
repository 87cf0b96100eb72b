"""Mounting and looking through a mount, by the commands that people type."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvfs import config, errors
from kvfs.chunk import ALIGNMENT
from kvfs.cli import mounts
from kvfs.names import part_path
from kvfs.store import Store
from tests import samples
from tests.mounted import until

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(sys.executable).with_name("kvfs")
HELPER = SCRIPT.with_name("mount.kvfs")
KEY = bytes([1] * 32)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK), reason="mounting takes root and /dev/fuse"
)


def run(*args: object, limit: float = 60) -> subprocess.CompletedProcess[str]:
    words = ["timeout", "-k", "5", str(limit), *map(str, args)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVFS_") or name == "KVFS_TEST_RUN"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=env)


def kvfs(*args: object) -> subprocess.CompletedProcess[str]:
    return run(SCRIPT, *args)


def answer(*args: object) -> Any:
    done = kvfs(*args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A store with one whole chunk."""
    store = samples.new_store(tmp_path / "kv")
    samples.put(store, KEY)
    store.close()
    return tmp_path / "kv"


@pytest.fixture
def mounted(place: Path, mountpoint: Path) -> Iterator[Path]:
    done = kvfs("mount", place, mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    yield mountpoint
    if mountpoint in mounts.mounted_stores():
        assert kvfs("umount", mountpoint).returncode == 0


def test_mount_returns_when_the_mount_answers_and_umount_ends_it(place: Path, mountpoint: Path) -> None:
    assert kvfs("mount", place, mountpoint).returncode == 0
    assert (mountpoint / samples.MANIFEST.ns_hex / part_path(KEY, samples.MANIFEST.parts[0])).stat().st_size > ALIGNMENT
    assert mounts.locate(mountpoint) == (mountpoint, True)
    assert kvfs("umount", mountpoint).returncode == 0
    assert mounts.locate(mountpoint) == (mountpoint, False)
    again = kvfs("umount", mountpoint)
    assert again.returncode == errors.MountError.exit_code
    assert again.stderr.count("\n") == 1


def test_mount_refuses_with_the_reason(mounted: Path, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for args, error, says in [
        ((place, other), errors.StoreBusy, str(mounted)),
        ((tmp_path / "absent", other), errors.NotAStore, "kvfs init"),
        ((place, tmp_path / "absent"), errors.KvfsError, ""),
    ]:
        done = kvfs("mount", *args)
        assert done.returncode >= error.exit_code
        assert done.returncode != 0
        assert says in done.stderr
        assert done.stderr.startswith("kvfs: ")
        assert done.stderr.count("\n") == 1


def test_foreground_ends_at_sigterm_and_unmounts(place: Path, mountpoint: Path) -> None:
    with subprocess.Popen([SCRIPT, "mount", "-f", place, mountpoint], stderr=subprocess.DEVNULL) as daemon:
        deadline = time.monotonic() + 20
        while not mounts.locate(mountpoint)[1] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert answer("status", "--at", mountpoint)["chunks"] == 1
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
    assert not mounts.locate(mountpoint)[1]


def test_mount_8_helper(place: Path, mountpoint: Path) -> None:
    done = run(HELPER, place, mountpoint, "-o", "rw,noexec,_netdev,threads=2")
    assert (done.returncode, done.stderr) == (0, "")
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if f" {mountpoint} " in line)
    assert {"nosuid", "nodev", "noexec"} <= set(line.split(" ")[3].split(","))
    assert config.load(mountpoint / ".kvfs" / "config.toml", {}).threads == 2
    assert kvfs("umount", "-l", mountpoint).returncode == 0


def test_a_mount_and_its_store_show_the_same(mounted: Path, place: Path) -> None:
    with Store.open(place) as store:
        samples.put(store, bytes([2] * 32), *samples.MANIFEST.parts[2:], tokens=32, position=256)
    until(lambda: answer("status", "--at", mounted)["chunks"] == 2)
    assert answer("ls", "--at", mounted) == answer("ls", "--at", place)
    assert answer("ls", "sample", "--at", mounted) == answer("ls", "sample", "--at", place)
    assert kvfs("ls", "sample", "--at", mounted).stdout == kvfs("ls", "sample", "--at", place).stdout
    removed = kvfs("show", "0303", "--at", mounted)
    assert (removed.returncode, "0303" in removed.stderr) == (errors.ChunkNotFound.exit_code, True)
    assert answer("show", "0101", "--at", mounted)["parts"] == answer("show", "0101", "--at", place)["parts"]
    assert kvfs("ns", "show", "sample", "--at", mounted).stdout == kvfs("ns", "show", "sample", "--at", place).stdout
    stats = answer("status", "--at", mounted)
    assert (stats["store"], stats["chunks"]) == (str(place), 2)
    assert f"{mounted}, up " in kvfs("status", "--at", mounted).stdout


def test_uses_are_seen_through_the_mount(mounted: Path) -> None:
    from kvfs.client import connect

    manifest = samples.MANIFEST
    with connect(mount=mounted) as client, client.lease(manifest.ns, [(KEY, manifest.parts[0])], timeout=5):
        pass
    (row,) = answer("ls", "sample", "--at", mounted)
    assert row["hits"] >= 1
    assert time.time() - row["last_use"] < 60


def test_verify_through_the_mount(mounted: Path, place: Path) -> None:
    assert answer("verify", "--at", mounted)["damaged"] == []
    bad = place / samples.MANIFEST.ns_hex / part_path(KEY, samples.MANIFEST.parts[1])
    raw = bytearray(bad.read_bytes())
    raw[ALIGNMENT + 3] ^= 1
    bad.chmod(0o600)
    bad.write_bytes(raw)
    assert kvfs("verify", "--dry-run", "--at", mounted).returncode == errors.Unsupported.exit_code
    done = kvfs("verify", "--json", "--at", mounted)
    assert done.returncode == errors.ChunkCorrupt.exit_code
    (found,) = json.loads(done.stdout)["damaged"]
    assert (found["part"], found["quarantined"]) == (str(samples.MANIFEST.parts[1]), True)
    assert sum(answer("status", "--at", mounted)["quarantined"].values()) == 1


def test_retire_and_explain_through_the_mount(mounted: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(list(range(300))))
    (found,) = answer("explain", "sample", "--tokens", tokens, "--at", mounted)
    assert found["verdict"] == "miss"
    assert answer("retire", "sample", "--yes", "--at", mounted) == {"ns": samples.MANIFEST.ns_hex, "chunks": 1}
    assert answer("ls", "--at", mounted) == []


def test_the_only_mount_is_found_unasked(mounted: Path) -> None:
    if mounts.mounted_stores() != [mounted]:
        pytest.skip("this host has other mounts")
    assert len(answer("ls")) == 1


def test_status_of_a_daemon_that_hangs_is_told_soon(mounted: Path) -> None:
    daemon = daemon_of(mounted)
    os.killpg(daemon, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        done = kvfs("status", "--at", mounted)
        assert time.monotonic() - begun < 20
        assert done.returncode in {errors.DaemonUnavailable.exit_code, errors.DeadlineExceeded.exit_code}
        assert done.stderr.count("\n") == 1
    finally:
        os.killpg(daemon, signal.SIGCONT)


def daemon_of(mountpoint: Path) -> int:
    """Return the process group of a daemon, as the lock of its store tells its pid."""
    lock = next((mountpoint.parent / "kv" / ".kvfs").glob("daemon.*.lock"))
    pid = re.search(r"pid (\d+)", lock.read_text())
    assert pid
    return os.getpgid(int(pid[1]))


def test_a_reader_of_a_dead_mount_is_told(mounted: Path, place: Path) -> None:
    assert kvfs("umount", mounted).returncode == 0
    done = kvfs("status", "--at", mounted)
    assert done.returncode == errors.NotAStore.exit_code
