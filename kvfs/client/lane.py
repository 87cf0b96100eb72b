"""A thread that does what may block, while its callers wait no longer than they want to.

A network filesystem whose server is away blocks system calls without bound.  The lane is the circuit breaker too:
while a call that was given up is still stuck, others fail in microseconds.
"""

import functools
import os
import queue
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

from kvfs.client.fork import restart_in_child
from kvfs.cores import cores
from kvfs.errors import DaemonUnavailable, KvfsError
from kvfs.protocol import Deadline

__all__ = ["Lane"]

T = TypeVar("T")
_Jobs = queue.SimpleQueue[tuple["futures.Future[Any]", Callable[[], Any]] | None]
LEAVE = 1.0
"""Seconds that `Lane.close` waits for a call in progress."""


class Lane:
    """Calls, one after the other, in a thread that starts with the first of them.  ``what`` names it in errors."""

    def __init__(self, what: object) -> None:
        self._what = what
        self._closed = False
        self.restart()
        restart_in_child(self)

    def restart(self) -> None:
        """Be as new, in a forked child: the thread stays the parent's."""
        self._lock = threading.Lock()
        self._jobs: _Jobs = queue.SimpleQueue()
        self._stuck: futures.Future[Any] | None = None
        self._thread: threading.Thread | None = None

    def call(self, what: str, timeout: float, work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """The result of ``work()``, or the error it raises.

        DeadlineExceeded after ``timeout`` seconds: if the result still comes, ``undo`` gets it.  DaemonUnavailable
        at once while an earlier call is stuck, and for an error of the filesystem that says nothing of its own.
        """
        deadline = Deadline(f"{what} at {self._what}", timeout)
        job: futures.Future[T] = futures.Future()
        with self._lock:
            self._begin()
            self._jobs.put((job, work))
        done, _ = futures.wait([job], deadline.left())
        if not done:
            if not job.cancel():
                self._stuck = job
                if undo is not None:
                    job.add_done_callback(functools.partial(_undo, undo))
            raise deadline.exceeded()
        try:
            return job.result()
        except OSError as e:
            if isinstance(e, KvfsError):
                raise
            raise DaemonUnavailable(self._what, e.strerror or e) from e

    def close(self) -> bool:
        """End the thread; later calls raise DaemonUnavailable.  False if it is stuck in a call, and left there."""
        with self._lock:
            self._closed, thread = True, self._thread
            self._jobs.put(None)
        if thread is not None:
            thread.join(LEAVE)
        return thread is None or not thread.is_alive()

    def _begin(self) -> None:
        if self._closed:
            raise DaemonUnavailable(self._what, "closed")
        if self._stuck is not None and not self._stuck.done():
            raise DaemonUnavailable(self._what, "a call to its filesystem hangs")
        self._stuck = None
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="kvfs-lane", daemon=True)
            self._thread.start()


def _work(jobs: _Jobs) -> None:
    os.sched_setaffinity(0, cores())  # whoever calls first may be bound to one that is busy
    while (item := jobs.get()) is not None:
        job, work = item
        if job.set_running_or_notify_cancel():
            try:
                job.set_result(work())
            except BaseException as e:  # noqa: BLE001 - handed to the caller, who waits for it
                job.set_exception(e)


def _undo(undo: Callable[[T], None], job: "futures.Future[T]") -> None:
    if job.exception() is None:
        undo(job.result())
