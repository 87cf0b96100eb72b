"""The folders of a store's namespaces, each opened once."""

import contextlib
import os
import time
from collections import deque
from pathlib import Path
from typing import Final

from kvfs.errors import NamespaceNotFound
from kvfs.files import OPEN_DIR, from_os_error

__all__ = ["Folders"]

IN_USE: Final = 600.0
"""Seconds after which nobody uses a descriptor any more that he was given before."""


class Folders:
    """Descriptors of the folders of namespaces in the folder ``root``, which is at ``path``.  Thread-safe."""

    def __init__(self, root: int, path: Path) -> None:
        self._root, self._path = root, path
        self._open: dict[bytes, int] = {}
        self._forgotten: deque[tuple[float, int]] = deque()

    def get(self, ns: bytes) -> int:
        """The descriptor of a namespace's folder, to be used at once and not closed.  NamespaceNotFound."""
        if (known := self._open.get(ns)) is not None:
            return known
        try:
            fd = os.open(ns.hex(), OPEN_DIR, dir_fd=self._root)
        except (FileNotFoundError, NotADirectoryError):
            raise NamespaceNotFound(ns.hex()[:12]) from None
        except OSError as e:
            raise from_os_error(e, self._path / ns.hex()) from e
        if (known := self._open.setdefault(ns, fd)) != fd:  # another thread was quicker
            os.close(fd)
        return known

    def is_stale(self, ns: bytes) -> bool:
        """Whether the folder that is known was taken away, perhaps by another process, or another is in its place."""
        if (fd := self._open.get(ns)) is None:
            return False
        try:
            there = os.stat(ns.hex(), dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, os.fstat(fd))

    def forget(self, ns: bytes) -> None:
        """Open the folder anew next time.  Other threads may still be using the descriptor: it is closed later."""
        now = time.monotonic()
        if (fd := self._open.pop(ns, None)) is not None:
            self._forgotten.append((now, fd))
        for each in [e for e in list(self._forgotten) if now - e[0] > IN_USE]:
            with contextlib.suppress(ValueError):  # another thread closes it
                self._forgotten.remove(each)
                os.close(each[1])

    def close(self) -> None:
        """Close all."""
        for fd in (*self._open.values(), *(fd for _, fd in self._forgotten)):
            os.close(fd)
        self._open.clear()
        self._forgotten.clear()
        self._root = -1  # its owner closes it, and another file may get its number
