"""Flags that come from the table of settings, and what ``-o`` may say: both end as overrides of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfs import config
from kvfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Override = tuple[str, object, str]
"""A setting's name, its raw value, and where that was said."""

POSITIONAL = frozenset({"store", "mountpoint"})
"""Settings that commands take as arguments."""

FSTAB_WORDS = frozenset({"auto", "noauto", "user", "users", "group", "defaults", "nofail", "_netdev", "rw"})
"""Options in /etc/fstab that speak to mount(8) and systemd, as those that begin with ``x-`` do. mount(8) adds ``rw``
wherever ``ro`` is not given, so it must not overrule the configuration."""

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Configuration file [default: $KVFS_CONFIG, or {config.DEFAULT_FILE} if it exists].",
)


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one flag for each setting but the positional ones; ``fuse_options`` is ``-o``."""
    for row in reversed(list(config.SETTINGS.values())):
        if row.name in POSITIONAL or row.name == "fuse_options":
            continue
        if row.kind is config.SWITCH:
            command = click.option(f"{row.flag}/--no-{row.flag[2:]}", row.name, default=None, help=row.doc)(command)
        else:
            default = f"; default {row.show(row.default)}" if row.show(row.default) else ""
            text = f"{row.doc} [{row.kind.form}{default}]"
            command = click.option(row.flag, row.name, metavar="VALUE", help=text)(command)
    return command


def from_flags(flags: dict[str, Any]) -> list[Override]:
    """Keep the settings that were given as flags or arguments."""
    return [
        (name, value, f"argument {name.upper()}" if name in POSITIONAL else f"flag {config.SETTINGS[name].flag}")
        for name, value in flags.items()
        if value is not None
    ]


def from_mount_options(words: Iterable[str]) -> list[Override]:
    """Read the words of ``-o a,b=c``: settings by their names, ``ro``, options of the mount itself.

    What speaks to mount(8) is passed over; anything else is a ConfigError that names the nearest word.
    """
    overrides: list[Override] = []
    mount_options = []
    settings = {row.name for row in config.SETTINGS.values()} - POSITIONAL - {"fuse_options"}
    for word in words:
        name, sign, value = word.partition("=")
        if word == "ro":
            overrides.append(("read_only", "true", "option -o ro"))
        elif name in settings:
            overrides.append((name, value if sign else "true", f"option -o {name}"))
        elif name in config.MOUNT_OPTIONS:
            mount_options.append(word)
        elif name not in FSTAB_WORDS and not name.startswith("x-"):
            known = [*settings, *config.MOUNT_OPTIONS, "ro"]
            raise ConfigError(f"option -o {name}: there is no such option{config.nearest(name, known)}")
    if mount_options:
        overrides.append(("fuse_options", mount_options, "option -o"))
    return overrides
