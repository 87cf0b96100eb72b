"""The keeper's loop: one worker at a time serves the mount, and is replaced when it dies or hangs.

Callers of the mount notice nothing: the connection, the control socket, the table of nodes and the files lent to the
kernel belong to the keeper, and what a dead worker left unanswered the next one is asked again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from kvfs.daemon.backoff import Backoff
from kvfs.daemon.bind import bind
from kvfs.daemon.fuse import connection
from kvfs.daemon.fuse.abi import Init
from kvfs.daemon.fuse.passthrough import Lender
from kvfs.daemon.handover import ONE_THREAD, Channel, dump_config, load_error, python
from kvfs.daemon.notify import managed, notify
from kvfs.daemon.tree import SOCKET, tenant_path
from kvfs.errors import MountError
from kvfs.tenants import MAX_TENANTS
from kvfs.tenants import is_name as is_tenant

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfs.config import Config
    from kvfs.daemon.held import Held
    from kvfs.daemon.rendezvous import Door

log = logging.getLogger(__name__)

START_LIMIT: Final = 120.0
"""Seconds that a worker may take to read or list the store, and before that to come if the keeper does not start it."""

PING_LIMIT: Final = 10.0
"""Seconds without a sign of life after which a worker is replaced."""

STOP_LIMIT: Final = 10.0
"""Seconds that a worker may take to save its state."""

KILLED: Final = f"signal {int(signal.SIGKILL)}"
TICK: Final = 1.0
PAUSE: Final = 3.0
"""Seconds between two looks that show that the keeper was kept from running: its guest paused, its group frozen."""
MOUNT_TABLE: Final = Path("/proc/self/mountinfo")


class Worker:
    """A running worker, and the keeper's end of what connects them: a child, or a service that has come by itself."""

    def __init__(self, channel: Channel, pidfd: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.channel, self.pidfd, self._child = channel, pidfd, child
        self.started = self.heard = time.monotonic()
        self.serving = self.hung = False
        self.leaves_by: float | None = None
        """When it has to be gone, if it was told to make room for the next."""

    @classmethod
    def child(cls, config: Config) -> Self:
        """Start one."""
        ours, theirs = Channel.pair()
        child = subprocess.Popen(
            python("kvfs.daemon.worker", theirs, config.store, config.mountpoint),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, **ONE_THREAD},
        )
        theirs.close()
        return cls(ours, os.pidfd_open(child.pid), child)

    def order(self, config: Config, lender: Lender, held: Held, resumed: bool) -> None:
        """Hand it what it serves, and lend files to the kernel for it from now on. ``resumed``: clients of an earlier
        worker are about to connect again."""
        lending, borrowing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = {
            "config": dump_config(config),
            "agreed": int(held.agreed),
            "resumed": resumed,
            "bound": held.listener is not None,
            "listening": list(held.tenants),
            "managed": managed(),
        }
        self.channel.send("serve", order, [held.fuse_fd, held.table_fd, borrowing.fileno()])
        borrowing.close()
        threading.Thread(target=lender.serve, args=(lending,), name="lender", daemon=True).start()

    def kill(self) -> None:
        """End it hard, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has ended, at the latest after ``timeout`` seconds."""
        return bool(select.select([self.pidfd], [], [], timeout)[0])

    def close(self) -> str:
        """Close the keeper's end, once the process has ended; how it did, as far as a parent is told."""
        self.channel.close()
        os.close(self.pidfd)
        if self._child is None:
            return "it is gone"
        code = self._child.wait()
        return f"signal {-code}" if code < 0 else f"status {code}"


