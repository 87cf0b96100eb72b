"""Which cores the threads of a process may run on."""

import contextlib
import os

__all__ = ["cores"]


def cores() -> set[int]:
    """Those that any of its threads may run on. vLLM's CPU worker binds each of its threads to one, and whatever thread
    is started later would be bound to that of the first, which computes."""
    found = set[int]()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            found |= os.sched_getaffinity(int(thread))
    return found
