"""Daemons for the tests: the control socket of a real store, in this process or in one that can be killed."""

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvfs import chunk
from kvfs.client import Client
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.control import ControlServer
from kvfs.identity import Manifest, PartId
from kvfs.metrics import Metrics
from kvfs.store import Store
from tests.samples import MANIFEST, payload


def listen(mount: Path) -> socket.socket:
    """A listening socket where a mount has it."""
    path = mount / ".kvfs" / "sock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(path))
    listener.listen(128)
    return listener


@contextlib.contextmanager
def catalog_of(path: Path, resumed: bool = False, **settings: object) -> Iterator[Catalog]:
    with Store.open(path) as store:
        yield Catalog(store, Config(**settings), Metrics(), resumed)  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(catalog: Catalog, mount: Path) -> Iterator[ControlServer]:
    """A control server in this process."""
    with listen(mount) as listener:
        server = ControlServer(catalog, listener)
        server.start()
        try:
            yield server
        finally:
            server.close()


class Daemon:
    """A control server in a process of its own, on a listener that outlives it as the keeper's does."""

    def __init__(self, store: Path, mount: Path) -> None:
        self.store, self.mount = store, mount
        self.listener = listen(mount)
        self.process: multiprocessing.process.BaseProcess | None = None

    def start(self, resumed: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        ready, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.store, self.listener, resumed, theirs))
        self.process.start()
        theirs.close()
        assert ready.recv() == "ready"
        ready.close()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        pid = self.process.pid or 0
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)  # its threads go on for a moment

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()
            self.process = None

    def __enter__(self) -> "Daemon":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.listener.close()


def _serve(path: Path, listener: socket.socket, resumed: bool, ready: "multiprocessing.connection.Connection") -> None:
    with catalog_of(path, resumed) as catalog:
        ControlServer(catalog, listener).start()
        ready.send("ready")
        ready.close()
        signal.pause()


def meta(key: bytes, part: PartId, manifest: Manifest = MANIFEST, tokens: int = 256) -> chunk.PartMeta:
    return chunk.PartMeta(manifest.ns, key, bytes(32), tokens, 0, part)


def put(client: Client, key: bytes, parts: Sequence[PartId] = MANIFEST.parts) -> list[bool]:
    """Store parts of a chunk through a client; tells which were new."""
    created = []
    for part in parts:
        with client.reserve(MANIFEST.ns, 200_000, timeout=5.0) as reservation:
            chunk.write_part(reservation.fd, MANIFEST, meta(key, part), payload(key, part))
            created.append(client.publish(MANIFEST.ns, reservation, key, part))
    return created


def read(fd: int, key: bytes, part: PartId) -> bytes:
    """The checked payload behind a leased descriptor, which stays open."""
    with chunk.open_part(os.dup(fd), MANIFEST, key, part) as file:
        return bytes(file.verify())


def file_of(store: Path, key: bytes, part: PartId) -> Path:
    return store / MANIFEST.ns_hex / key.hex()[:3] / f"{key.hex()}.{part}.safetensors"


def damage(path: Path, at: int = -1) -> None:
    """Flip a bit of a published part."""
    path.chmod(0o640)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
    path.chmod(0o440)
