"""Messages to a service manager (sd_notify): ready, status, still alive, stopping; and descriptors that it keeps for
the next process of the service (FDSTORE). Nothing happens without one."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START: where the descriptors that the manager passes begin."""


def managed() -> bool:
    """Whether a service manager started this process, and will start another when it dies."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(fds: Sequence[int] = (), **fields: str | int) -> None:
    """Send fields such as ``READY=1`` or ``STATUS="…"`` to the socket that ``NOTIFY_SOCKET`` names."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    text = "\n".join(f"{name}={value}" for name, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(sock, [text.encode()], list(fds))
        except OSError:  # the manager is busy or gone; it will ask or restart
            pass


def kept() -> dict[str, int]:
    """The descriptors that the manager passes to this process, by their names; they are the caller's to close."""
    words = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if words["PID"] != str(os.getpid()) or not words["FDNAMES"]:
        return {}
    fds = range(FIRST_FD, FIRST_FD + int(words["FDS"]))
    for fd in fds:
        os.set_inheritable(fd, False)
    return dict(zip(words["FDNAMES"].split(":"), fds, strict=True))
