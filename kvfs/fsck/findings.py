"""What a check finds, and the ways to put it right."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from kvfs.errors import KvfsError
from kvfs.store import TEMP_GRACE, Store

__all__ = ["Finding", "Repairs"]

REMAINS = frozenset(
    {"half-made", "incomplete", "note", "orphan", "retired", "stale-index", "stale-lock", "temp", "tmp-folder"}
)
"""Kinds that a crash or an eviction leaves in the normal course of things; all others are damage."""


class Finding(NamedTuple):
    """Something that is not as it should be.

    ``kind`` is from a closed set, ``path`` relative to the store; ``action`` is what is to be done about it, and
    ``done`` whether it has been.
    """

    kind: str
    path: str
    detail: str
    action: str
    done: bool

    @property
    def is_damage(self) -> bool:
        """Whether it takes more than a crash to make this."""
        return self.kind not in REMAINS


class Repairs:
    """Makes findings, and does what each asks for unless it is a dry run.  ``root`` is the open folder of the store."""

    def __init__(self, store: Store, root: int, dry_run: bool) -> None:
        self.store, self.root, self.dry_run = store, root, dry_run
        self._now = time.time()

    def is_old(self, when: float) -> bool:
        """Whether something last changed at ``when`` is nobody's work in progress any more."""
        return self._now - when > TEMP_GRACE

    def repair(self, kind: str, path: str, detail: str, action: str, do: Callable[[], object]) -> Finding:
        """Repair by ``do``; a failure is part of the finding."""
        done = False
        if not self.dry_run:
            try:
                do()
                done = True
            except (OSError, KvfsError) as e:
                detail += f"; that failed: {e.strerror if isinstance(e, OSError) and e.strerror else e}"
        return Finding(kind, printable(path), detail, action, done)

    def report(self, kind: str, path: str, detail: str) -> Finding:
        """Only tell."""
        return Finding(kind, printable(path), detail, "left as it is", False)

    def move_away(self, kind: str, path: str, detail: str, dir_fd: int, label: str | None = None) -> Finding:
        """Move the last component of ``path``, in the folder ``dir_fd``, to ``lost+found``, with ``kind`` as reason."""
        name = os.path.basename(path)
        lost = self.store.lost

        def do() -> None:
            lost.take(dir_fd, name, label or name, kind, path, detail=detail)

        return self.repair(kind, path, detail, "moved to lost+found", do)


def printable(path: str) -> str:
    """A path as text, whatever bytes its names are made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
