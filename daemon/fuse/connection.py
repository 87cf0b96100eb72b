"""A mount and its connection to the kernel: make one, agree on capabilities, find and remove one.

Nothing here names a path inside a mount: a server that waits for itself waits for ever.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kvfs.daemon.fuse.abi import (
    IN_HEADER,
    INIT_IN,
    INIT_OUT,
    MAJOR,
    MAX_PAGES,
    MAX_WRITE,
    MINOR,
    OLDEST_MINOR,
    OUT_HEADER,
    READ_BUFFER,
    Init,
    Op,
)
from kvfs.errors import MountError, StoreBusy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvfs.config import Config

DEFAULT_OPTIONS: Final = ("nosuid", "nodev", "noatime", "default_permissions")
FSTYPE: Final = "fuse.kvfs"
DEVICE: Final = Path("/dev/fuse")

MS_FLAGS: Final = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024}
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

WANTED: Final = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC
    | Init.BIG_WRITES
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.PARALLEL_DIROPS
    | Init.HANDLE_KILLPRIV
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.EXT
    | Init.PASSTHROUGH
    | Init.HAS_RESEND
)
STACK_DEPTH: Final = 1
"""Filesystems that may lie below the mount: 1 lets a store on a plain filesystem be passed through."""

MAX_BACKGROUND: Final = 64

_libc = ctypes.CDLL(None, use_errno=True)


class Mounted(NamedTuple):
    """One line of the kernel's mount table."""

    point: Path
    fstype: str
    source: str
    minor: int
    """Minor device number; names the connection in ``/sys/fs/fuse/connections``."""


def mounts() -> list[Mounted]:
    """Every mount this process sees, later ones last."""
    table = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        columns, (fstype, source, *_) = left.split(" "), right.split(" ")
        table.append(Mounted(Path(_unescape(columns[4])), fstype, _unescape(source), int(columns[2].split(":")[1])))
    return table


def mounted_at(point: Path) -> Mounted | None:
    """What lies uppermost on ``point`` (absolute, no links), if anything."""
    return next((m for m in reversed(mounts()) if m.point == point), None)


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def real(point: Path) -> Path:
    """The path of a mountpoint without links; asks nothing of what is mounted on it."""
    absolute = Path(os.path.abspath(point))
    return Path(os.path.realpath(absolute.parent)) / absolute.name


def options(config: Config) -> list[str]:
    """The options of the mount: the defaults, and those of the configuration, which win."""
    given = [*config.fuse_options, *(["allow_other"] if config.allow_other else [])]
    return [*(word for word in DEFAULT_OPTIONS if word not in given), *given]


def open_device(point: Path) -> int:
    """A new connection to the kernel, for a mount at ``point``. Raises MountError with what to do."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as e:
        hint = "as root, chmod 0666 it, or allow the device in the container's cgroup"
        raise MountError(point, f"{DEVICE}: {e.strerror}; {hint}") from None
    except OSError as e:
        hint = "load the fuse module, or pass the device into the container"
        raise MountError(point, f"{DEVICE}: {e.strerror}; {hint}") from None


def mount(point: Path, source: Path, options: Iterable[str]) -> int:
    """Mount a new FUSE connection on ``point`` and return its descriptor, capabilities not yet agreed.

    ``options`` are words of mount(8): flags, ``allow_other``, ``default_permissions``, ``max_read=``, ``context=``,
    ``fsname=`` and ``subtype=``. Raises MountError with what to do.
    """
    flags, fstype, shown, data = 0, FSTYPE, str(source), []
    for option in options:
        name, _, value = option.partition("=")
        if name in MS_FLAGS:
            flags |= MS_FLAGS[name]
        elif name == "fsname":
            shown = value
        elif name == "subtype":
            fstype = f"fuse.{value}"
        else:
            data.append(option)
    fd = open_device(point)
    words = [f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}", *data]
    if _libc.mount(shown.encode(), os.fsencode(point), fstype.encode(), flags, ",".join(words).encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        hint = "; it needs CAP_SYS_ADMIN" if code == errno.EPERM else ""
        raise MountError(point, os.strerror(code) + hint)
    return fd


def negotiate(fd: int) -> Init:
    """Answer the kernel's first request, and return the capabilities that hold from now on.

    This happens once in the life of a mount, so it is done before any worker is there. Raises MountError.
    """
    request = os.read(fd, READ_BUFFER)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    major, minor, readahead, low, high = INIT_IN.unpack_from(
        request.ljust(IN_HEADER.size + INIT_IN.size, b"\0"), IN_HEADER.size
    )
    if opcode != Op.INIT or major != MAJOR or minor < OLDEST_MINOR:
        raise MountError(DEVICE, f"the kernel speaks FUSE {major}.{minor}, kvfs {MAJOR}.{OLDEST_MINOR} or later")
    offered = Init(low | (high << 32 if low & Init.EXT else 0))
    agreed = WANTED & offered
    depth = STACK_DEPTH if Init.PASSTHROUGH in agreed else 0
    reply = INIT_OUT.pack(
        MAJOR,
        min(minor, MINOR),
        readahead,
        agreed & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        MAX_WRITE,
        1,
        MAX_PAGES,
        0,
        agreed >> 32,
        depth,
    )
    os.writev(fd, [OUT_HEADER.pack(OUT_HEADER.size + len(reply), 0, unique), reply])
    return agreed


def umount(point: Path, lazy: bool = False) -> None:
    """Take the mount on ``point`` away; ``lazy`` also while files are open. Raises MountError."""
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(point), flags) == 0:
        return
    code = ctypes.get_errno()
    helper = shutil.which("fusermount3")
    if code == errno.EPERM and helper:
        command = [helper, "-uz" if lazy else "-u", str(point)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return
        raise MountError(point, done.stderr.strip())
    hint = "; close its open files, or unmount lazily (-l)" if code == errno.EBUSY else ""
    raise MountError(point, f"cannot unmount: {os.strerror(code)}{hint}")


def clear(point: Path, patience: float = 2.0) -> None:
    """Make ``point`` free to mount on: take away dead kvfs mounts, refuse live ones.

    A disposable process looks at the mount, since its server may hang. Raises StoreBusy for a mount whose server
    lives or does not answer in ``patience`` seconds, MountError for one that cannot be taken away.
    """
    while (there := mounted_at(point)) is not None and there.fstype == FSTYPE:
        probe = subprocess.Popen([sys.executable, "-I", "-S", "-c", PROBE, str(point)])
        try:
            code = probe.wait(patience)
        except subprocess.TimeoutExpired:
            probe.kill()
            code = 0
        if code != errno.ENOTCONN:
            raise StoreBusy(point, f"a daemon that serves {there.source} there")
        umount(point, lazy=True)


PROBE: Final = """
import os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as e:
    sys.exit(e.errno)
"""
