"""What a keeper holds of a mount, and how the next keeper gets it should this one die.

A service manager with a descriptor store (``FileDescriptorStoreMax=``) keeps copies; the mount then waits for the next
process of the service instead of failing its users, and that process goes on where the dead one stopped.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from kvfs.daemon.fuse import connection
from kvfs.daemon.fuse.abi import Init
from kvfs.daemon.notify import kept, notify

if TYPE_CHECKING:
    from pathlib import Path

    from kvfs.daemon.fuse.connection import Mounted

FUSE: Final = "fuse"
TABLE: Final = "nodes"
SOCKET: Final = "socket"


@dataclass
class Held:
    """One mount: its connection to the kernel, the capabilities agreed on it, the table of nodes, and the control
    socket, which is bound once the mount answers."""

    mount: Mounted
    fuse_fd: int
    agreed: Init
    table_fd: int
    listener: socket.socket | None = None

    @classmethod
    def new(cls, mount: Mounted, fuse_fd: int, agreed: Init) -> Self:
        """A mount just made."""
        return cls(mount, fuse_fd, agreed, os.memfd_create("kvfs-nodes", os.MFD_CLOEXEC))

    @classmethod
    def recovered(cls, point: Path) -> Self | None:
        """What a dead keeper left of the mount at ``point``; None unless all of it is there and it is still mounted."""
        fds = kept()
        there = connection.mounted_at(point)
        label = next((name for name in fds if name.startswith(f"{FUSE}-")), "")
        if there is not None and {label, TABLE, SOCKET} == fds.keys():
            _, minor, agreed = label.split("-")
            if there.minor == int(minor):
                return cls(there, fds[label], Init(int(agreed, 16)), fds[TABLE], socket.socket(fileno=fds[SOCKET]))
        for name, fd in fds.items():
            notify(FDSTOREREMOVE=1, FDNAME=name)
            os.close(fd)
        return None

    def _named(self) -> dict[str, int]:
        """The descriptors by the names they are kept under; that of the connection says what belongs to it."""
        named = {f"{FUSE}-{self.mount.minor}-{int(self.agreed):x}": self.fuse_fd, TABLE: self.table_fd}
        return named | ({SOCKET: self.listener.fileno()} if self.listener is not None else {})

    def leave(self) -> None:
        """Give the service manager copies."""
        for name, fd in self._named().items():
            notify([fd], FDSTORE=1, FDNAME=name)

    def close(self) -> None:
        """The mount ends: close everything, the manager's copies too."""
        for name in self._named():
            notify(FDSTOREREMOVE=1, FDNAME=name)
        if self.listener is not None:
            self.listener.close()
        os.close(self.table_fd)
        os.close(self.fuse_fd)
