"""The service files are what systemd takes, expose no more than they say, and leave the mount visible to the host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvfs import config
from kvfs.cli.main import kvfs_command

FOLDER = Path(__file__).parent.parent / "systemd"
UNIT = FOLDER / "kvfs@.service"
WORKER_UNIT = FOLDER / "kvfs-worker@.service"
MOUNT_UNIT = FOLDER / "mnt-kvfs.mount"
PROGRAM = Path(sys.executable).with_name("kvfs")

PRIVATE_MOUNTS = re.compile(
    r"^(Private(Tmp|Devices|Mounts|IPC)|Protect(System|Home|Kernel\w+|ControlGroups|Proc)|ProcSubset|Root\w+|DynamicUser"
    r"|(ReadOnly|ReadWrite|Inaccessible|Exec|NoExec)Paths|Bind\w*Paths|TemporaryFileSystem|MountImages|Extension\w+"
    r"|MountFlags|LogNamespace|IPCNamespacePath)=",
    re.MULTILINE,
)
"""Directives by which a service gets a mount namespace of its own (systemd.exec(5)); its mounts stay in there."""

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="takes the Debian package systemd")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=60)


def directives(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def exposure(unit: Path, limit: float) -> subprocess.CompletedProcess[str]:
    """Whether systemd finds the unit exposed to no more than ``limit`` of 10."""
    return run("systemd-analyze", "security", "--offline=true", f"--threshold={limit * 10:.0f}", unit)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    units = [tmp_path / unit.name for unit in (UNIT, WORKER_UNIT)]  # each names the other
    for unit in units:
        unit.write_text((FOLDER / unit.name).read_text().replace("/usr/bin/kvfs", str(PROGRAM)))
    for path in (*units, MOUNT_UNIT):
        done = run("systemd-analyze", "verify", path)
        assert (done.returncode, done.stderr) == (0, ""), path


def test_the_keepers_exposure() -> None:
    assert exposure(UNIT, 4.0).returncode == 0
    assert exposure(UNIT, 1.0).returncode != 0  # the check can fail


def test_the_workers_exposure() -> None:
    assert exposure(WORKER_UNIT, 1.3).returncode == 0
    assert exposure(WORKER_UNIT, 1.0).returncode != 0


def test_the_mount_is_visible_to_the_host() -> None:
    assert PRIVATE_MOUNTS.findall(UNIT.read_text()) == []
    assert PRIVATE_MOUNTS.findall("PrivateTmp=yes\nProtectKernelLogs=yes")


def test_the_unit_restarts_watches_and_keeps() -> None:
    unit = directives(UNIT)
    assert unit["Type"] == ["notify"]
    assert (unit["FileDescriptorStoreMax"], unit["RuntimeDirectoryPreserve"]) == (["131"], ["yes"])
    assert unit["WatchdogSec"] == ["30"]
    assert unit["Restart"] == ["on-failure"]
    for command in (*unit["ExecStart"], *unit["ExecReload"], *directives(WORKER_UNIT)["ExecStart"]):
        program, verb, *_ = command.split()
        assert program == "/usr/bin/kvfs"
        assert verb in kvfs_command.commands


def test_the_services_meet() -> None:
    """Where the keeper waits is where the worker looks, in a folder that the configuration makes and no mount is in."""
    keeper, worker = directives(UNIT), directives(WORKER_UNIT)
    (socket,) = re.findall(r"KVFS_WORKER_SOCKET=(\S+)", keeper["Environment"][0])
    assert worker["ExecStart"][0].split()[-1] == socket
    assert [worker["User"][0]] == re.findall(r"KVFS_WORKER_USER=(\S+)", keeper["Environment"][0])
    (mount,) = re.findall(r"KVFS_MOUNTPOINT=(\S+)", keeper["Environment"][0])
    folder = Path(socket).parent
    assert f"d {folder} 0750 root {worker['User'][0]} -" in (FOLDER / "tmpfiles.d" / "kvfs.conf").read_text()
    assert worker["BindReadOnlyPaths"] == [str(folder)]
    assert not Path(mount).is_relative_to(folder)
    assert keeper["Wants"] == [WORKER_UNIT.name.replace("@", "@%i")]
    assert (worker["BindsTo"], worker["Before"]) == ([UNIT.name.replace("@", "@%i")],) * 2


def test_every_variable_is_a_setting() -> None:
    settings = {row.env for row in config.SETTINGS.values()}
    names = re.findall(r"\b(KVFS_\w+)=", UNIT.read_text())
    assert names
    assert set(names) <= settings


def test_user_and_folders(tmp_path: Path) -> None:
    for tool in ("systemd-sysusers", "systemd-tmpfiles"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        (tmp_path / "etc" / name).write_text({"passwd": "root:x:0:0::/:/bin/sh\n", "group": "root:x:0:\n"}[name])
    done = run("systemd-sysusers", f"--root={tmp_path}", FOLDER / "sysusers.d" / "kvfs.conf")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in (tmp_path / "etc" / "passwd").read_text().splitlines() if line.startswith("kvfs:")]
    uid = int(line.split(":")[2])
    done = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", FOLDER / "tmpfiles.d" / "kvfs.conf")
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "var" / "lib" / "kvfs").stat()
    assert (made.st_uid, made.st_mode & 0o7777) == (uid, 0o750)
    assert (tmp_path / "etc" / "kvfs").is_dir()


def test_the_mount_unit_and_the_fstab_line_agree() -> None:
    unit = directives(MOUNT_UNIT)
    (where,) = unit["Where"]
    assert run("systemd-escape", "--path", "--suffix=mount", where).stdout.strip() == MOUNT_UNIT.name
    lines = (FOLDER / "fstab.example").read_text().splitlines()
    (line,) = [line.split() for line in lines if not line.startswith("#")]
    assert line[:3] == [unit["What"][0], where, unit["Type"][0]]
    assert len(line) == 6


def test_the_fstab_line_is_the_one_that_kvfs_prints(tmp_path: Path) -> None:
    lines = (FOLDER / "fstab.example").read_text().splitlines()
    (line,) = [line.split() for line in lines if not line.startswith("#")]
    settings = tmp_path / "empty.toml"
    settings.touch()
    done = run(PROGRAM, "mount", "--config", settings, "--print-fstab", "--allow-other", line[0], line[1])
    printed = done.stdout.split()
    assert printed[:3] == line[:3], done.stderr
    assert set(printed[3].split(",")) - {"rw", "_netdev"} == set(line[3].split(","))
