"""Objects with threads and locks start anew in a forked child, where the threads are gone and the locks may be held."""

import os
import weakref
from typing import Protocol

__all__ = ["restart_in_child"]


class Restarting(Protocol):
    """What can start anew."""

    def restart(self) -> None:
        """Forget threads, locks and connections: they are the parent's.  Runs in the child, alone."""


_objects: "weakref.WeakSet[Restarting]" = weakref.WeakSet()


def restart_in_child(thing: Restarting) -> None:
    """Call ``thing.restart()`` in every child forked while it lives."""
    _objects.add(thing)


def _restart_all() -> None:
    for thing in list(_objects):
        thing.restart()


os.register_at_fork(after_in_child=_restart_all)
