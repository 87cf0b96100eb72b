"""What each request of the kernel means: node ids and structures on one side, the view's paths on the other.

A handler gets the node, the bytes after the header and the request's id, and returns the body of the reply. It raises
KvfsError or OSError for an error, and whatever it returns counts as told to the kernel.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, Final

from kvfs.daemon.fuse import abi
from kvfs.daemon.fuse.abi import Fopen, Op
from kvfs.daemon.incoming import refusal
from kvfs.daemon.view import FOREVER, WRITING
from kvfs.errors import ChunkCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvfs.daemon.fuse.backings import Backings
    from kvfs.daemon.fuse.nodes import Node, Nodes
    from kvfs.daemon.view import View

FROM_MEMORY: Final = {Op.FORGET, Op.BATCH_FORGET, Op.RELEASE, Op.RELEASEDIR, Op.INTERRUPT}
"""Requests that ask nothing of the store."""

FROM_LOCAL_DISK: Final = FROM_MEMORY | {
    Op.LOOKUP,
    Op.GETATTR,
    Op.READLINK,
    Op.OPEN,
    Op.GETXATTR,
    Op.LISTXATTR,
    Op.OPENDIR,
    Op.READDIR,
    Op.READDIRPLUS,
    Op.STATFS,
}
"""Requests that a local filesystem answers from its cache, as a rule."""

NANO: Final = 1_000_000_000


def attr(node_id: int, st: Mapping[str, Any]) -> bytes:
    """Pack a ``getattr`` result, whose times are in nanoseconds."""
    atime, mtime, ctime = st["st_atime"], st["st_mtime"], st["st_ctime"]
    return abi.ATTR.pack(
        node_id,
        st["st_size"],
        st["st_blocks"],
        atime // NANO,
        mtime // NANO,
        ctime // NANO,
        atime % NANO,
        mtime % NANO,
        ctime % NANO,
        st["st_mode"],
        st["st_nlink"],
        st["st_uid"],
        st["st_gid"],
        0,
        4096,
        0,
    )


def name_in(body: memoryview) -> str:
    """The name that a request ends with."""
    return str(body[:-1], "utf-8", "surrogateescape")


def child(node: Node, name: str) -> str:
    """The path of ``name`` in the folder ``node``."""
    return f"/{name}" if node.path == "/" else f"{node.path}/{name}"


class Requests:
    """Handlers of one mount.

    ``on_lost`` is called with a path that the kernel holds and whose file turned out to be gone.
    """

    def __init__(self, view: View, nodes: Nodes, backings: Backings) -> None:
        self._quick = FROM_MEMORY if view.is_remote else FROM_LOCAL_DISK
        self._view, self._nodes, self._backings = view, nodes, backings
        self.on_lost: Callable[[str], None] = lambda _: None
        self._listings: dict[int, list[tuple[str, int]]] = {}
        self._next_listing = itertools.count(time.time_ns())
        self.handlers: dict[int, Callable[[Node, memoryview, int], bytes]] = {
            Op.LOOKUP: self.lookup,
            Op.GETATTR: self.getattr,
            Op.SETATTR: self.setattr,
            Op.READLINK: self.readlink,
            Op.MKNOD: self.mknod,
            Op.MKDIR: self.mkdir,
            Op.UNLINK: self.unlink,
            Op.OPEN: self.open,
            Op.READ: self.read,
            Op.WRITE: self.write,
            Op.STATFS: self.statfs,
            Op.RELEASE: self.release,
            Op.FSYNC: self.fsync,
            Op.GETXATTR: self.getxattr,
            Op.LISTXATTR: self.listxattr,
            Op.FLUSH: self.flush,
            Op.OPENDIR: self.opendir,
            Op.READDIR: self.readdir,
            Op.READDIRPLUS: self.readdirplus,
            Op.RELEASEDIR: self.releasedir,
            Op.CREATE: self.create,
            Op.SETXATTR: self.setxattr,
            **dict.fromkeys((Op.SYMLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.LINK, Op.REMOVEXATTR), self.refuse),
        }

    def is_quick(self, opcode: int) -> bool:
        """Whether a request takes microseconds, unless the view says that it is slow after all."""
        return opcode in self._quick

    # --- names and attributes ---

    def _entry(self, path: str) -> bytes:
        st = self._view.getattr(path)
        node = self._nodes.look_up(path, st["st_ino"], st["st_size"], st["st_mtime"])
        names, attrs = self._view.lifetime(path)
        return abi.ENTRY_OUT.pack(node.id, 0, names, attrs, 0, 0) + attr(node.id, st)

    def lookup(self, node: Node, body: memoryview, _unique: int) -> bytes:
        return self._entry(child(node, name_in(body)))

    def getattr(self, node: Node, _body: memoryview, _unique: int) -> bytes:
        return self._attributes(node)

    def _attributes(self, node: Node) -> bytes:
        try:
            st = self._view.getattr(node.path)
        except FileNotFoundError:
            st = {"st_ino": 0}
        if st["st_ino"] == node.inode:
            return abi.ATTR_OUT.pack(self._view.lifetime(node.path)[1], 0, 0) + attr(node.id, st)
        if not node.inode:
            raise refusal(errno.ENOENT)
        self.on_lost(node.path)
        return abi.ATTR_OUT.pack(FOREVER, 0, 0) + attr(node.id, self._view.unlinked(node.path, node.size, node.mtime))

    def current(self, node: Node) -> bool:
        """Whether the file that a node was made for is still the one behind its path."""
        try:
            return bool(self._view.getattr(node.path)["st_ino"] == node.inode)
        except OSError:
            return False

    def setattr(self, node: Node, body: memoryview, _unique: int) -> bytes:
        valid, _, _, size, _ = abi.SETATTR_IN.unpack_from(body)
        if valid & abi.Fattr.SIZE:
            self._view.truncate(node.path, size)
        else:
            self._view.chmod(node.path, 0)
        return self._attributes(node)

    def readlink(self, node: Node, _body: memoryview, _unique: int) -> bytes:
        return self._view.readlink(node.path).encode()

    def statfs(self, node: Node, _body: memoryview, _unique: int) -> bytes:
        st = self._view.statfs(node.path)
        return abi.STATFS_OUT.pack(
            st["f_blocks"],
            st["f_bfree"],
            st["f_bavail"],
            st["f_files"],
            st["f_ffree"],
            st["f_bsize"],
            st["f_namemax"],
            st["f_frsize"],
        )

    def getxattr(self, node: Node, body: memoryview, _unique: int) -> bytes:
        size, _ = abi.GETXATTR_IN.unpack_from(body)
        return self._sized(self._view.getxattr(node.path, name_in(body[abi.GETXATTR_IN.size :])), size)

    def listxattr(self, node: Node, body: memoryview, _unique: int) -> bytes:
        size, _ = abi.GETXATTR_IN.unpack_from(body)
        return self._sized(b"".join(name.encode() + b"\0" for name in self._view.listxattr(node.path)), size)

    @staticmethod
    def _sized(value: bytes, size: int) -> bytes:
        if size == 0:
            return abi.GETXATTR_OUT.pack(len(value), 0)
        if len(value) > size:
            raise refusal(errno.ERANGE)
        return value

    # --- folders ---

    def opendir(self, node: Node, _body: memoryview, _unique: int) -> bytes:
        fh = next(self._next_listing)
        self._listings[fh] = self._view.readdir(node.path)
        return abi.OPEN_OUT.pack(fh, 0, 0)

    def releasedir(self, _node: Node, body: memoryview, _unique: int) -> bytes:
        self._listings.pop(abi.RELEASE_IN.unpack_from(body)[0], None)
        return b""

    def _listing(self, node: Node, fh: int) -> list[tuple[str, int]]:
        """What was there at opendir; read again when an earlier worker opened the folder."""
        if fh not in self._listings:
            self._listings[fh] = self._view.readdir(node.path)
        return self._listings[fh]

    def readdir(self, node: Node, body: memoryview, _unique: int) -> bytes:
        fh, offset, size, *_ = abi.READ_IN.unpack_from(body)
        out = bytearray()
        for i, (name, mode) in enumerate(self._listing(node, fh)[offset:], offset + 1):
            record = self._dirent(0, i, name, mode)
            if len(out) + len(record) > size:
                break
            out += record
        return bytes(out)

    def readdirplus(self, node: Node, body: memoryview, _unique: int) -> bytes:
        fh, offset, size, *_ = abi.READ_IN.unpack_from(body)
        out = bytearray()
        for i, (name, mode) in enumerate(self._listing(node, fh)[offset:], offset + 1):
            if len(out) + 256 + len(name.encode()) > size:
                break
            if name in {".", ".."}:
                entry, node_id = bytes(abi.ENTRY_OUT.size + abi.ATTR.size), node.id
            else:
                try:
                    entry = self._entry(child(node, name))
                except (FileNotFoundError, ChunkCorrupt):
                    continue
                (node_id,) = abi.FORGET_IN.unpack_from(entry)
            out += entry + self._dirent(node_id, i, name, mode)
        return bytes(out)

    @staticmethod
    def _dirent(node_id: int, offset: int, name: str, mode: int) -> bytes:
        raw = name.encode()
        return abi.DIRENT.pack(node_id or 0xFFFFFFFF, offset, len(raw), mode >> 12) + raw + bytes(-len(raw) % 8)

    # --- reading ---

    def open(self, node: Node, body: memoryview, _unique: int) -> bytes:
        flags, _ = abi.OPEN_IN.unpack_from(body)
        if node.backing and not flags & WRITING and self._view.seen(node.path):
            backing = self._backings.reuse(node)
            if backing:
                return abi.OPEN_OUT.pack(0, Fopen.PASSTHROUGH | Fopen.NOFLUSH, backing)
        opened = self._view.open_file(node.path, flags)
        if isinstance(opened, bytes):
            return abi.OPEN_OUT.pack(self._view.keep(node.path, opened), Fopen.DIRECT_IO | Fopen.NOFLUSH, 0)
        try:
            if opened.inode != node.inode:
                raise refusal(errno.ESTALE)
            backing = self._backings.open(node, opened.fd)
        except BaseException:
            os.close(opened.fd)
            raise
        if not backing:
            return abi.OPEN_OUT.pack(self._view.keep(node.path, opened.fd), Fopen.KEEP_CACHE | Fopen.NOFLUSH, 0)
        os.close(opened.fd)
        return abi.OPEN_OUT.pack(0, Fopen.PASSTHROUGH | Fopen.NOFLUSH, backing)

    def read(self, node: Node, body: memoryview, _unique: int) -> bytes:
        fh, offset, size, *_ = abi.READ_IN.unpack_from(body)
        return self._view.read(node.path, min(size, abi.MAX_WRITE), offset, fh)

    def release(self, node: Node, body: memoryview, unique: int) -> bytes:
        fh, *_ = abi.RELEASE_IN.unpack_from(body)
        if fh:
            self._view.release(node.path, fh)
        elif not unique & abi.UNIQUE_RESEND:  # sent again it may have been counted: too high is harmless
            self._backings.release(node)
        return b""

    def undelivered(self, node: Node, reply: bytes) -> None:
        """An open was interrupted before its reply arrived: nobody will release it."""
        fh, flags, _ = abi.OPEN_OUT.unpack_from(reply)
        if flags & Fopen.PASSTHROUGH:
            self._backings.release(node)
        else:
            self._view.release(node.path, fh)

    def gone(self, path: str) -> Node | None:
        """The file behind ``path`` is gone: part the two, free what it holds; return the node if there was one."""
        node = self._nodes.hide(path)
        if node is not None:
            self._backings.drop(node)
        return node

    # --- changing ---

    def mknod(self, node: Node, body: memoryview, unique: int) -> bytes:
        mode, *_ = abi.MKNOD_IN.unpack_from(body)
        path = child(node, name_in(body[abi.MKNOD_IN.size :]))
        try:
            self._view.mknod(path, mode, 0)
        except FileExistsError:
            if not unique & abi.UNIQUE_RESEND:
                raise
        return self._entry(path)

    def create(self, node: Node, body: memoryview, _unique: int) -> bytes:
        _, mode, *_ = abi.CREATE_IN.unpack_from(body)
        path = child(node, name_in(body[abi.CREATE_IN.size :]))
        fh = self._view.create(path, mode)
        return self._entry(path) + abi.OPEN_OUT.pack(fh, Fopen.DIRECT_IO, 0)

    def write(self, node: Node, body: memoryview, _unique: int) -> bytes:
        fh, offset, size, *_ = abi.WRITE_IN.unpack_from(body)
        data = body[abi.WRITE_IN.size : abi.WRITE_IN.size + size]
        return abi.WRITE_OUT.pack(self._view.write(node.path, data, offset, fh), 0)

    def flush(self, node: Node, body: memoryview, _unique: int) -> bytes:
        self._view.flush(node.path, abi.FLUSH_IN.unpack_from(body)[0])
        return b""

    def fsync(self, node: Node, body: memoryview, _unique: int) -> bytes:
        self._view.fsync(node.path, 0, abi.FSYNC_IN.unpack_from(body)[0])
        return b""

    def unlink(self, node: Node, body: memoryview, unique: int) -> bytes:
        path = child(node, name_in(body))
        try:
            self._view.unlink(path)
        except FileNotFoundError:
            if not unique & abi.UNIQUE_RESEND:
                raise
        return b""

    def mkdir(self, node: Node, body: memoryview, _unique: int) -> bytes:
        path = child(node, name_in(body[8:]))
        self._view.mkdir(path, 0)
        return self._entry(path)

    def setxattr(self, node: Node, _body: memoryview, _unique: int) -> bytes:
        self._view.setxattr(node.path, "", b"", 0)
        return b""

    def refuse(self, _node: Node, _body: memoryview, _unique: int) -> bytes:
        raise refusal(errno.EROFS)
