"""Where a keeper and a worker meet that did not start each other: both are services of their own.

The keeper listens on a Unix socket; a worker connects and is handed the same orders and descriptors as one that the
keeper starts. Who connects says the kernel: only processes of the worker's user are let in, one at a time; further
ones wait for their turn. The socket must not lie in a folder that containers see, where anybody can be that user.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import stat
import time
from struct import Struct
from typing import TYPE_CHECKING, Final

from kvfs.daemon.handover import Channel
from kvfs.daemon.sandbox import account
from kvfs.errors import ConfigError, MountError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.config import Config

log = logging.getLogger(__name__)

MODE: Final = 0o666
"""Of the socket: the folder says who reaches it, the kernel who they are."""

BACKLOG: Final = 4
RETRY: Final = 0.05
"""Seconds between a worker's attempts to reach a keeper that is not there yet."""

PATIENCE: Final = 10.0
"""Seconds after which it says that it waits."""

PEER: Final = Struct("=iII")  # pid uid gid
SO_PEERPIDFD: Final = 77
FD: Final = Struct("=i")


class Door:
    """The keeper's end."""

    def __init__(self, path: Path, uid: int) -> None:
        """Listen at ``path`` for workers of the user ``uid``. Raises MountError with what to do."""
        self._path, self._uid = path, uid
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(path.lstat().st_mode):
                    path.unlink()  # of a keeper that died: the caller has the only one of this store
            self._sock.bind(os.fspath(path))
            path.chmod(MODE)
            self._sock.listen(BACKLOG)
            self._sock.setblocking(False)
        except OSError as e:
            self._sock.close()
            raise MountError(path, f"worker_socket: {e.strerror or e}; name a new file in a folder of root") from None

    def admit(self) -> tuple[Channel, int] | None:
        """The connection and the process (a pidfd) of a worker that waits; None if there is none."""
        while True:
            try:
                peer, _ = self._sock.accept()
            except OSError:  # nobody waits, or not any more
                return None
            pid, uid, _ = PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            pidfd = _process(peer, pid) if uid == self._uid else None
            if pidfd is not None:
                return Channel(peer), pidfd
            peer.close()
            log.warning("%s: process %d of user %d is no worker of this mount and is sent away", self._path, pid, uid)

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    def close(self) -> None:
        """Listen no more."""
        self._sock.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


@contextlib.contextmanager
def door(config: Config) -> Iterator[Door | None]:
    """The door that the setting ``worker_socket`` asks for, if it does. Raises ConfigError, MountError."""
    if config.worker_socket is None:
        yield None
        return
    if config.worker_user is None:
        raise ConfigError("worker_socket: set worker_user too, the user whose processes are let in there")
    with contextlib.closing(Door(config.worker_socket, account(config.worker_user).pw_uid)) as opened:
        yield opened


def _process(peer: socket.socket, pid: int) -> int | None:
    """A pidfd of the process at the other end; None if that has ended. Never one that got its number later."""
    try:
        (pidfd,) = FD.unpack(peer.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, FD.size))
    except OSError:  # Linux 6.4 or earlier, or it is no more
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
    if select.select([peer], [], [], 0)[0]:  # it says nothing before it has its orders: this is its end
        os.close(pidfd)
        return None
    return int(pidfd)


def meet(path: Path) -> Channel:
    """The worker's end: wait for the keeper that listens at ``path``. Raises MountError if it cannot be reached."""
    complains = time.monotonic() + PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(os.fspath(path))
            return Channel(sock)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
        except OSError as e:
            sock.close()
            raise MountError(path, f"the keeper cannot be reached: {e.strerror or e}") from None
        if time.monotonic() > complains:
            log.warning("no keeper has come to %s yet", path)
            complains = math.inf
        time.sleep(RETRY)
