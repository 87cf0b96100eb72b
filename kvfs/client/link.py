"""A connection to the daemon that costs its users nothing while the daemon is dead, hung or restarting.

A path inside a mount can block for as long as the mount's server does, so a thread of the link's own connects;
the threads that call never name a path.  The link is also the circuit breaker: the call that meets a failure
takes at most its deadline, those after it fail in microseconds until that thread has connected and been answered.
"""

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvfs.client.fork import restart_in_child
from kvfs.errors import DaemonUnavailable, KvfsError
from kvfs.protocol import Channel, Deadline, check_reply, check_request

__all__ = ["Call", "Link"]

ANSWER = 1.0
"""Seconds in which a daemon answers a ping, or else counts as hung."""
KEEPALIVE = 30.0
"""Seconds between pings of an idle connection: they find a daemon that hangs before a request does."""
BACK_OFF = (0.05, 2.0)
"""Seconds between attempts to connect: the first pause, and the longest it doubles to."""

Call = Callable[..., tuple[dict[str, Any], list[int]]]
"""``call(verb, timeout, nfds=0, **fields)`` → the fields of the answer, and its descriptors."""


class Link:
    """Calls over one connection, one at a time, from any thread.

    ``greet`` is run with a `Call` on each new connection before others may use it.  Nothing is started before the
    first call, and a fork starts anew: the connection stays the parent's.
    """

    def __init__(self, path: Path, greet: Callable[[Call], None] | None = None) -> None:
        self.path = path
        self._greet = greet
        self._closed = False
        self._channel: Channel | None = None
        self.restart()
        restart_in_child(self)

    def restart(self) -> None:
        """Be as new.  In a child, after a fork: the connection goes on in the parent."""
        if self._channel is not None:
            self._channel.close()
        self._turn = threading.Lock()  # one call at a time
        self._state = threading.Condition()  # guards what follows
        self._channel = None
        self._seq = 0
        self._answered = False  # since the last connect
        self._why: str | None = None  # there is no channel; None: not tried yet
        self._thread: threading.Thread | None = None

    def call(self, verb: str, timeout: float, nfds: int = 0, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """Ask, and wait at most ``timeout`` seconds; the answer comes with ``nfds`` descriptors or none.

        DeadlineExceeded; DaemonUnavailable, at once after an earlier failure; ProtocolError for an answer that is
        none; and whatever error the daemon reports.
        """
        check_request({"seq": 0, "verb": verb, **fields})
        deadline = Deadline(f"{verb} at {self.path}", timeout)
        self._start()
        if not self._turn.acquire(timeout=deadline.left()):
            raise deadline.exceeded()
        try:
            channel = self._connected(deadline)
            try:
                answer = self._exchange(channel, deadline, verb, nfds, fields)
            except (KvfsError, OSError) as e:
                self._fail(channel, e)
                if isinstance(e, KvfsError):
                    raise
                raise DaemonUnavailable(self.path, _reason(e)) from e
            self._answered = True
        finally:
            self._turn.release()
        if isinstance(answer, KvfsError):
            raise answer
        return answer

    def close(self) -> None:
        """End the connection and the thread.  Later calls raise DaemonUnavailable."""
        with self._state:
            self._closed, thread = True, self._thread
            if self._channel is not None:
                self._channel.shutdown()
            self._state.notify_all()
        if thread is not None:
            thread.join(ANSWER)  # it may be stuck in the mount

    # --- in the caller's thread ---

    def _start(self) -> None:
        with self._state:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._keep_connected, name="kvfs-link", daemon=True)
                self._thread.start()

    def _connected(self, deadline: Deadline) -> Channel:
        with self._state:
            if not self._state.wait_for(lambda: self._channel or self._why or self._closed, deadline.left()):
                self._why = "the mount does not answer"  # nobody else has to find out
                raise deadline.exceeded()
            if self._channel is None or self._closed:
                raise DaemonUnavailable(self.path, "closed" if self._closed else self._why)
            return self._channel

    def _exchange(
        self, channel: Channel, deadline: Deadline, verb: str, nfds: int, fields: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int]] | KvfsError:
        self._seq += 1
        channel.send({"seq": self._seq, "verb": verb, **fields}, deadline)
        message, fds = channel.receive(deadline, nfds)
        reply: dict[str, Any] | KvfsError | None = None
        try:
            reply = check_reply(message, self._seq, verb)
        finally:
            if not isinstance(reply, dict):
                for fd in fds:
                    os.close(fd)
        return (reply, fds) if isinstance(reply, dict) else reply

    def _fail(self, channel: Channel, error: Exception) -> None:
        channel.shutdown()  # wakes the thread that waits for its end
        with self._state:
            if self._channel is channel:
                self._channel, self._why = None, _reason(error)

    # --- in the link's thread ---

    def _keep_connected(self) -> None:
        pause = BACK_OFF[0]
        while not self._closed:
            try:
                channel = self._connect()
            except (KvfsError, OSError) as e:
                self._install(None, _reason(e))
            else:
                self._install(channel, "the connection ended")
                self._wait_for_end(channel)
                self._fail(channel, ConnectionResetError("the daemon closed the connection"))
                with self._turn:  # nobody is inside
                    channel.close()
                if self._answered:  # a daemon that answers nothing but pings must not be tried at every request
                    pause = BACK_OFF[0] / 2
            with self._state:
                self._state.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, BACK_OFF[1])

    def _install(self, channel: Channel | None, why: str) -> None:
        with self._state:
            self._channel, self._answered, self._why = channel, False, why
            self._state.notify_all()

    def _connect(self) -> Channel:
        channel = Channel(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            channel.sock.connect(os.fspath(self.path))

            def call(verb: str, timeout: float, nfds: int = 0, **fields: Any) -> tuple[dict[str, Any], list[int]]:
                answer = self._exchange(channel, Deadline(verb, timeout), verb, nfds, fields)
                if isinstance(answer, KvfsError):
                    raise answer
                return answer

            call("ping", ANSWER)
            if self._greet is not None:
                self._greet(call)
        except BaseException:
            channel.close()
            raise
        return channel

    def _wait_for_end(self, channel: Channel) -> None:
        poller = select.poll()
        poller.register(channel.sock, select.POLLRDHUP)
        while not self._closed and not poller.poll(KEEPALIVE * 1000):
            with contextlib.suppress(KvfsError):  # a failure ends the connection, which the poll then sees
                self.call("ping", ANSWER)


def _reason(error: Exception) -> str:
    """What to tell of a failure: errors of the system without their number."""
    return str(error) if isinstance(error, KvfsError) else getattr(error, "strerror", None) or str(error)
