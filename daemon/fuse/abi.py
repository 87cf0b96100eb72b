"""The kernel's FUSE protocol as kvfs uses it: structures, request codes, flags, ioctl numbers.

Names and layouts follow ``include/uapi/linux/fuse.h`` (API 7.45); the ``FUSE_`` prefix is left out. All structures
are in the byte order of the machine.
"""

from __future__ import annotations

import enum
from struct import Struct
from typing import Final

ROOT_ID: Final = 1
MAJOR: Final = 7
MINOR: Final = 45
OLDEST_MINOR: Final = 31
"""Linux 5.4; before it the structures differ."""

MAX_PAGES: Final = 256
MAX_WRITE: Final = MAX_PAGES * 4096
"""Bytes of the largest READ and WRITE."""

READ_BUFFER: Final = MAX_WRITE + 4096
"""Bytes that one request may take, its header included."""


class Op(enum.IntEnum):
    """Request codes."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


class Notice(enum.IntEnum):
    """Codes of what the server tells the kernel unasked; they stand in the error field of `OUT_HEADER`."""

    DELETE = 6
    RESEND = 7


UNIQUE_RESEND: Final = 1 << 63
"""Set in the id of a request that the kernel sends again after `Notice.RESEND`."""


class Init(enum.IntFlag):
    """Capabilities, negotiated once for each mount."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class Fopen(enum.IntFlag):
    """How the kernel is to treat an open file."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


class Fattr(enum.IntFlag):
    """Which fields of `SETATTR_IN` count."""

    SIZE = 1 << 3
    FH = 1 << 6


GETATTR_FH: Final = 1

IN_HEADER: Final = Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER: Final = Struct("=IiQ")  # len, error, unique
ATTR: Final = Struct("=QQQQQQIIIIIIIIII")
# ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags
ENTRY_OUT: Final = Struct("=QQQQII")  # nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec
ATTR_OUT: Final = Struct("=QII")  # attr_valid attr_valid_nsec dummy
INIT_IN: Final = Struct("=IIIII44x")  # major minor max_readahead flags flags2
INIT_OUT: Final = Struct("=IIIIHHIIHHII24x")
# major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages map_alignment
# flags2 max_stack_depth
GETATTR_IN: Final = Struct("=IIQ")  # getattr_flags dummy fh
SETATTR_IN: Final = Struct("=IIQQQ56x")  # valid padding fh size lock_owner
MKNOD_IN: Final = Struct("=IIII")  # mode rdev umask padding
OPEN_IN: Final = Struct("=II")  # flags open_flags
CREATE_IN: Final = Struct("=IIII")  # flags mode umask open_flags
OPEN_OUT: Final = Struct("=QIi")  # fh open_flags backing_id
RELEASE_IN: Final = Struct("=QIIQ")  # fh flags release_flags lock_owner
FLUSH_IN: Final = Struct("=QIIQ")  # fh unused padding lock_owner
FSYNC_IN: Final = Struct("=QII")  # fh fsync_flags padding
READ_IN: Final = Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
WRITE_IN: Final = Struct("=QQIIQII")  # fh offset size write_flags lock_owner flags padding
WRITE_OUT: Final = Struct("=II")  # size padding
GETXATTR_IN: Final = Struct("=II")  # size padding
GETXATTR_OUT: Final = Struct("=II")  # size padding
STATFS_OUT: Final = Struct("=QQQQQIII28x")  # blocks bfree bavail files ffree bsize namelen frsize
FORGET_IN: Final = Struct("=Q")  # nlookup
BATCH_FORGET_IN: Final = Struct("=II")  # count dummy
FORGET_ONE: Final = Struct("=QQ")  # nodeid nlookup
INTERRUPT_IN: Final = Struct("=Q")  # unique
DIRENT: Final = Struct("=QQII")  # ino off namelen type
DELETE_OUT: Final = Struct("=QQII")  # parent child namelen padding

BACKING_MAP: Final = Struct("=iIQ")  # fd flags padding
BACKING_OPEN: Final = 1 << 30 | BACKING_MAP.size << 16 | 229 << 8 | 1
BACKING_CLOSE: Final = 1 << 30 | 4 << 16 | 229 << 8 | 2
