"""The configuration: sources in their order, the origin of every value, and messages that say what to write."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from kvfs import config
from kvfs.errors import ConfigError

EVERY = {
    "store": ("/srv/kv", Path("/srv/kv")),
    "mountpoint": ("/mnt/kv", Path("/mnt/kv")),
    "transport": ("libfuse", "libfuse"),
    "threads": ("7", 7),
    "shared": ("yes", "yes"),
    "durability": ("full", "full"),
    "verify": ("always", "always"),
    "read_only": ("true", True),
    "allow_other": ("yes", True),
    "fuse_options": ("noexec,fsname=kv", ("noexec", "fsname=kv")),
    "socket_mode": ("0600", 0o600),
    "socket_group": ("kv", "kv"),
    "worker_user": ("kvfs", "kvfs"),
    "worker_socket": ("/run/kvfs-worker/main", Path("/run/kvfs-worker/main")),
    "budget": ("1.5TiB", config.Amount(3 << 39, 0.0)),
    "namespace_budgets": (
        "llama=10GiB;a=b@v1=2.5%",
        (("llama", config.Amount(10 << 30, 0.0)), ("a=b@v1", config.Amount(0, 0.025))),
    ),
    "min_free": ("0B", config.Amount(0, 0.0)),
    "high_watermark": ("99.5%", 0.995),
    "low_watermark": ("80%", 0.8),
    "policy": ("lru", "lru"),
    "ttl": ("7d", 604800.0),
    "write_budget": ("off", None),
    "trace": ("/tmp/t", Path("/tmp/t")),
    "snapshot_interval": ("90s", 90.0),
    "scrub_rate": ("off", 0),
    "compact_after": ("off", None),
    "compact_watermark": ("85%", 0.85),
    "compact_share": ("100%", 1.0),
    "heat_hits": ("1", 1),
    "hydrate_limit": ("2GiB", 2 << 30),
    "quarantine_limit": ("1.5GiB", 3 << 29),
    "metrics_listen": ("[::1]:9105", config.Address("::1", 9105)),
    "log_level": ("debug", "debug"),
}
"""One value other than the default for every setting, as text and as kept."""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvfs.toml"
    path.write_text(text)
    return path


@pytest.fixture
def no_file(tmp_path: Path) -> Path:
    return write(tmp_path, "")


def test_every_setting_is_covered_here() -> None:
    assert set(EVERY) == set(config.SETTINGS)


def test_defaults_are_what_the_dataclass_says(no_file: Path) -> None:
    loaded = config.load(no_file, {})
    assert loaded == config.Config()
    assert set(loaded.origins.items()) == {(name, "default") for name in config.SETTINGS}


@pytest.mark.parametrize("name", config.SETTINGS)
def test_later_sources_win(name: str, tmp_path: Path) -> None:
    raw, value = EVERY[name]
    row = config.SETTINGS[name]
    path = write(tmp_path, f'# first line\n{name} = "{raw}"\n')
    for file, env, flags, origin in [
        (path, {}, [], f"{path}:2"),
        (path, {row.env: raw}, [], f"env {row.env}"),
        (path, {row.env: raw}, [(name, raw, f"flag {row.flag}")], f"flag {row.flag}"),
    ]:
        loaded = config.load(file, env, flags)
        assert getattr(loaded, name) == value
        assert loaded.origins[name] == origin
        assert loaded != config.Config()


@pytest.mark.parametrize("name", config.SETTINGS)
def test_shown_values_read_back(name: str) -> None:
    row = config.SETTINGS[name]
    value = EVERY[name][1]
    assert row.kind.parse(row.show(value)) == value


def test_native_toml_types(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'threads = 2\nread_only = true\nsocket_mode = 0o640\nfuse_options = ["noexec", "noatime"]\nsocket_group = 12\n',
    )
    loaded = config.load(path, {})
    assert (loaded.threads, loaded.read_only, loaded.socket_mode) == (2, True, 0o640)
    assert loaded.fuse_options == ("noexec", "noatime")
    assert loaded.socket_group == "12"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('transprot = "kernel"', r"kvfs\.toml:1: there is no setting transprot; the nearest name is transport"),
        ("[daemon]\nthreads = 2", r"kvfs\.toml:1: there is no setting daemon"),
        ('transport = "fuse2"', r"transport = 'fuse2': write one of auto, kernel, libfuse"),
        ("transport = 3", "write one of auto"),
        ("threads = 0", "threads = 0: write a whole number from 1 to 64"),
        ("threads = true", "threads = True: write a whole number"),
        ("threads = 2.0", "write a whole number"),
        ('read_only = "perhaps"', "write true or false"),
        ("read_only = 1", "write true or false"),
        ("snapshot_interval = 30", r"write a number with a unit \(ms, s, min, h, d\), from 1s to 1d"),
        ('snapshot_interval = "10ms"', "from 1s to 1d"),
        ('snapshot_interval = "2d"', "from 1s to 1d"),
        ('socket_mode = "999"', 'write permission bits such as "0660"'),
        ("socket_mode = 0o1777", "write permission bits"),
        ('metrics_listen = "0.0.0.0:9105"', r"write off, or a loopback address and port such as 127\.0\.0\.1:9105"),
        ('metrics_listen = "127.0.0.1:70000"', "loopback address"),
        ('metrics_listen = "127.0.0.1"', "loopback address"),
        ('fuse_options = "noexek"', "write options among context=…, default_permissions"),
        ('fuse_options = "fsname"', "fsname=…"),
        ('store = ""', "write a path"),
        ('store = ["a"]', "write a path"),
        ("threads = ", "not a TOML file"),
        ('budget = "90"', "write a size such as 500GiB, or a percentage of the filesystem such as 90%"),
        ('budget = "101%"', "write a size"),
        ('namespace_budgets = "llama"', "write budgets such as llama=500GiB"),
        ("namespace_budgets = 3", "write budgets such as llama=500GiB"),
        ('ttl = "1s"', "write off, or a number with a unit"),
        ('low_watermark = "99%"', r"low_watermark is above high_watermark \(.*:1\)"),
    ],
)
def test_what_is_wrong_is_refused_with_the_remedy(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(write(tmp_path, text), {})


def test_environment_misspelling_is_refused_and_strangers_are_not(no_file: Path) -> None:
    assert config.load(no_file, {"KVFS_TEST_RUN": "1", "HOME": "/"}).threads == config.Config().threads
    with pytest.raises(ConfigError, match=r"env KVFS_TREADS: .* the nearest name is KVFS_THREADS"):
        config.load(no_file, {"KVFS_TREADS": "3"})


def test_unknown_override_names_the_nearest(no_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"option -o allow_othr: .* nearest name is allow_other"):
        config.load(no_file, {}, [("allow_othr", True, "option -o allow_othr")])


def test_named_file_must_exist_and_default_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "none.toml")
    assert config.load(environ={}) == config.Config()
    with pytest.raises(ConfigError, match="there is no such file; name another with --config"):
        config.load(tmp_path / "absent.toml", {})
    with pytest.raises(ConfigError, match="there is no such file"):
        config.load(environ={config.ENV_FILE: str(tmp_path / "absent.toml")})
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path, {})


def test_file_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "threads = 9")
    assert config.load(environ={config.ENV_FILE: str(path)}).threads == 9


def test_paths_become_absolute(no_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    loaded = config.load(no_file, {"KVFS_STORE": "a/../b", "KVFS_MOUNTPOINT": "~/kv"})
    assert (loaded.store, loaded.mountpoint) == (Path(os.path.abspath("b")), Path("/home/someone/kv"))


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("30s", 30.0, "30s"),
        ("1.5 min", 90.0, "90s"),
        ("2h", 7200.0, "2h"),
        ("1d", 86400.0, "1d"),
        ("2500ms", 2.5, "2500ms"),
    ],
)
def test_durations(text: str, seconds: float, shown: str) -> None:
    kind = config.SETTINGS["snapshot_interval"].kind
    assert kind.parse(text) == seconds
    assert kind.show(seconds) == shown


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().threads = 3  # type: ignore[misc]
