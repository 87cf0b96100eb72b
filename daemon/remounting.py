"""The keeper of a mount that ends with its server, as one through libfuse does: the next server makes another.

Who reads through the mount gets an error and has to open the file again; engines read by the descriptors that they
have leased, and connect again.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from kvfs.daemon.backoff import Backoff
from kvfs.daemon.fuse import connection
from kvfs.daemon.handover import Channel, dump_config, load_error, python
from kvfs.daemon.notify import notify
from kvfs.daemon.supervisor import PING_LIMIT, START_LIMIT
from kvfs.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfs.config import Config
    from kvfs.errors import KvfsError

log = logging.getLogger(__name__)


class Remounter:
    """Keeps a store mounted at a place, by children that mount and serve."""

    def __init__(self, config: Config, point: Path) -> None:
        self._config, self._point = config, point
        self._child: subprocess.Popen[bytes] | None = None
        self._answered = self._ended = False

    def run(self, announce: Callable[[], None]) -> None:
        """Serve until the mount is taken away or SIGTERM or SIGINT comes; ``announce`` is called once it answers.

        Raises what kept the first child from serving, or MountError when one after the other dies.
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing that could take over unnoticed
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end())
        backoff = Backoff()
        while not self._ended:
            started = time.monotonic()
            code, error = self._serve(announce)
            if code == 0:
                break
            connection.clear(self._point)
            how = f"signal {-code}" if code < 0 else f"status {code}"
            if not self._answered and not self._ended:
                raise error or MountError(self._point, f"libfuse ended: {how}")
            delay = backoff.died(started)
            if delay is None:
                raise MountError(self._point, f"{backoff.deaths} servers died in a row: {how}")
            log.warning("the server of %s died (%s); it is mounted anew in %g s", self._point, how, delay)
            time.sleep(delay)
        notify(STOPPING=1)

    def _end(self) -> None:
        self._ended = True
        if self._child is not None:
            self._child.terminate()

    def _serve(self, announce: Callable[[], None]) -> tuple[int, KvfsError | None]:
        """Have one child serve; its exit status, and what it complained of."""
        ours, theirs = Channel.pair()
        with ours.sock, theirs.sock:
            command = python("kvfs.daemon.fuse.libfuse", theirs, self._config.store, self._config.mountpoint)
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/")
            theirs.close()
            if self._ended:  # said before there was this child
                self._child.terminate()
            ours.send("serve", {"config": dump_config(self._config), "resumed": self._answered})
            error, patience = None, START_LIMIT
            while (message := ours.receive(patience))[0] != "eof":
                match message[0]:
                    case "":
                        log.error("the server of %s has been silent for %g s and is killed", self._point, patience)
                        self._child.kill()
                    case "error":
                        error = load_error(message[1])
                    case "serving":
                        patience = PING_LIMIT
                        notify(READY=1, STATUS=f"serving {self._point} through libfuse")
                        if not self._answered:
                            self._answered = True
                            announce()
                    case "ping":
                        notify(WATCHDOG=1)
            return self._child.wait(), error
