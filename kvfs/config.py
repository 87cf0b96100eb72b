"""Settings: one frozen dataclass, filled from defaults, one TOML file, ``KVFS_*`` variables and flags, in that order.

The fields of `Config` are the only table: names, defaults, parsers, help texts, environment names and flags all come
from it. Every value remembers where it came from, and whatever is wrong is refused with a message that says what to
write instead.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import os
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

DEFAULT_FILE = Path("/etc/kvfs/kvfs.toml")
"""Read when neither ``--config`` nor ``KVFS_CONFIG`` names a file; it may be missing."""

ENV_PREFIX = "KVFS_"
ENV_FILE = "KVFS_CONFIG"

MOUNT_OPTIONS = {
    "context": True,
    "default_permissions": False,
    "fsname": True,
    "max_read": True,
    "noatime": False,
    "nodev": False,
    "noexec": False,
    "nosuid": False,
}
"""Options that `Config.fuse_options` may name, and whether each takes a ``=value``."""


class Address(NamedTuple):
    """A TCP address on this host."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Kind:
    """How one type of setting is read and written back.

    ``parse`` takes what TOML, the environment or a flag gave and raises TypeError or ValueError when that will
    not do; ``form`` then says what to write. ``show`` gives the text that ``parse`` reads back to the same value.
    """

    form: str
    parse: Callable[[object], Any]
    show: Callable[[Any], str]


def text_of(raw: object) -> str:
    """Return ``raw`` if it is text that says something, without the blanks around it."""
    if not isinstance(raw, str) or not raw.strip() or "\0" in raw:
        raise ValueError
    return raw.strip()


def one_of(*choices: str) -> Kind:
    """Make the kind of a word from a closed list."""

    def parse(raw: object) -> str:
        if raw not in choices:
            raise ValueError
        return str(raw)

    return Kind("one of " + ", ".join(choices), parse, str)


def whole(low: int, high: int) -> Kind:
    """Make the kind of an integer from ``low`` to ``high``, both included."""

    def parse(raw: object) -> int:
        value = int(raw) if isinstance(raw, str) and re.fullmatch(r"-?\d{1,18}", raw.strip()) else raw
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return Kind(f"a whole number from {low} to {high}", parse, str)


SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def duration(low: str, high: str) -> Kind:
    """Make the kind of a time span such as ``30s``; its value is in seconds."""

    def read(raw: object) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|d)", text_of(raw))
        if match is None:
            raise ValueError
        return float(match[1]) * SECONDS[match[2]]

    def parse(raw: object) -> float:
        value = read(raw)
        if not read(low) <= value <= read(high):
            raise ValueError
        return value

    def show(value: float) -> str:
        for unit in reversed(SECONDS):
            count = value / SECONDS[unit]
            if count >= 1 and math.isclose(count, round(count)):
                return f"{round(count)}{unit}"
        return f"{value:g}s"

    return Kind(f"a number with a unit (ms, s, min, h, d), from {low} to {high}", parse, show)


def parse_switch(raw: object) -> bool:
    """Read true or false; in the environment the usual words for them too."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    value = words.get(raw.strip().lower()) if isinstance(raw, str) else raw
    if not isinstance(value, bool):
        raise TypeError
    return value


def parse_group(raw: object) -> str:
    """Read the name or the number of a group."""
    return str(raw) if type(raw) is int and raw >= 0 else text_of(raw)


def parse_path(raw: object) -> Path:
    """Read a path; the result is absolute, relative ones start at the current folder."""
    return Path(os.path.abspath(os.path.expanduser(os.fspath(raw) if isinstance(raw, Path) else text_of(raw))))


def parse_address(raw: object) -> Address | None:
    """Read ``host:port`` where host is a loopback address; ``off`` is None."""
    text = text_of(raw)
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
        raise ValueError
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError
    return Address(host, int(port))


def parse_mode(raw: object) -> int:
    """Read permission bits: an octal text, or an integer as TOML's ``0o660`` gives it."""
    value = int(raw, 8) if isinstance(raw, str) else raw
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 0o777:
        raise ValueError
    return value


def parse_options(raw: object) -> tuple[str, ...]:
    """Read mount options, as a list or joined by commas; each must stand in `MOUNT_OPTIONS`."""
    words = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(words, list | tuple):
        raise TypeError
    options = tuple(text_of(word) for word in words if word != "")
    for option in options:
        name, sign, _ = option.partition("=")
        if MOUNT_OPTIONS.get(name) is not bool(sign):
            raise ValueError
    return options


PATH = Kind("a path", parse_path, str)
SWITCH = Kind("true or false", parse_switch, lambda value: str(value).lower())
LOOPBACK = Kind(
    "off, or a loopback address and port such as 127.0.0.1:9105",
    parse_address,
    lambda value: "off" if value is None else str(value),
)
MODE = Kind('permission bits such as "0660"', parse_mode, lambda value: f"{value:04o}")
GROUP = Kind("the name of a group, or its number", parse_group, str)
OPTIONS = Kind(
    "options among " + ", ".join(f"{k}=…" if v else k for k, v in MOUNT_OPTIONS.items()), parse_options, ",".join
)


