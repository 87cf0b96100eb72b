"""Backing ids: the kernel's names for files that it reads itself, without asking the server.

Making one takes CAP_SYS_ADMIN and lends the maker's rights to all who open the file, so it is done for fit files only.
A worker without that right sends the open file to the keeper; one that has it (the two extra switches between processes
are half the time of an open) makes the id itself, by the same rules.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading
from pathlib import Path
from struct import Struct
from typing import Final

from kvfs.daemon.fuse.abi import BACKING_CLOSE, BACKING_MAP, BACKING_OPEN
from kvfs.files import is_sealed

CAP_SYS_ADMIN: Final = 21
REQUEST: Final = Struct("=i")  # 0 with a descriptor: make an id; else the id to close
NEW: Final = REQUEST.pack(0)
FD: Final = Struct("=i")
CONTROL_SPACE: Final = socket.CMSG_SPACE(FD.size)
REPLY: Final = Struct("=i")  # an id, or a negative error code


def privileged() -> bool:
    """Whether this process may make backing ids."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_SYS_ADMIN & 1)


class Lender:
    """Makes backing ids of one connection, for files of one store."""

    def __init__(self, fuse_fd: int, store: Path) -> None:
        self._fuse_fd = fuse_fd
        there = store.stat()
        self._device, self._owner = there.st_dev, there.st_uid

    def open(self, fd: int) -> int:
        """A backing id for an open file, which the caller may close. Raises OSError: EACCES for a file that is not fit
        (open for reading only, regular, and of the store's device and owner with one name, or in memory and sealed),
        else the kernel's."""
        there = os.fstat(fd)
        is_stored = (there.st_dev, there.st_uid, there.st_nlink) == (self._device, self._owner, 1)
        is_read = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if not (stat.S_ISREG(there.st_mode) and is_read and (is_stored or is_sealed(fd))):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        backing: int = fcntl.ioctl(self._fuse_fd, BACKING_OPEN, bytearray(BACKING_MAP.pack(fd, 0, 0)))
        return backing

    def close(self, backing: int) -> None:
        """Give an id back; files opened with it go on. One that is unknown was given back by an earlier worker."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fuse_fd, BACKING_CLOSE, REQUEST.pack(backing))

    def serve(self, sock: socket.socket) -> None:
        """Do it for the `Borrower` at the other end until that is gone, in a thread of the caller's."""
        with sock:
            while True:
                data, control, _, _ = sock.recvmsg(REQUEST.size, CONTROL_SPACE, socket.MSG_CMSG_CLOEXEC)
                if len(data) != REQUEST.size:
                    return
                (backing,) = REQUEST.unpack(data)
                if backing:
                    self.close(backing)
                    continue
                result = self._lend(FD.unpack(control[0][2])[0]) if control else -errno.EBADF
                try:
                    sock.send(REPLY.pack(result))
                except OSError:
                    return

    def _lend(self, fd: int) -> int:
        try:
            return self.open(fd)
        except OSError as e:
            return -(e.errno or errno.EIO)
        finally:
            os.close(fd)


class Borrower:
    """A `Lender` in another process, at the other end of a socket pair (SOCK_SEQPACKET). Thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._lock = sock, threading.Lock()

    def open(self, fd: int) -> int:
        """As `Lender.open`."""
        with self._lock:
            self._sock.sendmsg([NEW], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, FD.pack(fd))])
            data = self._sock.recv(REPLY.size)
        if len(data) != REPLY.size:
            raise OSError(errno.EPIPE, "the keeper is gone")
        (result,) = REPLY.unpack(data)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return int(result)

    def close(self, backing: int) -> None:
        """As `Lender.close`."""
        with self._lock:
            self._sock.send(REQUEST.pack(backing))
