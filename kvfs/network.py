"""Whether a folder lies on a filesystem that other hosts change too."""

import ctypes
import os
from pathlib import Path

__all__ = ["is_network"]

_MAGICS = {
    0x6969,  # NFS
    0xFF534D42,  # CIFS
    0xFE534D42,  # SMB2
    0x00C36400,  # Ceph
    0x0BD00BD0,  # Lustre
    0x47504653,  # GPFS
    0x19830326,  # BeeGFS
    0x01021997,  # 9p
    0x5346414F,  # AFS
}
"""``f_type`` of statfs(2), from linux/magic.h and the filesystems' own headers."""


def is_network(path: Path) -> bool:
    """Whether ``path`` lies on a network filesystem, by its type.  OSError if it cannot be asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 64)()  # struct statfs begins with f_type, a long
    if libc.statfs(os.fsencode(path), buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(path))
    return (buffer[0] & 0xFFFFFFFF) in _MAGICS