def row(kind: Kind, doc: str) -> dict[str, Any]:
    """Make what `Config` says of one field besides its type and default."""
    return {"kind": kind, "doc": doc}


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one daemon. Durations are in seconds."""

    store: Path | None = field(default=None, metadata=row(PATH, "Folder that holds the namespaces."))
    mountpoint: Path | None = field(default=None, metadata=row(PATH, "Folder where the store is shown."))
    transport: str = field(
        default="auto",
        metadata=row(
            one_of("auto", "kernel", "libfuse"),
            "Who speaks to the kernel: kvfs itself, with passthrough (kernel), or libfuse through mfusepy. "
            "auto takes the first that this host allows.",
        ),
    )
    threads: int = field(default=4, metadata=row(whole(1, 64), "Threads that answer requests of the filesystem."))
    durability: str = field(
        default="relaxed",
        metadata=row(
            one_of("relaxed", "full"),
            "full: a part is on disk before it becomes visible; relaxed: a power cut may lose the newest chunks, "
            "and never leaves a torn one.",
        ),
    )
    verify: str = field(
        default="first-open",
        metadata=row(
            one_of("first-open", "always"),
            "When the checksums of a part are checked: at its first open per boot and host, or at every open.",
        ),
    )
    read_only: bool = field(
        default=False, metadata=row(SWITCH, "Serve what is there; store, remove and quarantine nothing.")
    )
    allow_other: bool = field(
        default=False,
        metadata=row(
            SWITCH,
            "Let users other than the one who mounted use the mount. Without root this needs user_allow_other in "
            "/etc/fuse.conf.",
        ),
    )
    fuse_options: tuple[str, ...] = field(default=(), metadata=row(OPTIONS, "Further mount options."))
    socket_mode: int = field(default=0o660, metadata=row(MODE, "Permission bits of the control socket."))
    socket_group: str | None = field(
        default=None, metadata=row(GROUP, "Group of the control socket; by default that of the daemon.")
    )
    snapshot_interval: float = field(
        default=60.0,
        metadata=row(duration("1s", "1d"), "Time between snapshots of the index, from which the next start is quick."),
    )
    metrics_listen: Address | None = field(default=None, metadata=row(LOOPBACK, "Address of the Prometheus page."))
    log_level: str = field(
        default="info", metadata=row(one_of("debug", "info", "warning", "error"), "Least severe message logged.")
    )

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each value came from: ``default``, ``FILE:LINE``, ``env KVFS_X``, ``flag --x``; one entry a setting."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table behind `Config`."""

    name: str
    default: object
    kind: Kind
    doc: str

    @property
    def env(self) -> str:
        """Name of the environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """Name of the command line flag."""
        return "--" + self.name.replace("_", "-")

    def show(self, value: object) -> str:
        """Return ``value`` as one would write it; nothing for a setting that has none."""
        return "" if value is None and self.kind is not LOOPBACK else self.kind.show(value)


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        each.name: Setting(each.name, each.default, each.metadata["kind"], each.metadata["doc"])
        for each in fields(Config)
        if each.metadata
    }
)


def load(
    file: Path | None = None, environ: Mapping[str, str] = os.environ, overrides: Iterable[tuple[str, object, str]] = ()
) -> Config:
    """Build the configuration; later sources win: defaults, the file, the environment, ``overrides``.

    ``file`` must exist if it is given here or in ``KVFS_CONFIG``; `DEFAULT_FILE` need not. ``overrides`` are
    ``(setting, raw value, origin)``. Raises ConfigError for an unreadable file, an unknown name (with the nearest
    one), and a value of the wrong type or out of range (with what to write).
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(SETTINGS, "default")
    for name, raw, origin in [*from_file(file, environ), *from_environment(environ), *overrides]:
        entry = SETTINGS.get(name)
        if entry is None:
            raise ConfigError(f"{origin}: there is no setting {name}{nearest(name, SETTINGS)}")
        try:
            values[name] = entry.kind.parse(raw)
        except (TypeError, ValueError):
            raise ConfigError(f"{origin}: {name} = {raw!r}: write {entry.kind.form}") from None
        origins[name] = origin
    return Config(**values, origins=MappingProxyType(origins))


def to_toml(config: Config, origins: bool = False) -> str:
    """Return all settings as a TOML file that loads to an equal configuration, with their origins as comments."""
    lines = {}
    for name, entry in SETTINGS.items():
        value = getattr(config, name)
        plain = isinstance(value, bool | int) and entry.kind is not MODE
        shown = entry.show(value) if plain else json.dumps(entry.show(value), ensure_ascii=False)
        lines[name] = f"{name} = {shown}" if shown != '""' else f'# {name} = ""'
    width = max(map(len, lines.values()))
    comments = {name: f"  # {config.origins.get(name, 'default')}" if origins else "" for name in lines}
    return "".join(f"{line.ljust(width)}{comments[name]}".rstrip() + "\n" for name, line in lines.items())


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the hint that ends a message about the unknown ``name``."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"; the nearest name is {close[0]}" if close else ""


def from_file(file: Path | None, environ: Mapping[str, str]) -> list[tuple[str, object, str]]:
    """Read the settings of the TOML file, each with its line as the origin."""
    path = file or (Path(environ[ENV_FILE]) if environ.get(ENV_FILE) else DEFAULT_FILE)
    try:
        text = path.read_text("utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        if path == DEFAULT_FILE:
            return []
        raise ConfigError(f"{path}: there is no such file; name another with --config or {ENV_FILE}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name another with --config or {ENV_FILE}") from None
    except ValueError as error:  # both TOML's errors and UTF-8's
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    found = []
    for name, raw in table.items():
        key = re.search(rf"^[ \t]*\[*[\"']?{re.escape(name)}\b", text, re.MULTILINE)
        line = text.count("\n", 0, key.start()) + 1 if key else 1
        found.append((name, raw, f"{path}:{line}"))
    return found


def from_environment(environ: Mapping[str, str]) -> list[tuple[str, object, str]]:
    """Read ``KVFS_*``. Other programs may own names with this prefix, so only a likely misspelling is refused."""
    known = {each.env: each.name for each in SETTINGS.values()}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known and name != ENV_FILE:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            if close:
                raise ConfigError(f"env {name}: there is no such setting; the nearest name is {close[0]}")
    return [(known[name], raw, f"env {name}") for name, raw in environ.items() if name in known]
