"""Kinds of settings: how each is read from TOML, the environment or a flag, checked, and written back."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

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


class Amount(NamedTuple):
    """Bytes: so many, and such a share (of 1) of the size of a filesystem."""

    bytes: int
    share: float

    def of(self, total: int) -> int:
        """Bytes on a filesystem of ``total`` bytes."""
        return self.bytes + round(self.share * total)


@dataclass(frozen=True, slots=True)
class Kind:
    """How one type of setting is read and written back.

    ``parse`` takes what TOML, the environment or a flag gave and raises TypeError or ValueError when that will
    not do; ``form`` then says what to write. ``show`` gives the text that ``parse`` reads back to the same value.
    ``has_off``: None is written as ``off``.
    """

    form: str
    parse: Callable[[object], Any]
    show: Callable[[Any], str]
    has_off: bool = False


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


BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
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


def size(low: str, high: str, unit: str = "") -> Kind:
    """Make the kind of a number of bytes such as ``16MiB``; with a unit (``/s``) one that can be ``off``, 0."""

    def read(raw: object) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|[KMGT]iB)", text_of(raw).removesuffix(unit))
        if match is None:
            raise ValueError
        return round(float(match[1]) * BYTES[match[2]])

    def parse(raw: object) -> int:
        if unit and raw in {"off", False}:
            return 0
        value = read(raw)
        if not read(low) <= value <= read(high):
            raise ValueError
        return value

    def show(value: int) -> str:
        if not value:
            return "off" if unit else "0B"
        name = next(name for name in reversed(BYTES) if value % BYTES[name] == 0)
        return f"{value // BYTES[name]}{name}{unit}"

    off = "off, or " if unit else ""
    return Kind(f"{off}a number with a unit (B, KiB, MiB, GiB, TiB), from {low} to {high}", parse, show)


def or_off(kind: Kind) -> Kind:
    """Make the kind of a value that can also be ``off``, None."""

    def parse(raw: object) -> Any:
        return None if raw in {"off", False} else kind.parse(raw)

    return Kind(f"off, or {kind.form}", parse, lambda value: "off" if value is None else kind.show(value), True)


def share(low: int, high: int) -> Kind:
    """Make the kind of a percentage such as ``95%``; its value is a share of 1."""

    def parse(raw: object) -> float:
        match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", text_of(raw))
        if match is None or not low <= float(match[1]) <= high:
            raise ValueError
        return float(match[1]) / 100

    return Kind(f"a percentage from {low}% to {high}%", parse, lambda value: f"{round(value * 100, 6):g}%")


_SIZE, _SHARE = size("0B", "1048576TiB"), share(0, 100)


def parse_amount(raw: object) -> Amount:
    """Read a size, or a percentage of the filesystem."""
    if text_of(raw).endswith("%"):
        return Amount(0, _SHARE.parse(raw))
    return Amount(_SIZE.parse(raw), 0.0)


def show_amount(value: Amount) -> str:
    """Return it as one would write it."""
    return _SIZE.show(value.bytes) if value.bytes or not value.share else _SHARE.show(value.share)


def parse_budgets(raw: object) -> tuple[tuple[str, Amount], ...]:
    """Read budgets by name, as a list or joined by semicolons."""
    words = raw.split(";") if isinstance(raw, str) else raw
    if not isinstance(words, list | tuple):
        raise TypeError
    pairs = [text_of(word).rpartition("=") for word in words if word != ""]
    return tuple((text_of(name), parse_amount(amount)) for name, _, amount in pairs)


def parse_switch(raw: object) -> bool:
    """Read true or false; in the environment the usual words for them too."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    value = words.get(raw.strip().lower()) if isinstance(raw, str) else raw
    if not isinstance(value, bool):
        raise TypeError
    return value


def parse_account(raw: object) -> str:
    """Read the name or the number of a user or group."""
    return str(raw) if type(raw) is int and raw >= 0 else text_of(raw)


def parse_path(raw: object) -> Path:
    """Read a path; the result is absolute, relative ones start at the current folder."""
    return Path(os.path.abspath(os.path.expanduser(os.fspath(raw) if isinstance(raw, Path) else text_of(raw))))


def parse_address(raw: object) -> Address:
    """Read ``host:port`` where host is a loopback address."""
    text = text_of(raw)
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
LOOPBACK = or_off(Kind("a loopback address and port such as 127.0.0.1:9105", parse_address, str))
AMOUNT = Kind("a size such as 500GiB, or a percentage of the filesystem such as 90%", parse_amount, show_amount)
BUDGETS = Kind(
    "budgets such as llama=500GiB;qwen@v2=10%",
    parse_budgets,
    lambda value: ";".join(f"{name}={show_amount(amount)}" for name, amount in value),
)
MODE = Kind('permission bits such as "0660"', parse_mode, lambda value: f"{value:04o}")
GROUP = Kind("the name of a group, or its number", parse_account, str)
USER = Kind("the name of a user, or its number", parse_account, str)
OPTIONS = Kind(
    "options among " + ", ".join(f"{k}=…" if v else k for k, v in MOUNT_OPTIONS.items()), parse_options, ",".join
)
