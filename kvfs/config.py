"""Settings: one frozen dataclass, filled from defaults, one TOML file, ``KVFS_*`` variables and flags, in that order.

The fields of `Config` are the only table: names, defaults, parsers, help texts, environment names and flags all come
from it. Every value remembers where it came from, and whatever is wrong is refused with a message that says what to
write instead.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvfs.errors import ConfigError
from kvfs.kinds import (
    AMOUNT,
    BUDGETS,
    GROUP,
    LOOPBACK,
    MODE,
    MOUNT_OPTIONS,
    OPTIONS,
    PATH,
    SWITCH,
    USER,
    Address,
    Amount,
    Kind,
    duration,
    one_of,
    or_off,
    share,
    size,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "DEFAULT_FILE",
    "ENV_FILE",
    "ENV_PREFIX",
    "LOOPBACK",
    "MODE",
    "MOUNT_OPTIONS",
    "SETTINGS",
    "SWITCH",
    "Address",
    "Amount",
    "Config",
    "Setting",
    "load",
    "nearest",
    "to_toml",
]

DEFAULT_FILE = Path("/etc/kvfs/kvfs.toml")
"""Read when neither ``--config`` nor ``KVFS_CONFIG`` names a file; it may be missing."""

ENV_PREFIX = "KVFS_"
ENV_FILE = "KVFS_CONFIG"


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
    worker_user: str | None = field(
        default=None,
        metadata=row(
            USER,
            "User whom the worker becomes as it starts, for good; it must own the store. By default it stays who "
            "the daemon is. Transport kernel only.",
        ),
    )
    budget: Amount = field(
        default=Amount(0, 0.9), metadata=row(AMOUNT, "Bytes that all chunks may take; beyond it nothing is stored.")
    )
    namespace_budgets: tuple[tuple[str, Amount], ...] = field(
        default=(),
        metadata=row(BUDGETS, "Budgets of namespaces, by their name, name@revision, or the beginning of their digest."),
    )
    min_free: Amount = field(
        default=Amount(0, 0.02),
        metadata=row(AMOUNT, "Free space of the filesystem below which chunks are evicted, whatever the budget."),
    )
    high_watermark: float = field(
        default=0.98, metadata=row(share(1, 100), "Of a budget, how much is used when eviction begins.")
    )
    low_watermark: float = field(default=0.95, metadata=row(share(1, 100), "Of a budget, how much it leaves in use."))
    policy: str = field(
        default="gdsf",
        metadata=row(one_of("gdsf", "s3-fifo", "lru"), "Which chunks are evicted first; `kvfs sim` compares them."),
    )
    ttl: float | None = field(
        default=None,
        metadata=row(or_off(duration("1min", "3650d")), "Time without use after which a chunk is evicted."),
    )
    write_budget: Amount | None = field(
        default=Amount(0, 1.0),
        metadata=row(
            or_off(AMOUNT), "Bytes to write in 24 hours; beyond it only what is offered a second time is stored."
        ),
    )
    trace: Path | None = field(
        default=None, metadata=row(PATH, "File to which lookups and stores are added, for `kvfs sim --trace`.")
    )
    snapshot_interval: float = field(
        default=60.0,
        metadata=row(duration("1s", "1d"), "Time between snapshots of the index, from which the next start is quick."),
    )
    scrub_rate: int = field(
        default=16 << 20,
        metadata=row(
            size("64KiB", "64GiB", "/s"),
            "Bytes a second of all parts that are read again, once a week, to find damage before a reader does.",
        ),
    )
    compact_after: float | None = field(
        default=3600.0,
        metadata=row(
            or_off(duration("1s", "3650d")),
            "Time without use after which a chunk is kept in its coded form only; off: compact nothing by itself.",
        ),
    )
    compact_watermark: float = field(
        default=0.9,
        metadata=row(
            share(1, 100), "Of a budget, how much is used when chunks are compacted that were not used for 10 min."
        ),
    )
    compact_share: float = field(
        default=0.5,
        metadata=row(share(1, 100), "Of one processor, how much compaction takes when nobody else wants it."),
    )
    heat_hits: int = field(
        default=3, metadata=row(whole(1, 1000), "Uses in 10 min after which a compacted chunk gets its raw form back.")
    )
    hydrate_limit: int = field(
        default=512 << 20,
        metadata=row(
            size("1MiB", "64TiB"), "Bytes of memory for coded parts that are decoded for readers of their raw form."
        ),
    )
    quarantine_limit: int = field(
        default=1 << 30,
        metadata=row(
            size("0B", "1024TiB"), "Bytes of damaged parts that are kept in lost+found; beyond it the oldest go."
        ),
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
        return "" if value is None and not self.kind.has_off else self.kind.show(value)


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
    config = Config(**values, origins=MappingProxyType(origins))
    if config.low_watermark > config.high_watermark:
        raise ConfigError(f"low_watermark is above high_watermark ({origins['low_watermark']})")
    return config


def to_toml(config: Config, origins: bool = False) -> str:
    """Return all settings as a TOML file that loads to an equal configuration, with their origins as comments."""
    lines = {}
    for name, entry in SETTINGS.items():
        value = getattr(config, name)
        plain = isinstance(value, bool) or (isinstance(value, int) and entry.show(value) == str(value))
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
