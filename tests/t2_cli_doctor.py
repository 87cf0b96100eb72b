"""``kvfs doctor``: what it finds on this host, as root and without rights, and on folders of several kinds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvfs import config
from kvfs.cli import doctor, mounts, nfs
from kvfs.cli.main import kvfs_command
from tests import samples

AS_NOBODY = """
import ctypes, json, os, sys
from pathlib import Path
from kvfs.cli import doctor, mounts
from kvfs.daemon.fuse import libfuse
os.setgroups([])
os.setresuid(65534, 65534, 65534)
findings = [doctor.capability(), doctor.fuse_device(), *doctor.store_findings(Path(sys.argv[1]))]
print(json.dumps({each.topic: [each.level, each.detail, each.fix] for each in findings}))
"""


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for row in config.SETTINGS.values():
        monkeypatch.delenv(row.env, raising=False)
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv(config.ENV_FILE, str(tmp_path / "empty.toml"))


def invoke(*args: object) -> Result:
    return CliRunner().invoke(kvfs_command, ["doctor", *map(str, args)], prog_name="kvfs")


def findings(*args: object) -> dict[str, dict[str, Any]]:
    return {each["topic"]: each for each in json.loads(invoke(*args, "--json").stdout)}


def test_every_topic_has_a_line_and_every_warning_a_fix(tmp_path: Path) -> None:
    samples.new_store(tmp_path / "kv").close()
    found = findings(tmp_path / "kv")
    host = {"kernel", "/dev/fuse", "capability", "libfuse", "native code", "vLLM", "GPU"}
    assert host | {"store", "free space", "filesystem"} <= set(found)
    for each in found.values():
        assert each["level"] in {"OK", "WARN", "FAIL"}
        assert bool(each["fix"]) == (each["level"] != "OK")
    text = invoke(tmp_path / "kv").stdout
    assert [line.split()[0] for line in text.splitlines() if "→" not in line] == [e["level"] for e in found.values()]
    assert "\x1b" not in text


def test_the_exit_code_tells_of_a_failure(tmp_path: Path) -> None:
    failed = [each for each in findings(tmp_path).values() if each["level"] == "FAIL"]
    assert invoke(tmp_path).exit_code == bool(failed)
    done = invoke(tmp_path / "absent")
    assert done.exit_code == 1
    assert f"→ kvfs init {tmp_path}/absent" in done.stdout


def test_a_folder_that_is_no_store_yet(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert (found["store"]["level"], found["store"]["fix"]) == ("WARN", f"kvfs init {tmp_path}")


def test_the_configured_store_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings()["store"]["level"] == "WARN"
    samples.new_store(tmp_path / "kv").close()
    monkeypatch.setenv("KVFS_STORE", str(tmp_path / "kv"))
    assert findings()["store"]["detail"] == str(tmp_path / "kv")


def test_memory_is_named_as_such() -> None:
    if not os.access("/dev/shm", os.W_OK) or mounts.filesystem_of(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs to look at")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvfs-") as folder:
        found = findings(folder)["filesystem"]
        assert found["level"] == "WARN"
        assert "gone after a restart" in found["detail"]
        assert not list(Path(folder).iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_rights(tmp_path: Path) -> None:
    samples.new_store(tmp_path / "kv").close()
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "kv").chmod(0o755)
    command = [sys.executable, "-c", AS_NOBODY, tmp_path / "kv"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert found["capability"][0] == "WARN"
    assert "fusermount3" in found["capability"][1]
    assert found["filesystem"][0] == "WARN"
    assert "not writable" in found["filesystem"][1]
    assert "--read-only" in found["filesystem"][2]


@pytest.mark.parametrize(("text", "numbers"), [("6.18.44-fc", (6, 18)), ("0.32.0+cpu", (0, 32)), ("7", (7,))])
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert doctor.version(text) == numbers


TABLE = """\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:40 / /srv rw - nfs4 host:/a rw,vers=4.2,hard,lookupcache=pos,proto=tcp
3 1 0:41 / /srv/b\\040c rw - nfs4 host:/b rw,vers=3,soft,nocto,local_lock=all
4 1 0:42 / /srvx rw - nfs4 host:/c rw,vers=4.1,hard,noac
"""


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("/srv/kv", []),
        ("/srvx", []),
        ("/srv/b c/kv", ["lookupcache=pos", "soft", "nocto", "locks are local", "old version"]),
    ],
)
def test_options_of_nfs(folder: str, words: list[str]) -> None:
    options = nfs.options_of(Path(folder), TABLE)
    assert options is not None
    found = nfs.wrong(options)
    assert [word in why for word, why in zip(words, found, strict=True)] == [True] * len(words)


def test_a_local_disk_has_no_options_of_nfs() -> None:
    assert nfs.options_of(Path("/var/kv"), TABLE) is None
