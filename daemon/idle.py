"""Threads and processes that come after everybody else."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from typing import Final

IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
"""Number of the system call, which has no function in libc."""


def be_idle() -> None:
    """Let this thread's reads and computations come after those of everyone else, where the kernel can do that."""
    if (number := IOPRIO_SET.get(platform.machine())) is not None:
        who_process, this_thread, class_idle = 1, 0, 3 << 13
        ctypes.CDLL(None).syscall(number, who_process, this_thread, class_idle)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
