"""The filesystem that the mount shows, written once for both transports, in the interface of fusepy's ``Operations``.

Methods raise KvfsError or OSError; attributes are ``st_*`` dictionaries with times in nanoseconds. ``st_ino`` is the
inode of the file in the store that a path shows now, 0 where there is none. Threads call at will.
"""

from __future__ import annotations

import errno
import grp
import itertools
import json
import os
import stat
import threading
import time
from typing import TYPE_CHECKING, Final

from kvfs.daemon import facts, tree
from kvfs.daemon.incoming import Incoming, refusal
from kvfs.daemon.shown import Shown
from kvfs.daemon.tree import Place, What
from kvfs.names import is_leaf, part_name
from kvfs.network import is_network
from kvfs.verify import Opened

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfs.config import Config
    from kvfs.daemon.catalog import Catalog

WRITING: Final = os.O_ACCMODE | os.O_TRUNC | os.O_APPEND
FOREVER: Final = 10 * 365 * 86400
HOUR: Final = 3600
STATS_AGE: Final = 1.0
"""Seconds for which ``stats.json`` shows the same figures, so that its size fits its content."""

LIFETIMES: Final = {
    What.ROOT: (FOREVER, FOREVER),
    What.META: (FOREVER, FOREVER),
    What.SOCKET: (FOREVER, FOREVER),
    What.MODELS: (FOREVER, 1),
    What.MODEL: (60, 60),
    What.NAMESPACE: (60, 1),
    What.LEAF: (60, 1),
    What.PART: (HOUR, HOUR),
}
"""Seconds for which the kernel may believe a name, and attributes, without asking; removals are told to it."""


