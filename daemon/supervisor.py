"""The keeper's loop: one worker at a time serves the mount, and is replaced when it dies or hangs.

Callers of the mount notice nothing: the connection, the control socket, the table of nodes and the files lent to the
kernel belong to the keeper, and what a dead worker left unanswered the next one is asked again.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvfs.daemon.bind import bind
from kvfs.daemon.fuse import connection
from kvfs.daemon.fuse.passthrough import Lender
from kvfs.daemon.handover import Channel, dump_config, load_error, python
from kvfs.daemon.notify import notify
from kvfs.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfs.config import Config
    from kvfs.daemon.held import Held

log = logging.getLogger(__name__)

START_LIMIT: Final = 120.0
"""Seconds that a worker may take to read or list the store."""

PING_LIMIT: Final = 10.0
"""Seconds without a sign of life after which a worker is replaced."""

STOP_LIMIT: Final = 10.0
"""Seconds that a worker may take to save its state."""

YOUNG: Final = 60.0
BACKOFF: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 5.0)
"""Seconds before the next start, by how many workers in a row died younger than `YOUNG`; after the last, give up. One
that served and was killed from outside does not count: it could live."""

TICK: Final = 1.0
ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1"}
"""For the worker, which multiplies nothing, and gives up its rights before it has a second thread."""

MOUNT_TABLE: Final = Path("/proc/self/mountinfo")


class Worker:
    """A running worker, and the keeper's end of what connects them."""

    def __init__(self, config: Config, lender: Lender, held: Held, resumed: bool) -> None:
        self.channel, theirs = Channel.pair()
        lending, borrowing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = {"fuse": held.fuse_fd, "table": held.table_fd, "borrowing": borrowing.fileno()}
        self.process = subprocess.Popen(
            python("kvfs.daemon.worker", config, theirs),
            pass_fds=[*fds.values(), theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, **ONE_THREAD},
        )
        order = {"config": dump_config(config), "agreed": int(held.agreed), "resumed": resumed, **fds}
        self.channel.send("serve", order)
        theirs.close()
        borrowing.close()
        threading.Thread(target=lender.serve, args=(lending,), name="lender", daemon=True).start()
        self.pidfd = os.pidfd_open(self.process.pid)
        self.started = self.heard = time.monotonic()
        self.serving = self.hung = False
        self.leaves_by: float | None = None
        """When it has to be gone, if it was told to make room for the next."""

    def close(self) -> None:
        """Close the keeper's end, once the process has ended."""
        self.channel.close()
        os.close(self.pidfd)


