"""kvfs under a real systemd: keeper and worker as two services, each with its sandbox, dying in every way."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import samples
from tests.booted import PROGRAM, Host, booted, needs_systemd
from tests.mounted import place, until
from tests.t4_mount_restart import KEYS, PARTS, READER

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_systemd

KEEPER, WORKER = "kvfs@main", "kvfs-worker@main"
MOUNT = "/run/kvfs/main/mnt"
COPY = "cp -r /opt/given/kv /var/lib/kvfs/main && chown -R kvfs: /var/lib/kvfs/main"
CONFIG = "echo 'store = \"/var/lib/kvfs/main\"' >/etc/kvfs/main.toml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with a store and a configuration."""
    work = tmp_path_factory.mktemp("host")
    with samples.new_store(work / "kv") as store:
        for key in KEYS:
            samples.put(store, key)
    with booted(work) as host:
        host.output("sh", "-c", f"{COPY} && {CONFIG}")
        yield host
        failed = [line for line in host.log().splitlines() if re.search(r" ERROR |Traceback", line)]
        assert not [line for line in failed if "has been silent" not in line]


@pytest.fixture
def host(installed: Host) -> Host:
    """The same with the store mounted."""
    installed.output("systemctl", "start", KEEPER)
    return installed


def pid(host: Host, unit: str) -> int:
    """The main process of a service; 0 if there is none."""
    return int(host.show(unit, "MainPID")[0])


def signal(host: Host, unit: str, name: str) -> None:
    host.output("systemctl", "kill", f"--signal={name}", unit)


def next_process(host: Host, unit: str, old: int) -> None:
    """Wait until another process is that service's."""
    until(lambda: pid(host, unit) not in {0, old})


def part(number: int, root: str = MOUNT) -> Path:
    """One of the store's parts, by default in the mount."""
    return place(Path(root), KEYS[number], PARTS[0])


@contextlib.contextmanager
def reading(host: Host) -> Iterator[None]:
    """A process in there that reads and maps without pause; it must have seen no error and the right bytes only."""
    host.output("rm", "-f", "/run/stop")
    names = [part(number) for number in (0, 1)]
    command = host.command("env", "STOP=/run/stop", PROGRAM, "-c", READER, *names)
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        host.output("touch", "/run/stop")
        said, complained = reader.communicate(timeout=60)
    assert (reader.returncode, complained) == (0, "")
    assert int(said.split()[1]) > 0


def status(host: Host, unit: str) -> dict[str, str]:
    """What the kernel says of a service's main process."""
    return dict(re.findall(r"^(\w+):\s*(.*)$", host.output("cat", f"/proc/{pid(host, unit)}/status"), re.MULTILINE))


def test_the_worker_has_no_rights_and_the_keeper_three(host: Host) -> None:
    uid = host.output("id", "-u", "kvfs").strip()
    worker, keeper = status(host, WORKER), status(host, KEEPER)
    assert set(worker["Uid"].split()) == {uid}
    assert {worker[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb", "CapInh")} == {"0" * 16}
    assert int(keeper["CapBnd"], 16).bit_count() == 3
    for process in (worker, keeper):
        assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
    assert "no Landlock" not in host.log()
    seen = host.output("nsenter", f"--target={pid(host, WORKER)}", "--mount", "ls", "/run", "/dev").split()
    assert "kvfs-worker" in seen
    assert not {"kvfs", "fuse"} & set(seen)  # neither the mount nor the device


def test_a_sandboxed_worker_serves(host: Host) -> None:
    """Reads, copies into the mount, removals, the control socket, the process that codes parts."""
    host.output("cmp", part(0), part(0, "/opt/given/kv"))
    host.output("rm", part(7))
    host.output("cp", part(7, "/opt/given/kv"), part(7))
    assert samples.MANIFEST.ns_hex in host.output("kvfs", "status", "--at", MOUNT, "--json")
    assert "compacted" in host.output("kvfs", "compact", "--at", MOUNT, "--now")  # by a child of its own


def test_a_killed_worker_is_not_noticed(host: Host) -> None:
    with reading(host):
        for _ in range(3):
            worker = pid(host, WORKER)
            signal(host, WORKER, "SIGKILL")
            assert host.output("stat", "-c", "%F", part(5)) == "regular file\n"
            next_process(host, WORKER, worker)
    assert pid(host, KEEPER)


@pytest.mark.slow
def test_a_stopped_worker_is_killed(host: Host) -> None:
    worker = pid(host, WORKER)
    signal(host, WORKER, "SIGSTOP")
    assert host.output("stat", "-c", "%F", part(6)) == "regular file\n"  # waits for the next one
    assert pid(host, WORKER) != worker
    assert "has been silent" in host.log()


@pytest.mark.parametrize("how", [("reload", KEEPER), ("restart", WORKER)])
def test_a_fresh_worker_takes_over(host: Host, how: tuple[str, str]) -> None:
    worker, keeper = pid(host, WORKER), pid(host, KEEPER)
    with reading(host):
        host.output("systemctl", *how)
        next_process(host, WORKER, worker)
        assert host.output("stat", "-c", "%F", part(5)) == "regular file\n"
    assert pid(host, KEEPER) == keeper
    assert "died" not in host.log().rpartition("has left")[2]


def test_a_killed_keeper_is_not_noticed(host: Host) -> None:
    host.output("kvfs", "tenant", "add", "alice", "--uid", "nobody", "--budget", "1MiB", "--at", MOUNT)
    until(lambda: host.run("kvfs", "status", "--at", f"{MOUNT}/tenants/alice").returncode == 0)
    keeper, there = pid(host, KEEPER), host.output("stat", "-f", "-c", "%i", MOUNT)
    with reading(host):
        signal(host, KEEPER, "SIGKILL")
        next_process(host, KEEPER, keeper)
        assert not host.output("cmp", part(3), part(3, "/opt/given/kv"))
    assert host.output("stat", "-f", "-c", "%i", MOUNT) == there
    until(lambda: host.show(KEEPER, "ActiveState") == ["active"])
    assert "alice" in host.output("kvfs", "status", "--at", f"{MOUNT}/tenants/alice")  # its socket was kept too


@pytest.mark.parametrize("how", [("systemctl", "stop", KEEPER), ("kvfs", "umount", MOUNT)])
def test_both_end_together(host: Host, how: tuple[str, ...]) -> None:
    host.output(*how)
    for unit in (KEEPER, WORKER):
        until(lambda unit=unit: host.show(unit, "ActiveState", "Result") == ["inactive", "success"])
    assert host.run("mountpoint", MOUNT).returncode != 0
    assert "index" in host.output("ls", "/var/lib/kvfs/main/.kvfs")


def test_restarted_it_serves_again(host: Host) -> None:
    keeper, worker = pid(host, KEEPER), pid(host, WORKER)
    host.output("systemctl", "restart", KEEPER)
    assert {keeper, worker}.isdisjoint({pid(host, KEEPER), pid(host, WORKER)})
    assert not host.output("cmp", part(2), part(2, "/opt/given/kv"))