class View:
    """The tree of one store. ``socket_bound``: an earlier worker's clients have the control socket already.

    A transport may set ``before_slow``, which is called before what may take more than microseconds, and ask
    ``is_remote``: whether the store lies on a network filesystem.
    """

    use_ns = True

    def __init__(self, catalog: Catalog, config: Config, config_text: str, socket_bound: bool = False) -> None:
        self._catalog, self._config = catalog, config
        self._shown = Shown(catalog)
        self._config_text = config_text.encode()
        self._socket_bound = socket_bound
        self.is_remote = is_network(catalog.store.path)
        self.before_slow: Callable[[], None] = lambda: None
        self._started = time.time_ns()
        self._lock = threading.Lock()
        self._next_handle = itertools.count(self._started)
        self._handles: dict[int, int | bytes | Incoming] = {}
        self._incoming: dict[str, Incoming] = {}
        self._models: dict[bytes, str] = {}
        self._stats: tuple[float, bytes] = (0.0, b"")

    # --- names ---

    def _place(self, path: str) -> Place:
        place = tree.find(path)
        if place is None:
            raise refusal(errno.ENOENT)
        return place

    def _file(self, place: Place) -> Path:
        """The file or folder in the store that a place shows."""
        base = self._catalog.store.path
        match place.what:
            case What.NAMESPACE:
                return base / place.ns.hex()
            case What.MANIFEST | What.LEAF:
                return base / place.ns.hex() / place.name
        return base

    def lifetime(self, path: str) -> tuple[int, int]:
        """Seconds for which the kernel may keep the name, and the attributes, of an existing path."""
        if path in self._incoming:
            return 0, 0
        return LIFETIMES.get(self._place(path).what, (1, 1))

    def getattr(self, path: str, _fh: int | None = None) -> dict[str, int]:
        """Attributes of what is there, parts being copied in included; FileNotFoundError."""
        place = self._place(path)
        match place.what:
            case What.PART:
                incoming = self._incoming.get(path)
                st, size = (s := incoming.stat(), s.st_size) if incoming else self._shown.stat(place, self.before_slow)
                if not stat.S_ISREG(st.st_mode):
                    raise refusal(errno.ENOENT)
                return attributes(st, st.st_mode, size, st.st_ino)
            case What.MANIFEST:
                st = os.lstat(self._file(place))
                return attributes(st, stat.S_IFREG | 0o444, st.st_size)
            case What.NAMESPACE | What.LEAF:
                self._catalog.store.manifest(place.ns)
                try:
                    st = os.lstat(self._file(place))
                except FileNotFoundError:  # a leaf folder that no part needed yet
                    st = os.lstat(self._catalog.store.path / place.ns.hex())
                return attributes(st, stat.S_IFDIR | stat.S_IMODE(st.st_mode))
        return self._made_up(place)

    def unlinked(self, size: int, mtime: int) -> dict[str, int]:
        """Attributes of a part that is open though its name is gone."""
        st = os.lstat(self._catalog.store.path)
        gone = attributes(st, stat.S_IFREG | 0o440, size)
        return gone | {"st_nlink": 0, "st_atime": mtime, "st_mtime": mtime, "st_ctime": mtime}

    def _made_up(self, place: Place) -> dict[str, int]:
        """Attributes of what lies in no store."""
        st = os.lstat(self._catalog.store.path)
        match place.what:
            case What.STATS | What.CONFIG:
                return attributes(st, stat.S_IFREG | 0o444, len(self._text(place)))
            case What.MODEL:
                return attributes(st, stat.S_IFLNK | 0o777, len(self._link(place)))
            case What.SOCKET:
                if not self._socket_bound:
                    raise refusal(errno.ENOENT)
                return attributes(st, stat.S_IFSOCK | self._config.socket_mode) | self._socket_owner()
        return attributes(st, stat.S_IFDIR | 0o755)

    def _socket_owner(self) -> dict[str, int]:
        group = self._config.socket_group
        if group is None:
            return {}
        return {"st_gid": int(group) if group.isdigit() else grp.getgrnam(group).gr_gid}

    def readdir(self, path: str, _fh: int | None = None) -> list[tuple[str, int]]:
        """Names in a folder, each with its type; parts being copied in are not among them."""
        place = self._place(path)
        names = [(".", stat.S_IFDIR), ("..", stat.S_IFDIR)]
        match place.what:
            case What.ROOT:
                folders = [tree.META, tree.MODELS, *(ns.hex() for ns in self._catalog.store.namespaces())]
                names += [(name, stat.S_IFDIR) for name in folders]
            case What.META:
                names += [("stats.json", stat.S_IFREG), ("config.toml", stat.S_IFREG)]
                names += [("sock", stat.S_IFSOCK)] if self._socket_bound else []
            case What.MODELS:
                names += [(name, stat.S_IFLNK) for name in sorted(self._model_names().values())]
            case What.NAMESPACE:
                self._catalog.store.manifest(place.ns)
                leaves = sorted(filter(is_leaf, os.listdir(self._file(place))))
                names += [("manifest.json", stat.S_IFREG), *((leaf, stat.S_IFDIR) for leaf in leaves)]
            case What.LEAF:
                found = self._catalog.store.scan_leaf(place.ns, place.name)
                names += sorted((name, stat.S_IFREG) for name in {part_name(each.key, each.part) for each in found})
            case _:
                raise refusal(errno.ENOTDIR)
        return names

    def _model_names(self) -> dict[bytes, str]:
        store = self._catalog.store
        present = store.namespaces()
        for ns in present:
            if ns not in self._models:
                self._models[ns] = tree.model_name(ns, store.info(ns))
        return {ns: self._models[ns] for ns in present}

    def _link(self, place: Place) -> str:
        for ns, name in self._model_names().items():
            if name == place.name:
                return f"../{ns.hex()}"
        raise refusal(errno.ENOENT)

    def readlink(self, path: str) -> str:
        """Where a name of a model leads."""
        place = self._place(path)
        if place.what is not What.MODEL:
            raise refusal(errno.EINVAL)
        return self._link(place)

    def statfs(self, _path: str) -> dict[str, int]:
        """Space of the filesystem that the store lies on."""
        st = os.statvfs(self._catalog.store.path)
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
        return {name: getattr(st, name) for name in names}

    # --- extended attributes ---

    def listxattr(self, path: str) -> list[str]:
        """Names of what is known of a part besides its bytes."""
        return list(facts.NAMES) if self._place(path).what is What.PART else []

    def getxattr(self, path: str, name: str, _position: int = 0) -> bytes:
        """What is known of a part, as decimal or plain text; ENODATA."""
        place = self._place(path)
        if place.what is not What.PART or name not in facts.NAMES:
            raise refusal(errno.ENODATA)
        return facts.fact(self._catalog, place, name)

    # --- reading ---

    def _text(self, place: Place) -> bytes:
        match place.what:
            case What.CONFIG:
                return self._config_text
            case What.MANIFEST:
                return self._catalog.store.manifest_text(place.ns)
        with self._lock:
            made, text = self._stats
            if time.monotonic() - made > STATS_AGE or not text:
                text = json.dumps(self._catalog.stats(), indent=1, sort_keys=True).encode() + b"\n"
                self._stats = time.monotonic(), text
            return text

    def open(self, path: str, flags: int) -> int:
        """A handle for reading; raises as `open_file`."""
        opened = self.open_file(path, flags)
        return self.keep(opened.fd if isinstance(opened, Opened) else opened)

    def open_file(self, path: str, flags: int) -> Opened | bytes:
        """A part in its raw form, or the content of a file that is made up.

        A part is verified first unless it has been since boot, and decoded if it is stored in its coded form: damage is
        EIO, and it goes to quarantine. EROFS for anything but reading, for root too; EBUSY for a part being copied in,
        and while there is no memory to decode one.
        """
        place = self._place(path)
        if path in self._incoming:
            raise refusal(errno.EBUSY)
        if flags & WRITING:
            raise refusal(errno.EROFS)
        match place.what:
            case What.PART:
                opened = self._catalog.show(place.ns, place.key, place.part, before_slow=self.before_slow)
                self._catalog.touch(place.ns, [place.key])
                return opened
            case What.STATS | What.CONFIG | What.MANIFEST:
                self.before_slow()
                return self._text(place)
        raise refusal(errno.EISDIR)

    def keep(self, opened: int | bytes | Incoming) -> int:
        """A handle for what `open_file` gave, until `release`."""
        fh = next(self._next_handle)
        self._handles[fh] = opened
        return fh

    def seen(self, path: str) -> bool:
        """Count one more open of a part whose file the kernel still has; False if it has to be opened anew."""
        if self._config.verify == "always" or path in self._incoming:
            return False
        place = self._place(path)
        self._catalog.touch(place.ns, [place.key])
        return True

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read; a handle of an earlier worker is opened again."""
        opened = self._handles.get(fh)
        if opened is None:
            again = self.open_file(path, os.O_RDONLY)
            opened = self._handles[fh] = again.fd if isinstance(again, Opened) else again
        if isinstance(opened, int):
            return os.pread(opened, size, offset)
        if isinstance(opened, bytes):
            return opened[offset : offset + size]
        raise refusal(errno.EBADF)

    def release(self, _path: str, fh: int) -> int:
        """Close a handle; what was copied in and not published is thrown away."""
        opened = self._handles.pop(fh, None)
        if isinstance(opened, int):
            os.close(opened)
        elif isinstance(opened, Incoming):
            if self._incoming.get(opened.path) is opened:
                del self._incoming[opened.path]
            opened.abandon()
        return 0

    # --- changing ---

    def create(self, path: str, _mode: int, _flags: int = 0) -> int:
        """A handle for copying a part in. EROFS unless the name is one that the namespace can have."""
        place = tree.find(path)
        if place is None or place.what is not What.PART or self._config.read_only:
            raise refusal(errno.EROFS)
        incoming = Incoming(self._catalog, place)
        with self._lock:
            if path in self._incoming or self._shown.exists(place):
                incoming.abandon()
                raise refusal(errno.EEXIST)
            self._incoming[path] = incoming
        return self.keep(incoming)

    def write(self, _path: str, data: bytes | memoryview, offset: int, fh: int) -> int:
        """Write to a part being copied in; EIO if the worker that created it is gone."""
        opened = self._handles.get(fh)
        if not isinstance(opened, Incoming):
            raise refusal(errno.EIO)
        return opened.write(memoryview(data), offset)

    def flush(self, path: str, fh: int) -> int:
        """Publish a part copied in, at the close of its writer; EIO for one that is damaged or misnamed."""
        opened = self._handles.get(fh)
        if isinstance(opened, Incoming):
            if opened.flush():
                self._incoming.pop(path, None)
        elif opened is None and not self._shown.exists(self._place(path)):
            raise refusal(errno.EIO)  # the worker that had it is gone, and it was not published
        return 0

    def fsync(self, _path: str, _datasync: int, _fh: int) -> int:
        """Nothing: what is published is as durable as the store says."""
        return 0

    def truncate(self, path: str, length: int, _fh: int | None = None) -> int:
        """Cut a part being copied in; EROFS for all else."""
        self._writable(path).truncate(length)
        return 0

    def chmod(self, path: str, _mode: int) -> int:
        """Mode, owner and times of a part being copied in are accepted and not kept, so that ``cp -p`` works."""
        self._writable(path)
        return 0

    def setxattr(self, path: str, _name: str, _value: bytes, _options: int) -> int:
        """ENOTSUP for a part being copied in, so that ``cp -p`` does without; EROFS for all else."""
        self._writable(path)
        raise refusal(errno.ENOTSUP)

    def _writable(self, path: str) -> Incoming:
        incoming = self._incoming.get(path)
        if incoming is None:
            raise refusal(errno.EROFS)
        return incoming

    def unlink(self, path: str) -> int:
        """Remove the chunk that a part belongs to: a chunk without one of its parts is of no use."""
        place = self._place(path)
        if place.what is not What.PART or self._config.read_only:
            raise refusal(errno.EROFS)
        if path in self._incoming:
            raise refusal(errno.EBUSY)
        if not self._shown.exists(place):
            raise refusal(errno.ENOENT)
        self._catalog.remove_chunk(place.ns, place.key)
        return 0

    def mkdir(self, path: str, _mode: int) -> int:
        """EEXIST for leaf folders, all of which are there already; EROFS for all else."""
        place = tree.find(path)
        raise refusal(errno.EEXIST if place is not None and place.what is What.LEAF else errno.EROFS)

    def mknod(self, path: str, mode: int, _dev: int) -> int:
        """The control socket, which the daemon binds once; nothing else can be made."""
        if path != tree.SOCKET or not stat.S_ISSOCK(mode):
            raise refusal(errno.EROFS)
        if self._socket_bound:
            raise refusal(errno.EEXIST)
        self._socket_bound = True
        return 0


def attributes(st: os.stat_result, mode: int, size: int = 0, inode: int = 0) -> dict[str, int]:
    """What a place shows, given the file or folder in the store behind it."""
    return {
        "st_ino": inode,
        "st_mode": mode,
        "st_size": size,
        "st_blocks": st.st_blocks if inode else -(-size // 512),
        "st_nlink": 1 if not stat.S_ISDIR(mode) else 2,
        "st_uid": st.st_uid,
        "st_gid": st.st_gid,
        "st_atime": st.st_atime_ns,
        "st_mtime": st.st_mtime_ns,
        "st_ctime": st.st_ctime_ns,
    }
