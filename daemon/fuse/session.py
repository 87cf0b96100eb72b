"""A session on /dev/fuse: threads that read requests and write replies, and notices the other way.

The device belongs to the keeper; a worker borrows it. What a dead worker had taken and not answered, the kernel hands
out again when the next one asks (`Notice.RESEND`), so that no caller sees the change.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

from kvfs.daemon.fuse import abi
from kvfs.daemon.fuse.abi import Notice, Op
from kvfs.daemon.fuse.backings import Backings
from kvfs.daemon.fuse.requests import Requests
from kvfs.errors import KvfsError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvfs.daemon.fuse.nodes import Nodes
    from kvfs.daemon.fuse.passthrough import Borrower, Lender
    from kvfs.daemon.view import View
    from kvfs.metrics import Metrics

log = logging.getLogger(__name__)

INTERRUPT_GRACE: Final = 1.0
"""Seconds that an interrupted open or read may still take before its caller is let go."""

INTERRUPTIBLE: Final = {Op.OPEN, Op.READ}
"""Requests that may be answered with EINTR: whatever they have done can be undone."""

MALFORMED: Final = (struct.error, OverflowError)
"""What a request raises that is shorter than its kind, or names an offset that no file has; no kernel sends such."""

NO_REPLY: Final = {Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT, Op.DESTROY}


class Task:
    """What one thread is doing; ``reads``: it is the one that reads requests, or will be when it has answered."""

    __slots__ = ("opcode", "reads", "since", "unique")

    def __init__(self) -> None:
        self.unique = self.opcode = 0
        self.reads = False
        self.since = 0.0


class Session:
    """Serves one mount until it is unmounted.

    One thread at a time reads requests. It answers what takes microseconds itself and goes on reading; before anything
    that may take long it hands the reading to the next thread. If all threads read, they would fight over the
    interpreter lock, which costs more than most requests.
    """

    def __init__(
        self, fd: int, view: View, nodes: Nodes, maker: Lender | Borrower | None, metrics: Metrics, threads: int
    ) -> None:
        self._fd, self._nodes = fd, nodes
        self._backings = Backings(nodes, maker)
        self._requests = Requests(view, nodes, self._backings)
        self._reading, self._mine = threading.Lock(), threading.local()
        view.before_slow = self.hand_over
        self._tasks = [Task() for _ in range(threads)]
        self._requests.on_lost = lambda path: self.gone([path])
        self._gone: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._seconds = {op: metrics.fuse_seconds.labels(op.name.lower()) for op in Op}
        self._counts = {op: metrics.fuse_requests.labels(op.name.lower(), "ok") for op in Op}
        self._metrics = metrics
        self._threads = [
            threading.Thread(target=self._serve, args=(task,), name=f"fuse-{i}", daemon=True)
            for i, task in enumerate(self._tasks)
        ]
        self._notices = threading.Thread(target=self._tell, name="fuse-notices", daemon=True)

    def start(self) -> None:
        """Take over whatever an earlier worker left unanswered, and begin to serve."""
        self._notify(Notice.RESEND)
        for thread in (*self._threads, self._notices):
            thread.start()

    def wait(self) -> None:
        """Return when the mount is gone."""
        for thread in self._threads:
            thread.join()
        self._gone.put(None)
        self._notices.join()

    def stuck(self, limit: float) -> bool:
        """Tell whether no request has been read for ``limit`` seconds since every thread is busy with an old one."""
        now = time.monotonic()
        old = [task.unique and now - task.since > limit for task in self._tasks]
        return all(old) or any(is_old and task.reads for is_old, task in zip(old, self._tasks, strict=True))

    def gone(self, paths: Iterable[str]) -> None:
        """The files behind these paths are gone: let the kernel forget the names. May be called from a handler."""
        for path in paths:
            self._gone.put(path)

    def let_go(self, inode: int) -> None:
        """Memory is needed: give back the backing id of a file of the store that nobody has open."""
        self._backings.let_go(inode)

    def tree_gone(self, root: str) -> None:
        """A folder of the view is gone with all that was in it."""
        below = [node.path for node in self._nodes if node.path.startswith(f"{root}/")]
        self.gone([*sorted(below, key=len, reverse=True), root])

    def refresh(self) -> None:
        """Let the kernel forget the names whose files went while no worker was there to say so."""
        self.gone([node.path for node in self._nodes if node.inode and not self._requests.current(node)])

    # --- requests ---

    def _serve(self, task: Task) -> None:
        buffer = bytearray(abi.READ_BUFFER)
        self._mine.task = task
        while True:
            self._reading.acquire()
            task.reads = True
            while task.reads:
                request = self._read(task, buffer)
                if request is None:
                    self._reading.release()
                    return
                if not self._requests.is_quick(task.opcode):
                    self.hand_over()
                self._handle(task, *request)

    def hand_over(self) -> None:
        """Let another thread read requests while this one, if it is the one that does, is at something that may take
        long."""
        task: Task | None = getattr(self._mine, "task", None)
        if task is not None and task.reads:
            task.reads = False
            self._reading.release()

    def _read(self, task: Task, buffer: bytearray) -> tuple[int, memoryview] | None:
        """The id of the next request's node and what follows its header; None when the mount is gone."""
        while True:
            try:
                size = os.readv(self._fd, [buffer])
            except OSError as e:
                if e.errno in {errno.ENOENT, errno.EINTR, errno.EAGAIN}:  # taken back before it was read
                    continue
                if e.errno not in {errno.ENODEV, errno.ECONNABORTED}:
                    log.error("cannot read requests: %s", e.strerror)
                return None
            if size < abi.IN_HEADER.size:
                continue
            _, opcode, unique, node_id, *_ = abi.IN_HEADER.unpack_from(buffer)
            task.since, task.opcode, task.unique = time.monotonic(), opcode, unique
            return node_id, memoryview(buffer)[abi.IN_HEADER.size : size]

    def _handle(self, task: Task, node_id: int, body: memoryview) -> None:
        if task.opcode in NO_REPLY:
            with contextlib.suppress(*MALFORMED):
                self._unanswered(task.opcode, node_id, body)
        else:
            self._answer(task.opcode, task.unique, node_id, body)
        task.unique = 0

    def _answer(self, opcode: int, unique: int, node_id: int, body: memoryview) -> None:
        started = time.perf_counter()
        reply, code = b"", 0
        try:
            handler = self._requests.handlers[opcode]
        except KeyError:
            code = errno.ENOSYS
        else:
            try:
                reply = handler(self._nodes[node_id], body, unique)
            except KeyError:
                code = errno.ESTALE
            except (KvfsError, OSError) as e:
                code = e.errno or errno.EIO
            except MALFORMED:
                code = errno.EINVAL
            except Exception:
                log.exception("request %d failed", opcode)
                code = errno.EIO
        delivered = self._reply(unique, code, reply)
        if not delivered and opcode == Op.OPEN and not code:
            self._requests.undelivered(self._nodes[node_id], reply)
        self._count(opcode, code, time.perf_counter() - started)

    def _reply(self, unique: int, code: int, reply: bytes) -> bool:
        try:
            os.writev(self._fd, [abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(reply), -code, unique), reply])
        except OSError as e:
            if e.errno not in {errno.ENOENT, errno.ENODEV}:  # answered as interrupted; unmounted
                log.error("cannot reply: %s", e.strerror)
            return False
        return True

    def _count(self, opcode: int, code: int, seconds: float) -> None:
        try:
            op = Op(opcode)
        except ValueError:
            return
        self._seconds[op].observe(seconds)
        if code:
            self._metrics.fuse_requests.labels(op.name.lower(), errno.errorcode.get(code, str(code))).inc()
        else:
            self._counts[op].inc()

    def _unanswered(self, opcode: int, node_id: int, body: memoryview) -> None:
        if opcode == Op.FORGET:
            self._backings.forget(node_id, abi.FORGET_IN.unpack_from(body)[0])
        elif opcode == Op.BATCH_FORGET:
            (count, _), at = abi.BATCH_FORGET_IN.unpack_from(body), abi.BATCH_FORGET_IN.size
            for forgotten, lookups in abi.FORGET_ONE.iter_unpack(body[at : at + count * abi.FORGET_ONE.size]):
                self._backings.forget(forgotten, lookups)
        elif opcode == Op.INTERRUPT:
            (unique,) = abi.INTERRUPT_IN.unpack_from(body)
            if any(task.unique == unique and task.opcode in INTERRUPTIBLE for task in self._tasks):
                late = threading.Timer(INTERRUPT_GRACE, self._let_go, [unique])
                late.daemon = True
                late.start()

    def _let_go(self, unique: int) -> None:
        """Answer for a thread that is still busy with a request whose caller was interrupted."""
        if any(task.unique == unique for task in self._tasks):
            self._reply(unique, errno.EINTR, b"")

    # --- notices ---

    def _tell(self) -> None:
        """Tell the kernel about names that are gone, from a thread of its own: it may have to wait for requests."""
        while (path := self._gone.get()) is not None:
            node = self._requests.gone(path)
            folder, _, name = path.rpartition("/")
            parent = self._nodes.at(folder or "/")
            if node is not None and parent is not None:
                raw = name.encode()
                self._notify(Notice.DELETE, abi.DELETE_OUT.pack(parent.id, node.id, len(raw), 0) + raw + b"\0")

    def _notify(self, notice: Notice, body: bytes = b"") -> None:
        try:
            os.writev(self._fd, [abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(body), notice, 0), body])
        except OSError as e:
            if e.errno not in {errno.ENOENT, errno.ENOTEMPTY, errno.ENODEV, errno.ENOTDIR}:
                log.warning("the kernel does not take notice %s: %s", notice.name, e.strerror)