class Supervisor:
    """Keeps a mount served, by workers that come through ``door`` if there is one, else by children.

    A kernel that sends nothing again (before Linux 6.9) leaves callers of a dead worker waiting: ``anew`` then ends the
    mount, with errors for them, and makes another.
    """

    def __init__(
        self, config: Config, store: Path, held: Held, door: Door | None, anew: Callable[[Held], Held]
    ) -> None:
        self._config, self._store, self._door, self._anew = config, store, door, anew
        self._point = held.mount.point
        self._serve(held)
        self._resumes = held.listener is not None
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._worker: Worker | None = None
        self._next_start = self._looked = time.monotonic()
        self._backoff = Backoff()
        self._announced = self._ended = False
        self._error: Exception | None = None

    def _serve(self, held: Held) -> None:
        self.held = held
        self._lender = Lender(held.fuse_fd, self._store)

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
        if fd not in self._callbacks:
            self._epoll.register(fd, events)
            self._callbacks[fd] = callback

    def _unwatch(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _on_mounts(self) -> None:
        """The mount table has changed. The socket keeps the connection alive without a mount, so this is how to see
        that the mount was taken away."""
        if self.held.mount not in connection.mounts():
            self._end("it was unmounted")

    def _end(self, reason: str, error: Exception | None = None) -> None:
        log.log(logging.ERROR if error else logging.INFO, "%s ends: %s", self._point, reason)
        self._ended, self._error = True, self._error or error

    # --- a worker's life ---

    def _start(self) -> None:
        worker = Worker.child(self._config) if self._door is None else self._admit(self._door)
        if worker is None:
            return
        worker.order(self._config, self._lender, self.held, self._resumes or self._announced)
        self._worker = worker
        self._watch(worker.channel.fileno(), self._on_message)
        self._watch(worker.pidfd, self._on_exit)
        if self.held.listener is not None:
            worker.channel.send("listen", None, [self.held.listener.fileno()])
        for tenant, listener in self.held.tenants.items():
            worker.channel.send("listen", tenant, [listener.fileno()])

    def _admit(self, door: Door) -> Worker | None:
        """The worker that waits at the door; None if there is none yet, which this loop then watches for."""
        found = door.admit()
        if found is not None:
            self._unwatch(door.fileno())
            return Worker(*found)
        self._watch(door.fileno(), lambda: None)
        if time.monotonic() > self._next_start + START_LIMIT:
            reason = f"no worker has come to {self._config.worker_socket}; start its service, or `kvfs worker` there"
            self._end(reason, MountError(self._point, reason))
        return None

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
            case "answering" if self.held.listener is None:
                try:
                    self.held.listener = bind(self._point)
                except MountError as e:
                    self._end(str(e), e)
                else:
                    worker.channel.send("listen", None, [self.held.listener.fileno()])
                    self.held.leave()
            case "reload":
                self._reload()
            case "serving":
                worker.serving = True
                notify(READY=1, STATUS=f"serving {self._point}")
                if not self._announced:
                    self._announced = True
                    self._announce()
            case "tenant" | "no-tenant":
                self._on_tenant(worker, word, str(value))

    def _on_tenant(self, worker: Worker, word: str, name: str) -> None:
        """Bind the socket of a tenant that the worker has found, which asks again should that fail; or let it go."""
        if word == "no-tenant" or not is_tenant(name) or len(self.held.tenants) >= MAX_TENANTS:
            self.held.drop(name)
            return
        try:
            listener = bind(self._point, tenant_path(name, SOCKET))
        except MountError as e:
            log.warning("tenant %s: %s", name, e)
        else:
            self.held.take(name, listener)
            worker.channel.send("listen", name, [listener.fileno()])

    def _on_exit(self) -> None:
        worker = self._worker
        if worker is None:
            return
        while worker.channel.fileno() in self._callbacks:  # its last words
            self._on_message()
        self._worker = None
        self._unwatch(worker.pidfd)
        how = worker.close()
        self._next_start = time.monotonic()
        if self._ended:
            return
        if self._announced and Init.HAS_RESEND not in self.held.agreed:
            self._serve(self._anew(self.held))
        if worker.leaves_by is not None:
            log.info("the worker of %s has left; the next one starts", self._point)
            return
        if not self._announced and not self._resumes:
            self._end("its worker could not start", self._error or MountError(self._point, f"worker ended: {how}"))
            return
        outside = worker.serving and how == KILLED and not worker.hung
        delay = self._backoff.died(worker.started, outside)
        if delay is None:
            self._end("workers die", MountError(self._point, f"{self._backoff.deaths} workers died in a row: {how}"))
            return
        self._next_start += delay
        log.warning("the worker of %s died (%s); the next one starts in %g s", self._point, how, delay)
        notify(STATUS=f"worker died ({how}), starting the next")

    def _check(self) -> None:
        notify(WATCHDOG=1)
        worker, looked, self._looked = self._worker, self._looked, time.monotonic()
        if worker is None:
            return
        worker.heard = excused(worker.heard, looked, self._looked)
        silent = self._looked - worker.heard
        if silent > (PING_LIMIT if worker.serving else START_LIMIT):
            log.error("the worker of %s has been silent for %.0f s and is killed", self._point, silent)
            worker.heard = time.monotonic()
            worker.hung = True
            worker.kill()
        elif worker.leaves_by is not None and time.monotonic() > worker.leaves_by:
            worker.kill()

    def stop(self) -> None:
        """End the worker, which saves its state; the connection stays the caller's."""
        worker = self._worker
        if worker is not None:
            worker.channel.send("stop")
            if not worker.wait(STOP_LIMIT):
                log.warning("the worker of %s does not stop and is killed", self._point)
                worker.kill()
                worker.wait()
            worker.close()
        self._epoll.close()


def excused(heard: float, looked: float, now: float) -> float:
    """When the worker was heard last, but for what the keeper, which looked last at ``looked``, did not run itself."""
    pause = now - looked
    return min(now, heard + pause) if pause > PAUSE else heard
