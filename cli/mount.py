"""``kvfs mount`` and ``umount``, and the helper that mount(8) calls for lines of type kvfs in /etc/fstab."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from kvfs import config
from kvfs.cli import options
from kvfs.cli.boundary import Command
from kvfs.errors import ConfigError

FSTAB_ESCAPES = {" ": "\\040", "\t": "\\011", "\n": "\\012", "\\": "\\134"}


def split_words(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """Split every ``-o`` at its commas."""
    return [word for value in values for word in value.split(",") if word]


mount_options = click.option(
    "-o",
    "mount_options",
    multiple=True,
    metavar="OPT[,OPT…]",
    callback=split_words,
    help="Options as in /etc/fstab: settings by name (threads=8, ro, allow_other) and options of the mount.",
)


@click.command(short_help="Show a store as a filesystem.")
@click.argument("store", required=False, type=click.Path(path_type=Path))
@click.argument("mountpoint", required=False, type=click.Path(path_type=Path))
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground, for service managers and containers.")
@mount_options
@click.option("--print-fstab", is_flag=True, help="Print the line for /etc/fstab instead of mounting.")
@options.config_option
@options.setting_options
def mount(
    foreground: bool, mount_options: list[str], print_fstab: bool, config_file: Path | None, **flags: Any
) -> None:
    """Show STORE at MOUNTPOINT. Returns once the mount answers; the daemon goes on in the background.

    STORE and MOUNTPOINT may come from the configuration. `kvfs umount` or SIGTERM ends the daemon.
    """
    overrides = [*options.from_flags(flags), *options.from_mount_options(mount_options)]
    settings = config.load(config_file, overrides=overrides)
    if print_fstab:
        click.echo(fstab_line(settings))
    else:
        start(settings, foreground)


def start(settings: config.Config, foreground: bool) -> None:
    """Start the daemon; raises ConfigError unless both ends are named, and what the keeper raises."""
    store, mountpoint = ends(settings)
    from kvfs.daemon import keeper
    from kvfs.daemon.logs import log_to_stderr

    if foreground:
        log_to_stderr(settings.log_level)
    keeper.mount(
        store,
        mountpoint,
        config=settings,
        foreground=foreground,
        transport=settings.transport,
        fuse_options=settings.fuse_options,
    )


def ends(settings: config.Config) -> tuple[Path, Path]:
    """Return the store and the mount point; ConfigError names the one that is missing."""
    if settings.store is None:
        raise ConfigError("no store is named; give it as the first argument, or as `store` in the configuration")
    if settings.mountpoint is None:
        raise ConfigError(
            "no mount point is named; give it as the second argument, or as `mountpoint` in the configuration"
        )
    return settings.store, settings.mountpoint


def fstab_line(settings: config.Config) -> str:
    """Return the line that mounts with these settings at boot, once the store's own filesystem is there."""
    from kvfs.network import is_network

    store, mountpoint = ends(settings)
    words = [
        "ro" if settings.read_only else "rw",
        "nosuid",
        "nodev",
        "nofail",
        f"x-systemd.requires-mounts-for={store}",
    ]
    if is_network(next(folder for folder in (store, *store.parents) if folder.exists())):
        words.append("_netdev")
    for name, row in config.SETTINGS.items():
        value = getattr(settings, name)
        if name == "fuse_options":
            words += [word for word in value if word not in words]
        elif name not in options.POSITIONAL | {"read_only"} and value != row.default:
            words.append(name if value is True else f"{name}={row.show(value)}")
    columns = [str(store), str(mountpoint), "kvfs", ",".join(words), "0", "0"]
    return " ".join("".join(FSTAB_ESCAPES.get(c, c) for c in column) for column in columns)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("mountpoint", type=click.Path(path_type=Path))
@mount_options
@click.option("-f", "fake", is_flag=True, help="Check the options, mount nothing.")
@click.option("-s", "sloppy", is_flag=True, hidden=True)
@click.option("-n", "no_mtab", is_flag=True, hidden=True)
@click.option("-v", "verbose", is_flag=True, help="Log more.")
@click.option("-t", "kind", hidden=True)
def mount_helper(
    store: Path, mountpoint: Path, mount_options: list[str], fake: bool, verbose: bool, **_: object
) -> None:
    """Mount as mount(8) asks: mount.kvfs STORE MOUNTPOINT [-o options]."""
    overrides = options.from_mount_options(mount_options)
    if verbose:
        overrides.append(("log_level", "debug", "flag -v"))
    settings = config.load(
        overrides=[("store", store, "argument STORE"), ("mountpoint", mountpoint, "argument MOUNTPOINT"), *overrides]
    )
    if not fake:
        start(settings, foreground=False)


@click.command(short_help="End a mount and its daemon.")
@click.argument("mountpoint", required=False, type=click.Path(path_type=Path))
@click.option("-l", "--lazy", is_flag=True, help="Detach now, even while files are open; clean up when they close.")
def umount(mountpoint: Path | None, lazy: bool) -> None:
    """Unmount MOUNTPOINT and end its daemon. Without -l a mount in use stays."""
    from kvfs.daemon import keeper

    keeper.umount(_named(mountpoint), lazy)


@click.command(short_help="Have a fresh worker take over a mount.")
@click.argument("mountpoint", required=False, type=click.Path(path_type=Path))
def reload(mountpoint: Path | None) -> None:
    """Replace the worker behind MOUNTPOINT by a fresh one, of the version that is installed now.

    Readers, maps and leases go on; a file being copied in fails at its close. Settings stay those of the mount.
    """
    from kvfs.client import MountClient

    with MountClient(_named(mountpoint)) as client:
        client.reload()


@click.command(short_help="Serve a mount as a service of its own.")
@click.argument("socket", type=click.Path(path_type=Path))
def worker(socket: Path) -> None:
    """Serve the mount whose keeper waits for a worker at SOCKET (its setting worker_socket), as the user who runs this.

    Everything else comes from the keeper. SIGTERM makes room for the next worker; the keeper says when to stop.
    """
    from kvfs.daemon.handover import ONE_THREAD, python
    from kvfs.daemon.rendezvous import meet

    keeper = meet(socket)
    os.set_inheritable(keeper.fileno(), True)
    # As a keeper starts its child: with one thread, and nothing of this command in it.
    command = python("kvfs.daemon.worker", keeper, socket)
    os.execve(command[0], command, {**os.environ, **ONE_THREAD})  # noqa: S606 - this same program


def _named(mountpoint: Path | None) -> Path:
    point = mountpoint or config.load().mountpoint
    if point is None:
        raise ConfigError("no mount point is named; give it as the argument")
    return point
