"""What a keeper holds of a mount, and how the next keeper gets it should this one die.

A service manager with a descriptor store (``FileDescriptorStoreMax=``) keeps copies; the mount then waits for the next
process of the service instead of failing its users, and that process goes on where the dead one stopped.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
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
TENANT: Final = "tenant-"


@dataclass
class Held:
    """One mount: its connection to the kernel, the capabilities agreed on it, the table of nodes, the control socket,
    which is bound once the mount answers, and those of tenants, by their names."""

    mount: Mounted
    fuse_fd: int
    agreed: Init
    table_fd: int
    listener: socket.socket | None = None
    tenants: dict[str, socket.socket] = field(default_factory=dict)

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
        sockets = [name for name in fds if name.startswith(TENANT)]
        if there is not None and {label, TABLE, SOCKET, *sockets} == fds.keys():
            _, minor, agreed = label.split("-")
            if there.minor == int(minor):
                tenants = {name.removeprefix(TENANT): socket.socket(fileno=fds[name]) for name in sockets}
                listener = socket.socket(fileno=fds[SOCKET])
                return cls(there, fds[label], Init(int(agreed, 16)), fds[TABLE], listener, tenants)
        for name, fd in fds.items():
            notify(FDSTOREREMOVE=1, FDNAME=name)
            os.close(fd)
        return None

    def _named(self) -> dict[str, int]:
        """The descriptors by the names they are kept under; that of the connection says what belongs to it."""
        named = {f"{FUSE}-{self.mount.minor}-{int(self.agreed):x}": self.fuse_fd, TABLE: self.table_fd}
        named |= {SOCKET: self.listener.fileno()} if self.listener is not None else {}
        return named | {f"{TENANT}{name}": each.fileno() for name, each in self.tenants.items()}

    def leave(self) -> None:
        """Give the service manager copies."""
        for name, fd in self._named().items():
            notify([fd], FDSTORE=1, FDNAME=name)

    def take(self, tenant: str, listener: socket.socket) -> None:
        """Hold the socket of a tenant too."""
        self.drop(tenant)
        self.tenants[tenant] = listener
        notify([listener.fileno()], FDSTORE=1, FDNAME=f"{TENANT}{tenant}")

    def drop(self, tenant: str) -> None:
        """A tenant is gone, or has another socket."""
        if (listener := self.tenants.pop(tenant, None)) is not None:
            notify(FDSTOREREMOVE=1, FDNAME=f"{TENANT}{tenant}")
            listener.close()

    def close(self) -> None:
        """The mount ends: close everything, the manager's copies too."""
        for name in self._named():
            notify(FDSTOREREMOVE=1, FDNAME=name)
        for listener in (self.listener, *self.tenants.values()):
            if listener is not None:
                listener.close()
        os.close(self.table_fd)
        os.close(self.fuse_fd)
