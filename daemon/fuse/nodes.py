"""The nodes that the kernel knows, kept in memory that outlives the worker.

The kernel names files by node ids that the server chose. A worker that takes over a mount must understand every id
its predecessor gave out, so each node has a row in a memfd that the keeper holds: id, path in the view; inode, size
and mtime of the backing file; backing id, and how often the kernel holds and opens it. Ids come from a counter that
never repeats; a path whose file has changed gets a new node, as all passthrough opens of one node must share one
backing file.

After a crash the counts of a row may be too high, never too low: too low would give a backing id back while the
kernel still uses it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from struct import Struct
from typing import TYPE_CHECKING, Final

from kvfs.daemon.fuse.abi import ROOT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

ROW: Final = 256
BODY: Final = Struct("=QQiIQQH")
"""Inode, lookups, backing id, opens, size, mtime, length of the path, which follows."""

BODY_AT: Final = 8
"""The node id stands first and is written last: a row counts once it has one."""

PATH_AT: Final = BODY_AT + BODY.size
MAX_PATH: Final = ROW - PATH_AT
LOOKUPS: Final = Struct("=Q")
BACKING: Final = Struct("=iI")
ID: Final = Struct("=Q")
MAX_ID: Final = 1 << 62
NEXT_AT: Final = 0
"""Row 0 holds the next id to give."""

FIRST_ROWS: Final = 1024


class Node:
    """A file or folder as the kernel knows it; changed only by `Nodes`."""

    __slots__ = ("backing", "id", "inode", "lookups", "mtime", "opens", "path", "row", "size")

    def __init__(self, id_: int, path: str, row: int, inode: int = 0, size: int = 0, mtime: int = 0) -> None:
        self.id, self.path, self.row, self.inode, self.size, self.mtime = id_, path, row, inode, size, mtime
        self.lookups = self.opens = self.backing = 0


class Nodes:
    """The table. ``fd`` is a memfd, empty or left by an earlier worker of the same mount. Thread-safe."""

    def __init__(self, fd: int) -> None:
        self._lock = threading.Lock()
        size = max(FIRST_ROWS * ROW, -(-os.fstat(fd).st_size // ROW) * ROW)
        os.ftruncate(fd, size)
        self._map = mmap.mmap(fd, size)
        self._by_id: dict[int, Node] = {ROOT_ID: Node(ROOT_ID, "/", 0)}
        self._by_path: dict[str, Node] = {"/": self._by_id[ROOT_ID]}
        self._free = [row for row in range(size // ROW - 1, 0, -1) if not self._load(row)]
        (stored,) = ID.unpack_from(self._map, NEXT_AT)
        self._next: int = max(stored if stored <= MAX_ID else 0, max(self._by_id) + 1)

    def _load(self, row: int) -> bool:
        at = row * ROW
        (id_,) = ID.unpack_from(self._map, at)
        if not id_:
            return False
        inode, lookups, backing, opens, size, mtime, length = BODY.unpack_from(self._map, at + BODY_AT)
        try:
            path = self._map[at + PATH_AT : at + PATH_AT + length].decode()
        except UnicodeDecodeError:
            path = ""
        if not path.startswith("/") or length > MAX_PATH or id_ in self._by_id or id_ > MAX_ID or backing < 0:
            # The kernel may ask for this node: it is told that it is stale, and looks the path up again.
            log.warning("row %d of the table of nodes is damaged and dropped", row)
            ID.pack_into(self._map, at, 0)
            return False
        node = Node(id_, path, row, inode, size, mtime)
        node.lookups, node.backing, node.opens = lookups, backing, opens
        self._by_id[id_] = node
        if (other := self._by_path.get(node.path)) is None or other.id < id_:
            self._by_path[node.path] = node
        return True

    def __getitem__(self, id_: int) -> Node:
        """The node of an id the kernel sent; KeyError if it was never given out, or is forgotten."""
        return self._by_id[id_]

    def at(self, path: str) -> Node | None:
        """The node that now stands for ``path``, if the kernel knows one."""
        return self._by_path.get(path)

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._by_path.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def look_up(self, path: str, inode: int, size: int = 0, mtime: int = 0) -> Node:
        """The node of ``path`` while it shows backing inode ``inode`` (0: no backing file), held once more.

        ``size`` and ``mtime`` (in ns) are what a file that is open shows of itself when its name is gone.
        """
        with self._lock:
            node = self._by_path.get(path)
            if node is None or node.inode != inode:
                node = self._create(path, inode, size, mtime)
            node.lookups += 1
            LOOKUPS.pack_into(self._map, node.row * ROW + BODY_AT + 8, node.lookups)
            return node

    def _create(self, path: str, inode: int, size: int, mtime: int) -> Node:
        raw = path.encode()
        if len(raw) > MAX_PATH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        if not self._free:
            self._grow()
        node = Node(self._next, path, self._free.pop(), inode, size, mtime)
        self._next += 1
        ID.pack_into(self._map, NEXT_AT, self._next)
        at = node.row * ROW
        BODY.pack_into(self._map, at + BODY_AT, inode, 0, 0, 0, size, mtime, len(raw))
        self._map[at + PATH_AT : at + PATH_AT + len(raw)] = raw
        ID.pack_into(self._map, at, node.id)
        self._by_id[node.id] = self._by_path[path] = node
        return node

    def _grow(self) -> None:
        rows = len(self._map) // ROW
        self._map.resize(2 * rows * ROW)
        self._free.extend(range(2 * rows - 1, rows - 1, -1))

    def forget(self, id_: int, lookups: int) -> int:
        """Let go of a node ``lookups`` times; return the backing id to close when nothing holds it, else 0."""
        with self._lock:
            node = self._by_id.get(id_)
            if node is None or id_ == ROOT_ID:
                return 0
            node.lookups -= lookups
            if node.lookups > 0:
                LOOKUPS.pack_into(self._map, node.row * ROW + BODY_AT + 8, node.lookups)
                return 0
            ID.pack_into(self._map, node.row * ROW, 0)
            self._free.append(node.row)
            del self._by_id[id_]
            if self._by_path.get(node.path) is node:
                del self._by_path[node.path]
            return node.backing

    def hide(self, path: str) -> Node | None:
        """Part a path from its node, since the file behind it is gone; return the node, which lives on while held."""
        with self._lock:
            node = self._by_path.get(path)
            return self._by_path.pop(path) if node is not None and node.id != ROOT_ID else None

    def open(self, node: Node, backing: int) -> None:
        """Count one more passthrough open of ``node``, which uses ``backing``."""
        with self._lock:
            node.opens += 1
            node.backing = backing
            self._save_backing(node)

    def release(self, node: Node) -> int:
        """Count one open less; return how many are left."""
        with self._lock:
            node.opens = max(0, node.opens - 1)
            self._save_backing(node)
            return node.opens

    def drop_backing(self, node: Node) -> int:
        """Take the backing id of a node that has no opens; 0 if it has opens, or no backing id."""
        with self._lock:
            if node.opens or not node.backing:
                return 0
            backing, node.backing = node.backing, 0
            self._save_backing(node)
            return backing

    def _save_backing(self, node: Node) -> None:
        BACKING.pack_into(self._map, node.row * ROW + BODY_AT + 16, node.backing, node.opens)

    def close(self) -> None:
        """Let go of the memory; the memfd keeps its content."""
        self._map.close()

    def check_integrity(self) -> None:
        """Assert that rows and nodes say the same, for tests."""
        with self._lock:
            rows = [node.row for node in self._by_id.values() if node.id != ROOT_ID]
            assert sorted(rows + self._free) == list(range(1, len(self._map) // ROW))
            for node in self._by_id.values():
                if node.id == ROOT_ID:
                    continue
                at = node.row * ROW
                body = BODY.unpack_from(self._map, at + BODY_AT)
                assert ID.unpack_from(self._map, at)[0] == node.id < self._next
                assert body[:4] == (node.inode, node.lookups, node.backing, node.opens)
                assert body[4:] == (node.size, node.mtime, len(node.path.encode()))
