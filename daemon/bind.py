"""The control socket: a Unix socket whose name lies inside the mount, so that one volume carries data and control.

Binding it asks the mount's own server to make the node, so a disposable process does it: should the server hang, that
process is lost and nothing else.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from kvfs.daemon.tree import SOCKET
from kvfs.errors import MountError

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE: Final = 2.0
BACKLOG: Final = 128
NEWNS: Final = 0x00020000
NEWUSER: Final = 0x10000000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18

BIND: Final = f"""
import ctypes, os, socket, sys
libc = ctypes.CDLL(None)
for flags in ({NEWNS}, {NEWNS | NEWUSER}):
    if libc.unshare(flags) == 0:
        libc.mount(None, b"/", None, {MS_REC | MS_PRIVATE}, None)
        break
os.chdir(sys.argv[1])
*folders, name = sys.argv[3].strip("/").split("/")
for folder in folders:
    os.fchdir(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(name)
listener.listen({BACKLOG})
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"bound"], [listener.fileno()])
"""
"""A bound socket keeps the mount busy through which its name was made, so it is made through a private copy of the
mount; users then see it as busy only while they have files open. The path is relative, as a socket's full path may
have 107 bytes only, and walked without following links, as it is the worker who says what is there."""


def bind(point: Path, path: str = SOCKET) -> socket.socket:
    """Bind a control socket at ``path`` in the mount at ``point`` and listen. Raises MountError if that cannot be done
    soon."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BIND, str(point), str(theirs.fileno()), path],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        ours.settimeout(PATIENCE)
        try:
            _, fds, _, _ = socket.recv_fds(ours, 16, 1)
        except TimeoutError:
            child.kill()  # and not waited for: it may hang in the mount
            raise MountError(point, f"no control socket within {PATIENCE:g} s") from None
        _, complaint = child.communicate()
        if not fds:
            raise MountError(point, f"no control socket: {complaint.strip().rpartition(chr(10))[2]}")
        return socket.socket(fileno=fds[0])
