"""Start and end a daemon: the process that owns a mount, in the foreground or on its own.

This process, the keeper, opens /dev/fuse, mounts, and outlives the worker that serves the mount (`supervisor`). It is
the only one that needs rights, and reads no data of users.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvfs.daemon import rendezvous
from kvfs.daemon.fuse import connection, libfuse
from kvfs.daemon.handover import Channel, dump_config, dump_error, load_config, load_error, orders, python
from kvfs.daemon.held import Held
from kvfs.daemon.logs import log_to_stderr
from kvfs.daemon.notify import notify
from kvfs.daemon.remounting import Remounter
from kvfs.daemon.supervisor import Supervisor
from kvfs.errors import ConfigError, KvfsError, MountError, StoreBusy
from kvfs.files import OPEN_DIR, open_own
from kvfs.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvfs.config import Config
    from kvfs.daemon.rendezvous import Door

log = logging.getLogger(__name__)

UMOUNT_WAIT: Final = 15.0
"""Seconds that `umount` waits for the daemon to end."""


def mount(
    store: Path,
    mountpoint: Path,
    *,
    config: Config,
    foreground: bool = False,
    transport: str = "auto",
    fuse_options: Sequence[str] = (),
) -> None:
    """Show ``store`` at ``mountpoint``.

    Returns when the mount answers and its daemon goes on in the background, or, with ``foreground``, when the mount
    has been taken away. Raises MountError with what to do, StoreBusy for a store or mountpoint that another daemon
    has, NotAStore, ConfigError.
    """
    config = dataclasses.replace(
        config,
        store=Path(os.path.realpath(store)),
        mountpoint=connection.real(mountpoint),
        transport=transport,
        fuse_options=tuple(fuse_options),
    )
    if foreground:
        serve(config, lambda: None)
    else:
        _start(config)


def umount(mountpoint: Path, lazy: bool = False) -> None:
    """Take the mount away and wait until its daemon has ended. Raises MountError, for a mount in use too unless
    ``lazy``; a daemon whose files are still open then goes on in the background until they are closed."""
    point = connection.real(mountpoint)
    there = connection.mounted_at(point)
    if there is None or not there.fstype.startswith("fuse"):
        raise MountError(point, "no kvfs mount is there to take away")
    connection.umount(point, lazy)
    deadline = time.monotonic() + UMOUNT_WAIT
    with contextlib.suppress(KvfsError, OSError), Store.open(there.source) as store:
        while time.monotonic() < deadline:
            try:
                store.lock_daemon("umount")
            except StoreBusy:
                time.sleep(0.02)
            else:
                return


def serve(config: Config, announce: Callable[[], None]) -> None:
    """Mount and serve until the mount is taken away or a signal comes; ``announce`` is called once it answers.

    Raises as `mount`.
    """
    if config.store is None or config.mountpoint is None:
        raise ConfigError("both store and mountpoint are needed")
    with Store.open(config.store, config.durability) as store:
        store.lock_daemon(f"the daemon at {config.mountpoint} (pid {os.getpid()})")
        with rendezvous.door(config) as door:
            _serve(config, store.path, config.mountpoint, door, announce)


def _serve(config: Config, store: Path, point: Path, door: Door | None, announce: Callable[[], None]) -> None:
    held = Held.recovered(point)
    if held is not None:
        log.warning("%s goes on where a keeper that died has left it", point)
        _supervise(config, store, held, door, announce)
        return
    connection.clear(point)
    with _hold(point):
        if _use_kernel(config, point):
            _supervise(config, store, _mount(config, store, point), door, announce)
        elif config.worker_user is None:
            Remounter(config, point).run(announce)
        else:
            raise ConfigError("worker_user: the libfuse transport has no worker; start it as that user instead")


@contextlib.contextmanager
def _hold(point: Path) -> Iterator[None]:
    """Keep another daemon that starts at the same time from the same mountpoint."""
    try:
        fd = os.open(point, OPEN_DIR)
    except OSError as e:
        raise MountError(point, f"{e.strerror}; the mountpoint must be a folder that is there") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StoreBusy(point, "a daemon that starts there") from None
    finally:
        os.close(fd)


def _use_kernel(config: Config, point: Path) -> bool:
    """Tell which transport to use. Raises MountError where neither can be."""
    if config.transport == "kernel":
        return True
    able = os.geteuid() == 0 and os.access(connection.DEVICE, os.R_OK | os.W_OK)
    if config.transport == "auto" and able:
        return True
    reason = libfuse.missing()
    if reason is None:
        os.close(connection.open_device(point))  # fusermount3 opens it with the rights of its caller
        return False
    raise MountError(point, f"{reason}; engines can use the store without a mount: --store {config.store}")


def _mount(config: Config, store: Path, point: Path) -> Held:
    fuse_fd = connection.mount(point, store, connection.options(config))
    ours = connection.mounted_at(point)
    try:
        agreed = connection.negotiate(fuse_fd)
        if ours is None:
            raise MountError(point, "another process took the mount away at once")
    except BaseException:
        if ours is not None and connection.mounted_at(point) == ours:
            _take_away(point)
        os.close(fuse_fd)
        raise
    return Held.new(ours, fuse_fd, agreed)


def _supervise(config: Config, store: Path, held: Held, door: Door | None, announce: Callable[[], None]) -> None:
    def anew(old: Held) -> Held:
        log.warning("%s is mounted anew, as this kernel does not repeat what its worker has taken", old.mount.point)
        _detach(old)
        new = _mount(config, store, old.mount.point)
        old.close()  # the last descriptor of its connection: whoever waits for an answer gets an error
        return new

    supervisor = Supervisor(config, store, held, door, anew)
    try:
        supervisor.run(announce)
    finally:
        notify(STOPPING=1)
        _detach(supervisor.held)
        supervisor.stop()
        supervisor.held.close()


def _detach(held: Held) -> None:
    if connection.mounted_at(held.mount.point) == held.mount:
        _take_away(held.mount.point)


def _take_away(point: Path) -> None:
    try:
        connection.umount(point)
    except MountError as e:  # files are open: their readers go on, the name is free
        log.info("%s", e)
        connection.umount(point, lazy=True)


# --- in the background ---


def _start(config: Config) -> None:
    """Run `main` in a process of its own; return when it has announced itself, raise what it ran into."""
    log_path, log_fd = _open_log(config)
    ours, theirs = Channel.pair()
    with ours.sock, theirs.sock, os.fdopen(log_fd, "ab") as output:
        ours.send("mount", dump_config(config))
        subprocess.run(
            python("kvfs.daemon.keeper", theirs, config.store, config.mountpoint),
            pass_fds=[theirs.fileno()],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            check=False,
        )
        theirs.close()
        word, value, _ = ours.receive(None)
    if word == "error":
        raise load_error(value)
    if word != "ready":
        raise MountError(config.mountpoint, f"its daemon ended at once; see {log_path}")


def _open_log(config: Config) -> tuple[Path, int]:
    """Where a daemon in the background logs, open for appending; nowhere for a store that cannot be written."""
    if config.store is None:
        raise ConfigError("no store is named")
    with Store.open(config.store) as store:
        path = store.derived / f"daemon.{socket.gethostname()}.log"
        try:
            return path, open_own(store.derived, path.name, os.O_WRONLY | os.O_APPEND)
        except OSError as e:
            log.info("%s: %s; the daemon does not log", path, e.strerror)
            return Path(os.devnull), os.open(os.devnull, os.O_WRONLY)


def main() -> int:
    """Become a daemon in the background, and tell the starter when it serves or why it does not."""
    if os.fork():
        os._exit(0)  # the starter waits for this process only
    starter = Channel.inherited(int(sys.argv[-1]))
    rows, _ = orders(starter, "mount")
    config = load_config(rows)
    log_to_stderr(config.log_level)

    def announce() -> None:
        starter.send("ready")
        starter.close()

    try:
        serve(config, announce)
    except KvfsError as e:
        if not starter.send("error", dump_error(e)):  # it has gone on, as all was well
            log.error("%s", e)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
