"""Threads and processes that come after everybody else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
from pathlib import Path
from typing import Final

IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
"""Number of the system call, which has no function in libc."""


def be_idle() -> None:
    """Let this thread's reads and computations come after those of everyone else, where the kernel can do that."""
    if (number := IOPRIO_SET.get(platform.machine())) is not None:
        who_process, this_thread, class_idle = 1, 0, 3 << 13
        ctypes.CDLL(None).syscall(number, who_process, this_thread, class_idle)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def come_last() -> None:
    """Let this process run when nothing else wants the processor.  It must not lead a process group.

    The idle class counts only within a scheduling group, and a kernel with autogroups makes one of each session: beside
    another session's processes the only busy one of this has the whole share of its group.  So it gets a session of its
    own, whose group comes last too (sched(7), "The autogroup feature").
    """
    be_idle()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.setsid()
    with contextlib.suppress(OSError):  # a kernel without, or a sandbox that forbids it
        Path("/proc/self/autogroup").write_text("19")
