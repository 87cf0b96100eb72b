"""Containers: the files name what exists, and what they rely on holds: a mount made again reaches a live container."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from kvfs import config
from kvfs.cli.main import kvfs_command
from kvfs.cli.setup import vllm_config
from kvfs.daemon import keeper
from kvfs.daemon.fuse import connection
from kvfs.store import Store
from tests import samples
from tests.mounted import mounted, needs_mount, place, processes, until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "containers"
SETTINGS = {row.env: row for row in config.SETTINGS.values()}
OWN = {"kvfs", "kvfs-entrypoint"}
TOOLS = {"apt-get", "chown", "exec", "groupadd", "mkdir", "pip", "rm", "set", "setpriv", "useradd"}
"""What both base images have."""

KEYS = [bytes([i]) * 32 for i in range(1, 4)]
PART = samples.MANIFEST.parts[0]


# ---------------------------------------------------------------------------------------------------------- the files


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order, with their lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def commands(shell: str) -> list[list[str]]:
    """The simple commands of a line of shell."""
    return [shlex.split(each) for each in re.split(r"&&|\|\||;", shell) if each.strip()]


def test_what_the_dockerfile_copies_is_there() -> None:
    stages = {words.rpartition(" AS ")[2] for name, words in instructions() if name == "FROM"}
    assert stages == {"build", "daemon", "engine"}
    allowed = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert all((ROOT / path).exists() for path in allowed)
    for name, words in instructions():
        if name == "COPY":
            *flags, source, _ = words.split()
            if flags:
                assert flags[0].removeprefix("--from=") in stages
            else:
                assert (ROOT / source).exists()
                assert source == "." or source in allowed


def test_the_image_is_built_from_all_that_the_package_is() -> None:
    """Behind kvfs/ there are links; without what they lead to the package would be empty."""
    allowed = (FOLDER / "Dockerfile.dockerignore").read_text()
    for link in (path for path in (ROOT / "kvfs").iterdir() if path.is_symlink()):
        assert f"!{link.resolve().name}\n" in allowed
    for word in re.findall(r"^(?:include|recursive-include) (.*)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE):
        for name in word.split():
            assert name in {"*", "containers"} or f"!{name}\n" in allowed


def test_every_command_exists() -> None:
    named: list[list[str]] = []
    for name, words in instructions():
        if name == "RUN":
            named += commands(words)
        elif name in {"ENTRYPOINT", "HEALTHCHECK"}:
            named.append(json.loads(words[words.index("[") :]))
    script = (FOLDER / "entrypoint").read_text()
    assert os.access(FOLDER / "entrypoint", os.X_OK)
    assert subprocess.run(["sh", "-n", FOLDER / "entrypoint"], check=False).returncode == 0
    for line in script.splitlines():
        named += commands(re.sub(r"#.*|\d?>\S+", "", line))
    for pod in (read("daemonset.yaml")["spec"]["template"]["spec"], read("engine-pod.yaml")["spec"]):
        for container in pod["containers"]:
            named += [
                container[probe]["exec"]["command"]
                for probe in ("startupProbe", "readinessProbe")
                if probe in container
            ]
    for words in named:
        program = Path(words[0]).name
        assert program in OWN | TOOLS | {"true"}, words
        for at in (i for i, word in enumerate(words) if word == "kvfs" and program in {"kvfs", "exec", "setpriv"}):
            if words[at - 1] not in {"--reuid", "--regid"}:
                assert words[at + 1] in kvfs_command.commands, words


def test_every_variable_is_a_setting_with_a_value_that_it_takes() -> None:
    given = dict(pair.split("=") for name, words in instructions() if name == "ENV" for pair in words.split())
    for container in read("daemonset.yaml")["spec"]["template"]["spec"]["containers"]:
        given |= {each["name"]: each["value"] for each in container.get("env", [])}
    assert {"KVFS_STORE", "KVFS_MOUNTPOINT", "KVFS_WORKER_USER"} <= given.keys()
    for name, value in given.items():
        SETTINGS[name].kind.parse(value)
    used = set(re.findall(r"\$(KVFS_\w+)", (FOLDER / "entrypoint").read_text()))
    assert used <= given.keys()


def transfer_config(arguments: list[str]) -> str:
    (value,) = [word.partition("=")[2] for word in arguments if word.startswith("--kv-transfer-config=")]
    return value


def test_engines_are_configured_as_kvfs_says(capsys: pytest.CaptureFixture[str]) -> None:
    vllm_config.main(["--mount", "/run/kvfs/mnt"], standalone_mode=False)
    wanted = capsys.readouterr().out.strip()
    services = read("compose.yaml")["services"]
    engines = [service for name, service in services.items() if name.startswith("engine")]
    assert len(engines) == 2
    pod = read("engine-pod.yaml")["spec"]["containers"][0]
    assert {transfer_config(arguments) for arguments in (pod["args"], *(e["command"] for e in engines))} == {wanted}


def test_the_folder_above_the_mount_is_bound_and_mounts_reach_it() -> None:
    services = read("compose.yaml")["services"]
    for name, service in services.items():
        (bound,) = [volume for volume in service["volumes"] if isinstance(volume, dict)]
        assert (bound["source"], bound["target"]) == ("/run/kvfs", "/run/kvfs")
        assert bound["bind"]["propagation"] == ("rshared" if name == "kvfs" else "rslave")
    daemon, engine = read("daemonset.yaml")["spec"]["template"]["spec"], read("engine-pod.yaml")["spec"]
    for pod, propagation in ((daemon, "Bidirectional"), (engine, "HostToContainer")):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
        (bound,) = [each for each in container["volumeMounts"] if "mountPropagation" in each]
        assert bound["mountPropagation"] == propagation
        assert volumes[bound["name"]] == bound["mountPath"] == "/run/kvfs"
    assert daemon["containers"][0]["securityContext"]["privileged"] is True  # or Bidirectional is refused
    labels = read("daemonset.yaml")["spec"]
    assert labels["selector"]["matchLabels"].items() <= labels["template"]["metadata"]["labels"].items()


def test_the_daemon_has_the_capabilities_that_the_unit_gives_it() -> None:
    unit = (ROOT / "systemd" / "kvfs@.service").read_text()
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    given = read("compose.yaml")["services"]["kvfs"]["cap_add"]
    assert {f"CAP_{name}" for name in given} == {*line.split(), "CAP_CHOWN"}  # and the entrypoint's chown


# ------------------------------------------------------------------------------------------------ what they rely on

CONTAINER = """
import hashlib, os, subprocess, sys
from pathlib import Path
from kvfs.client import connect
from kvfs.identity import PartId
host, inside = map(Path, sys.argv[1:3])
for words in (["--rbind", host, inside], ["--make-rslave", inside]):
    subprocess.run(["mount", *words], check=True)
