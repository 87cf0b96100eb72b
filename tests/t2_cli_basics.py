"""The command line as scripts meet it: exit codes, one line on stderr, JSON, speed; and what needs no store."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from kvfs import config, errors
from kvfs.cli import boundary, mount
from kvfs.cli.main import kvfs_command
from tests import samples

SCRIPT = Path(sys.executable).with_name("kvfs")


def kvfs(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=60, check=False, **kwargs)


def invoke(*args: object, **kwargs: object) -> Result:
    return CliRunner().invoke(kvfs_command, [str(arg) for arg in args], prog_name="kvfs", **kwargs)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of this host may reach the tests, nor its mounts."""
    for row in config.SETTINGS.values():
        monkeypatch.delenv(row.env, raising=False)
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv(config.ENV_FILE, str(tmp_path / "empty.toml"))


# ------------------------------------------------------------------------------------------------------ the boundary


def test_help_is_quick() -> None:
    times = []
    for _ in range(5):
        start = time.monotonic()
        assert kvfs("--help").returncode == 0
        times.append(time.monotonic() - start)
    assert min(times) < 0.3


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, kvfs.cli.main; print([m for m in ('numpy', 'torch', 'vllm', 'msgpack') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", sorted(kvfs_command.commands))
def test_every_command_has_help(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert done.output.startswith(f"Usage: kvfs {command}")
    assert kvfs_command.commands[command].get_short_help_str()


def test_success_is_0_and_usage_is_2(tmp_path: Path) -> None:
    assert kvfs("init", tmp_path / "kv").returncode == 0
    bad = kvfs("init")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Missing argument 'STORE'" in bad.stderr
    assert kvfs("no-such-command").returncode == 2


def test_an_error_is_one_line_and_its_own_exit_code(tmp_path: Path) -> None:
    done = kvfs("ls", "--at", tmp_path / "absent")
    assert done.returncode == errors.NotAStore.exit_code == 7
    assert done.stdout == ""
    assert done.stderr == f"kvfs: {tmp_path}/absent is not a kvfs store: `kvfs init {tmp_path}/absent` makes one\n"


def test_exit_codes_are_distinct_and_leave_0_1_2_alone() -> None:
    leaves = [getattr(errors, name) for name in errors.__all__ if name != "KvfsError"]
    codes = [leaf.exit_code for leaf in leaves]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2} & set(codes)


def test_a_system_error_is_one_line_and_1(tmp_path: Path) -> None:
    @click.command(cls=boundary.Command)
    def command() -> None:
        (tmp_path / "absent").read_bytes()

    done = CliRunner().invoke(command)
    assert (done.exit_code, done.stderr) == (1, f"kvfs: {tmp_path}/absent: No such file or directory\n")


def test_the_unforeseen_is_one_line_and_1() -> None:
    @click.command(cls=boundary.Command)
    def command() -> None:
        raise ZeroDivisionError("by nothing")

    done = CliRunner().invoke(command)
    assert done.exit_code == 1
    assert done.stderr.startswith("kvfs: unexpected ZeroDivisionError in command (")
    assert done.stderr.count("\n") == 1


def test_interrupt_is_130() -> None:
    @click.command(cls=boundary.Command)
    def command() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(command).exit_code == 130


def test_traceback_on_request(tmp_path: Path) -> None:
    done = kvfs("ls", "--at", tmp_path, env={**os.environ, "KVFS_LOG_LEVEL": "debug"})
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("kvfs: ")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    store = samples.new_store(tmp_path / "kv")
    for _ in range(200):
        samples.put(store, samples.new_key(), samples.MANIFEST.parts[2], tokens=16)
    store.close()
    line = f"{shlex.quote(str(SCRIPT))} ls sample --json --at {shlex.quote(str(tmp_path / 'kv'))} | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[", "")


# ------------------------------------------------------------------------------------------------------ setup


def test_init_makes_a_store_once(tmp_path: Path) -> None:
    store = tmp_path / "a" / "kv"
    assert invoke("init", store).output == f"{store} is ready\n"
    assert json.loads(invoke("init", store, "--json").output) == {"store": str(store), "created": False}
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    done = invoke("init", full)
    assert done.exit_code == errors.StoreReadOnly.exit_code
    assert "name an empty one" in done.stderr


def test_config_show_reads_back_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('store = "/srv/kv"\nthreads = 2\nfuse_options = ["noexec"]\nsocket_mode = 0o600\n')
    shown = invoke("config", "show", "--config", path).output
    again = tmp_path / "b.toml"
    again.write_text(shown)
    assert config.load(again, {}) == config.load(path, {})
    assert config.load(again, {}).socket_mode == 0o600


def test_config_show_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.toml"
    path.write_text("threads = 2\n")
    monkeypatch.setenv("KVFS_VERIFY", "always")
    shown = invoke("config", "show", "--origin", "--config", path).output
    lines = {line.split(" ")[0]: line for line in shown.splitlines()}
    assert lines["threads"].endswith(f"# {path}:1")
    assert lines["verify"].endswith("# env KVFS_VERIFY")
    assert lines["transport"].endswith("# default")
    values = json.loads(invoke("config", "show", "--json", "--config", path).output)
    assert values["threads"] == {"value": "2", "origin": f"{path}:1"}
    assert values["store"] == {"value": None, "origin": "default"}


def test_bad_configuration_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("\nthreds = 2\n")
    done = kvfs("config", "show", "--config", path)
    assert done.returncode == errors.ConfigError.exit_code
    assert done.stderr == f"kvfs: configuration: {path}:2: there is no setting threds; the nearest name is threads\n"


@pytest.mark.parametrize("place", ["mount", "store"])
def test_vllm_config_is_one_json_object_and_nothing_else(place: str, tmp_path: Path) -> None:
    done = kvfs("vllm-config", f"--{place}", tmp_path)
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {
        "kv_connector": "KvfsConnector",
        "kv_connector_module_path": "kvfs.vllm_hook.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {place: str(tmp_path)},
    }


def test_vllm_config_of_a_lossy_engine(tmp_path: Path) -> None:
    extra = json.loads(invoke("vllm-config", "--store", tmp_path, "--fidelity", "lossy").stdout)
    assert extra["kv_connector_extra_config"] == {"store": str(tmp_path), "fidelity": "lossy"}
    assert invoke("vllm-config", "--store", tmp_path, "--fidelity", "loose").exit_code == 2


def test_vllm_config_wants_one_place(tmp_path: Path) -> None:
    assert invoke("vllm-config").exit_code == 2
    assert invoke("vllm-config", "--mount", tmp_path, "--store", tmp_path).exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = kvfs("completion", shell).stdout
    assert "_KVFS_COMPLETE" in script
    done = kvfs(env={**os.environ, "_KVFS_COMPLETE": "bash_complete", "COMP_WORDS": "kvfs vllm", "COMP_CWORD": "1"})
    assert done.stdout == "plain,vllm-config\n"


# ------------------------------------------------------------------------------------------------------ mount options


def fields(line: str) -> tuple[str, str, str, set[str]]:
    store, point, kind, words, *rest = line.split()
    assert rest == ["0", "0"]
    return store, point, kind, set(words.split(","))


def test_print_fstab(tmp_path: Path) -> None:
    store, point = tmp_path / "k v", tmp_path / "mnt"
    line = invoke(
        "mount", store, point, "--print-fstab", "-o", "noexec,threads=8", "--allow-other", "--verify", "always"
    ).output
    assert fields(line) == (
        str(store).replace(" ", "\\040"),
        str(point),
        "kvfs",
        {
            "rw",
            "nosuid",
            "nodev",
            "nofail",
            "noexec",
            "threads=8",
            "allow_other",
            "verify=always",
            f"x-systemd.requires-mounts-for={store}".replace(" ", "\\040"),
        },
    )


def test_fstab_line_means_the_same_when_mount_reads_it(tmp_path: Path) -> None:
    args = ["--read-only", "--metrics-listen", "127.0.0.1:9105", "--socket-mode", "0600", "-o", "noexec"]
    line = invoke("mount", tmp_path / "kv", tmp_path / "mnt", "--print-fstab", *args).output
    words = line.split()[3]
    again = invoke("mount", tmp_path / "kv", tmp_path / "mnt", "--print-fstab", "-o", words).output
    assert fields(again) == fields(line)
    assert {"ro", "metrics_listen=127.0.0.1:9105", "socket_mode=0600", "noexec"} <= fields(line)[3]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("allow_othr", "option -o allow_othr: there is no such option; the nearest name is allow_other"),
        ("threads=many", "option -o threads: threads = 'many': write a whole number from 1 to 64"),
        ("fsname", "write options among"),
        ("ro=yes", "there is no such option"),
    ],
)
def test_mount_options_are_checked(words: str, says: str, tmp_path: Path) -> None:
    done = invoke("mount", tmp_path, tmp_path, "--print-fstab", "-o", words)
    assert done.exit_code == errors.ConfigError.exit_code
    assert says in done.stderr


def test_mount_helper_understands_what_mount_8_adds(tmp_path: Path) -> None:
    run = CliRunner().invoke
    fstab = "rw,nosuid,nodev,nofail,_netdev,x-systemd.automount,allow_other,user"
    assert run(mount.mount_helper, [str(tmp_path), str(tmp_path), "-f", "-n", "-s", "-o", fstab]).exit_code == 0
    done = run(mount.mount_helper, [str(tmp_path), str(tmp_path), "-f", "-o", "nosiud"])
    assert done.exit_code == errors.ConfigError.exit_code
    assert done.stderr.startswith("kvfs: configuration: option -o nosiud")


def test_mount_and_umount_name_what_is_missing(tmp_path: Path) -> None:
    for words, missing in [
        ("mount", "no store"),
        (f"mount {tmp_path}", "no mount point"),
        ("umount", "no mount point"),
    ]:
        done = invoke(*words.split())
        assert done.exit_code == errors.ConfigError.exit_code
        assert f"{missing} is named" in done.stderr
