"""What passes between the processes of a daemon: settings and descriptors at start, short messages afterwards."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self

from kvfs import errors
from kvfs.config import SETTINGS, Config
from kvfs.errors import KvfsError

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_MESSAGE: Final = 65536
MAX_FDS: Final = 16

ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1"}
"""For the environment of a worker, which multiplies nothing, and gives up its rights before it has a second thread."""


def dump_config(config: Config) -> dict[str, list[str]]:
    """All settings as text, with their origins, for `load_config` in another process."""
    shown = {name: row.show(getattr(config, name)) for name, row in SETTINGS.items()}
    return {name: [text, config.origins.get(name, "default")] for name, text in shown.items()}


def load_config(rows: dict[str, list[str]]) -> Config:
    """The inverse of `dump_config`."""
    values = {name: SETTINGS[name].kind.parse(shown) for name, (shown, _) in rows.items() if shown}
    return Config(**values, origins=MappingProxyType({name: origin for name, (_, origin) in rows.items()}))


def dump_error(error: KvfsError) -> list[str]:
    """An error as its class and arguments."""
    return [type(error).__name__, *map(str, error.args)]


def load_error(words: list[str]) -> KvfsError:
    """The inverse of `dump_error`."""
    name, *args = words
    kind = getattr(errors, name) if name in errors.__all__ else KvfsError
    error: KvfsError = kind(*args)
    return error


@dataclass
class Channel:
    """Messages, each a word, a JSON value and perhaps descriptors, between two processes of a daemon."""

    sock: socket.socket

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Two ends; the second is for the child."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    @classmethod
    def inherited(cls, fd: int) -> Self:
        """The end that a parent passed on."""
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd))

    def send(self, word: str, value: object = None, fds: Iterable[int] = ()) -> bool:
        """Send; False if the other side is gone."""
        try:
            socket.send_fds(self.sock, [json.dumps([word, value]).encode()], list(fds))
        except OSError:
            return False
        return True

    def receive(self, timeout: float | None) -> tuple[str, Any, list[int]]:
        """The next message; the word is ``eof`` when the other side is gone, ``""`` when none came in time."""
        self.sock.settimeout(timeout)
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE, MAX_FDS)
        except TimeoutError:
            return "", None, []
        except OSError:
            return "eof", None, []
        if not data:
            return "eof", None, []
        word, value = json.loads(data)
        for fd in fds:
            os.set_inheritable(fd, False)
        return word, value, fds

    def fileno(self) -> int:
        """For selectors, and to pass on."""
        return self.sock.fileno()

    def close(self) -> None:
        """Close this end."""
        self.sock.close()


def python(module: str, channel: Channel, *shown: object) -> list[str]:
    """The command that runs a module of this package with one end of a channel, from any folder.

    What is ``shown`` is for people who read ``ps``; the module gets its orders through the channel, named last.
    """
    return [sys.executable, "-P", "-m", module, *map(str, shown), str(channel.fileno())]


def orders(channel: Channel, word: str) -> tuple[Any, list[int]]:
    """Value and descriptors of the first message, which must be ``word``; without it this process ends."""
    received, value, fds = channel.receive(None)
    if received != word:
        sys.exit("no orders: the keeper is gone, has sent this process away, or did not start it")
    return value, fds
