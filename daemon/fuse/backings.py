"""Which backing id each node is opened with, and when an id is given back.

All opens of a node must use one id while any of them lasts. An id of a node that nobody has open is kept for the next
open, but not for ever: it keeps the disk space of its file from being freed.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvfs.daemon.fuse.nodes import Node, Nodes
    from kvfs.daemon.fuse.passthrough import Borrower, Lender

log = logging.getLogger(__name__)

MAX_IDLE: Final = 256
"""Ids kept of nodes that nobody has open."""

HOST_REFUSES: Final = {errno.EPERM, errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ELOOP}
"""Errors that speak of the host or the store's filesystem, not of one file."""

FILE_REFUSED: Final = errno.EACCES
"""The keeper's answer for a file that it does not lend, such as one of another owner."""


class Backings:
    """The ids of one mount. Thread-safe. ``maker`` is None where the kernel cannot pass files through."""

    def __init__(self, nodes: Nodes, maker: Lender | Borrower | None) -> None:
        self._nodes, self._maker = nodes, maker
        self._refused = False
        self._idle: OrderedDict[int, Node] = OrderedDict((n.id, n) for n in nodes if n.backing and not n.opens)
        self._lock = threading.Lock()

    def reuse(self, node: Node) -> int:
        """Open ``node`` once more with the id that it has; 0 if it has none."""
        with self._lock:
            return self._open(node, node.backing) if node.backing else 0

    def open(self, node: Node, fd: int) -> int:
        """Open ``node`` with its id, or a new one for ``fd``; 0 where the server has to read itself.

        Raises OSError if the kernel has no room for another.
        """
        if self._maker is None or self._refused:
            return 0
        with self._lock:
            try:
                return self._open(node, node.backing or self._maker.open(fd))
            except OSError as e:
                if e.errno in HOST_REFUSES:
                    self._refused = True
                    log.warning("no passthrough on this host (%s): the daemon reads for its clients", e.strerror)
                elif e.errno != FILE_REFUSED:
                    raise
                return 0

    def _open(self, node: Node, backing: int) -> int:
        self._idle.pop(node.id, None)
        self._nodes.open(node, backing)
        return backing

    def release(self, node: Node) -> None:
        """One open has ended."""
        with self._lock:
            if self._nodes.release(node) or not node.backing:
                return
            self._idle[node.id] = node
            if self._nodes.at(node.path) is not node:  # its file is gone
                self._drop(node)
            elif len(self._idle) > MAX_IDLE:
                self._drop(next(iter(self._idle.values())))

    def drop(self, node: Node) -> None:
        """Give the id back unless somebody has the node open; then the last release does."""
        with self._lock:
            self._drop(node)

    def let_go(self, inode: int) -> None:
        """Give back the id kept of a file that nobody has open, by its inode in the store."""
        with self._lock:
            for node in [each for each in self._idle.values() if each.inode == inode]:
                self._drop(node)

    def _drop(self, node: Node) -> None:
        backing = self._nodes.drop_backing(node)
        if backing:
            self._idle.pop(node.id, None)
            self._give_back(backing)

    def forget(self, node_id: int, lookups: int) -> None:
        """The kernel has let go of a node ``lookups`` times."""
        backing = self._nodes.forget(node_id, lookups)
        if backing:
            with self._lock:
                self._idle.pop(node_id, None)
                self._give_back(backing)

    def _give_back(self, backing: int) -> None:
        if self._maker is not None:
            self._maker.close(backing)