subprocess.run(["umount", "-l", host], check=True)  # a container does not see the host's own
mount = inside / "mnt"
client, held = connect(mount=mount), None
print("ready", flush=True)
for line in sys.stdin:
    verb, *words = line.split()
    try:
        match verb:
            case "read":
                answer = hashlib.sha256((mount / words[0]).read_bytes()).hexdigest()
            case "hold":
                held = open(mount / words[0], "rb")
                answer = "held"
            case "reread":
                answer = hashlib.sha256(os.pread(held.fileno(), 1 << 24, 0)).hexdigest()
            case "lease":
                ns, key, part = bytes.fromhex(words[0]), bytes.fromhex(words[1]), PartId.parse(words[2])
                with client.lease(ns, [(key, part)], timeout=5) as lease:
                    answer = hashlib.sha256(os.pread(lease.parts[0].fd, 1 << 24, 0)).hexdigest()
            case "list":
                answer = ",".join(sorted(os.listdir(mount)))
    except OSError as e:
        answer = type(e).__name__ + ": " + str(e)
    print(answer, flush=True)
client.close()
"""


class Container:
    """A process with a mount namespace of its own, which sees the folder of the host as a slave, and knows no more."""

    def __init__(self, host: Path, inside: Path) -> None:
        self.process = subprocess.Popen(
            [
                "timeout",
                "-k",
                "5",
                "60",
                "unshare",
                "--mount",
                "--propagation",
                "unchanged",
                sys.executable,
                "-c",
                CONTAINER,
                str(host),
                str(inside),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, *words: object) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        self.process.communicate(timeout=20)
        assert self.process.returncode == 0


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with samples.new_store(tmp_path / "kv") as store:
        samples.put(store, KEYS[0])
    return tmp_path / "kv"


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder whose mounts reach others, as /run of a host with systemd is."""
    folder = tmp_path / "run"
    (folder / "mnt").mkdir(parents=True)
    for words in (["--bind", folder, folder], ["--make-private", folder], ["--make-rshared", folder]):
        subprocess.run(["mount", *map(str, words)], check=True)
    yield folder
    for point in (folder / "mnt", folder):
        with contextlib.suppress(subprocess.CalledProcessError):
            while any(mount.point == point for mount in connection.mounts()):
                subprocess.run(["umount", "-l", point], check=True, timeout=10)


@pytest.fixture
def container(store: Path, shared: Path, tmp_path: Path) -> Iterator[Container]:
    (tmp_path / "inside").mkdir()
    container = Container(shared, tmp_path / "inside")
    yield container
    container.close()


def digest(store: Path, key: bytes) -> str:
    import hashlib

    return hashlib.sha256(place(store, key, PART).read_bytes()).hexdigest()


def relative(key: bytes) -> Path:
    return place(Path(), key, PART)


def lease(key: bytes) -> tuple[str, str, str, str]:
    return "lease", samples.MANIFEST.ns_hex, key.hex(), str(PART)


@needs_mount
def test_a_live_container_sees_a_mount_made_again(store: Path, shared: Path, container: Container) -> None:
    assert container.ask("list") == ""
    with mounted(store, shared / "mnt"):
        assert container.ask("read", relative(KEYS[0])) == digest(store, KEYS[0])
        until(lambda: container.ask(*lease(KEYS[0])) == digest(store, KEYS[0]))  # its client connects meanwhile
        assert container.ask("hold", relative(KEYS[0])) == "held"
        keeper.umount(shared / "mnt", lazy=True)
        assert container.ask("list") == ""
        assert container.ask("reread") == digest(store, KEYS[0])
        until(lambda: not processes(store))
    with Store.open(store) as other:
        samples.put(other, KEYS[1])
    with mounted(store, shared / "mnt"):
        assert container.ask("read", relative(KEYS[1])) == digest(store, KEYS[1])
        assert container.ask("reread") == digest(store, KEYS[0])
        until(lambda: container.ask(*lease(KEYS[1])) == digest(store, KEYS[1]))


@needs_mount
def test_a_live_container_sees_the_mount_after_its_daemon_was_killed(
    store: Path, shared: Path, container: Container
) -> None:
    with mounted(store, shared / "mnt"):
        assert container.ask("read", relative(KEYS[0])) == digest(store, KEYS[0])
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in processes(store).values():
                os.kill(pid, number)
        until(lambda: not processes(store))
        until(lambda: "not connected" in container.ask("list"))  # "connection aborted" while its end is under way
        with mounted(store, shared / "mnt"):
            assert container.ask("read", relative(KEYS[0])) == digest(store, KEYS[0])
            until(lambda: container.ask(*lease(KEYS[0])) == digest(store, KEYS[0]))