class Supervisor:
    """Keeps a mount served."""

    def __init__(self, config: Config, store: Path, held: Held) -> None:
        self._config, self._held = config, held
        self._point = held.mount.point
        self._resumes = held.listener is not None
        self._lender = Lender(held.fuse_fd, store)
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._worker: Worker | None = None
        self._next_start = 0.0
        self._early_deaths = 0
        self._announced = self._ended = False
        self._error: Exception | None = None

    def run(self, announce: Callable[[], None]) -> None:
        """Serve until the mount is taken away or SIGTERM or SIGINT comes; SIGHUP lets a fresh worker take over.
        ``announce`` is called once the mount answers.

        Raises what kept the first worker from serving, or MountError when one after the other dies. The mount is the
        caller's to take away; `stop` comes after that.
        """
        self._announce = announce
        with self._signals(), MOUNT_TABLE.open("rb") as table:
            self._watch(table.fileno(), self._on_mounts, select.EPOLLPRI)
            while not self._ended:
                if self._worker is None and time.monotonic() >= self._next_start:
                    self._start()
                for fd, _ in self._epoll.poll(min(TICK, max(0.0, self._next_start - time.monotonic()) or TICK)):
                    if fd in self._callbacks:
                        self._callbacks[fd]()
                self._check()
        if self._error is not None:
            raise self._error

    def _signals(self) -> socket.socket:
        """Let signals wake the loop; closing the result ends that."""
        wake, writer = socket.socketpair()
        wake.setblocking(False)
        writer.setblocking(False)
        self._signal_writer = writer
        signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: self._end(f"{signal.Signals(n).name}"))
        signal.signal(signal.SIGHUP, lambda *_: self._reload())
        self._watch(wake.fileno(), lambda: wake.recv(64))
        return wake

    def _watch(self, fd: int, callback: Callable[[], object], events: int = select.EPOLLIN) -> None:
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def _unwatch(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _on_mounts(self) -> None:
        """The mount table has changed. The socket keeps the connection alive without a mount, so this is how to see
        that the mount was taken away."""
        if self._held.mount not in connection.mounts():
            self._end("it was unmounted")

    def _end(self, reason: str, error: Exception | None = None) -> None:
        log.log(logging.ERROR if error else logging.INFO, "%s ends: %s", self._point, reason)
        self._ended, self._error = True, self._error or error

    # --- a worker's life ---

    def _start(self) -> None:
        worker = Worker(self._config, self._lender, self._held, self._resumes or self._announced)
        self._worker = worker
        self._watch(worker.channel.fileno(), self._on_message)
        self._watch(worker.pidfd, self._on_exit)
        if self._held.listener is not None:
            worker.channel.send("listen", None, [self._held.listener.fileno()])

    def _reload(self) -> None:
        """Have the worker save its state and make room for a fresh one, of the version that is installed now."""
        worker = self._worker
        if worker is not None and worker.serving and worker.leaves_by is None:
            notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
            worker.leaves_by = time.monotonic() + STOP_LIMIT
            worker.channel.send("leave")

    def _on_message(self) -> None:
        worker = self._worker
        if worker is None:
            return
        word, value, _ = worker.channel.receive(0)
        worker.heard = time.monotonic()
        match word:
            case "eof":
                self._unwatch(worker.channel.fileno())
            case "unmounted":
                self._end("it was unmounted")
            case "error":
                self._error = load_error(value)
            case "answering" if self._held.listener is None:
                try:
                    self._held.listener = bind(self._point)
                except MountError as e:
                    self._end(str(e), e)
                else:
                    worker.channel.send("listen", None, [self._held.listener.fileno()])
                    self._held.leave()
            case "reload":
                self._reload()
            case "serving":
                worker.serving = True
                notify(READY=1, STATUS=f"serving {self._point}")
                if not self._announced:
                    self._announced = True
                    self._announce()

    def _on_exit(self) -> None:
        worker = self._worker
        if worker is None:
            return
        while worker.channel.fileno() in self._callbacks:  # its last words
            self._on_message()
        self._worker = None
        code = worker.process.wait()
        self._unwatch(worker.pidfd)
        worker.close()
        if self._ended:
            return
        if worker.leaves_by is not None:
            log.info("the worker of %s has left; the next one starts", self._point)
            return
        how = f"signal {-code}" if code < 0 else f"status {code}"
        if not self._announced:
            self._end("its worker could not start", self._error or MountError(self._point, f"worker ended: {how}"))
            return
        if worker.serving and code == -signal.SIGKILL and not worker.hung:
            self._early_deaths = 0
        else:
            self._early_deaths = self._early_deaths + 1 if time.monotonic() - worker.started < YOUNG else 1
        if self._early_deaths > len(BACKOFF):
            self._end("workers die", MountError(self._point, f"{self._early_deaths} workers died in a row: {how}"))
            return
        delay = BACKOFF[max(0, self._early_deaths - 1)]
        self._next_start = time.monotonic() + delay
        log.warning("the worker of %s died (%s); the next one starts in %g s", self._point, how, delay)
        notify(STATUS=f"worker died ({how}), starting the next")

    def _check(self) -> None:
        notify(WATCHDOG=1)
        worker = self._worker
        if worker is None:
            return
        silent = time.monotonic() - worker.heard
        if silent > (PING_LIMIT if worker.serving else START_LIMIT):
            log.error("the worker of %s has been silent for %.0f s and is killed", self._point, silent)
            worker.heard = time.monotonic()
            worker.hung = True
            worker.process.kill()
        elif worker.leaves_by is not None and time.monotonic() > worker.leaves_by:
            worker.process.kill()

    def stop(self) -> None:
        """End the worker, which saves its state; the connection stays the caller's."""
        worker = self._worker
        if worker is not None:
            worker.channel.send("stop")
            try:
                worker.process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                log.warning("the worker of %s does not stop and is killed", self._point)
                worker.process.kill()
                worker.process.wait()
            worker.close()
        self._epoll.close()
