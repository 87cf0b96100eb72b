"""What is fuzzed: each target takes any bytes, and raises for what must not happen."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgpack

from kvfs import _native, chunk
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.fuse import abi
from kvfs.daemon.fuse.abi import Op
from kvfs.daemon.fuse.nodes import Nodes
from kvfs.daemon.fuse.session import Session
from kvfs.daemon.view import View
from kvfs.errors import ChunkCorrupt, IdentityError, ProtocolError
from kvfs.identity import Manifest
from kvfs.index import _MAGIC, Index
from kvfs.metrics import Metrics
from kvfs.names import part_path
from kvfs.protocol import check_reply, check_request, decode
from tests.attacks import derived, frames, headers, manifests
from tests.samples import MANIFEST, new_store, put
from tests.small import NS, PART, SMALL

if TYPE_CHECKING:
    from collections.abc import Callable

KEY: Final = bytes([9]) * 32


def header(data: bytes) -> None:
    """The header of a part, as it is and with the checksum it needs: ChunkCorrupt, or a header that fits its file."""
    for raw in (data, headers.seal(data)):
        for size in (len(raw), headers.SIZE):
            try:
                found = chunk.parse_header(raw, size)
            except ChunkCorrupt:
                continue
            assert found.data_start + found.layout.nbytes == size
            assert len(found.sums) == 8 * (len(found.layout.bounds) - 1)


def frame(data: bytes) -> None:
    """The body of a frame, as a request and as an answer: ProtocolError, or what its verb asks for."""
    try:
        message = decode(data)
    except ProtocolError:
        return
    with contextlib.suppress(ProtocolError):
        seq, verb, fields = check_request(message)
        assert decode(msgpack.packb({"seq": seq, "verb": verb, **fields})) == message
    with contextlib.suppress(ProtocolError):
        str(check_reply(message, message.get("seq", 0), "lookup"))


def manifest(data: bytes) -> None:
    """A manifest as it comes over the socket: IdentityError, or one that says the same when it is written down."""
    from kvfs.daemon.control import _manifest

    try:
        found = _manifest(data.decode(errors="replace"))
    except IdentityError:
        return
    assert Manifest.from_json(found.to_json()) == found


class Places:
    """A store with one part, for the targets that need one; one a process."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="kvfs-fuzz-")
        self.store = new_store(Path(self.folder.name) / "store", SMALL)
        put(self.store, KEY, manifest=SMALL)

    def close(self) -> None:
        self.store.close()
        self.folder.cleanup()


class Snapshot(Places):
    """The snapshot of an index, with the checksum it needs: not believed, or an index without contradictions."""

    def __call__(self, data: bytes) -> None:
        index = Index(self.store)
        index.snapshot_path.write_bytes(_MAGIC + struct.pack("<Q", _native.xxh3_64(data)) + data)
        if index.load():
            index.check_integrity()
        index.reconcile()
        index.check_integrity()
        assert index.masks(NS, [KEY]) == [1]


class _Failures(logging.Handler):
    """Exceptions that a session has survived and logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(self.format(record))


class Requests(Places):
    """Requests on /dev/fuse, for which a socket stands: each is answered once, with a result or an error."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog(self.store, Config(), Metrics())
        self.view = View(self.catalog, self.catalog.config, "text\n", socket_bound=True)
        self.kernel, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self._table = os.memfd_create("nodes")
        self.nodes = Nodes(self._table)
        self.session = Session(os.dup(server.fileno()), self.view, self.nodes, None, self.catalog.metrics, 1)
        server.close()
        self.failures = _Failures()
        logging.getLogger("kvfs.daemon.fuse.session").addHandler(self.failures)
        self.buffer = bytearray(abi.READ_BUFFER)
        for path in ("/.kvfs", "/.kvfs/stats.json", f"/{SMALL.ns_hex}", f"/{SMALL.ns_hex}/{part_path(KEY, PART)}"):
            st = self.view.getattr(path)
            self.nodes.look_up(path, st["st_ino"], st["st_size"], st["st_mtime"])
        self.ids = [node.id for node in self.nodes]

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        ops = [*Op]
        opcode = ops[data[0] % len(ops)] if data[0] < 250 else data[0]
        node = self.ids[data[1] % len(self.ids)] if data[1] < 250 else data[1]
        body = data[2:60_000]
        self.kernel.send(abi.IN_HEADER.pack(abi.IN_HEADER.size + len(body), opcode, 77, node, 0, 0, 1, 0, 0) + body)
        [task] = self.session._tasks
        self.session._mine.task = task
        request = self.session._read(task, self.buffer)
        assert request is not None
        self.session._handle(task, *request)
        replies = []
        with contextlib.suppress(BlockingIOError):
            while True:
                replies.append(self.kernel.recv(abi.READ_BUFFER))
        answered = [reply for reply in replies if abi.OUT_HEADER.unpack_from(reply)[2] == 77]
        silent = opcode in {Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT, Op.DESTROY}
        assert len(answered) == (not silent), answered
        for reply in answered:
            length, error, _ = abi.OUT_HEADER.unpack_from(reply)
            assert length == len(reply)
            assert -4096 < error <= 0
        assert not self.failures.found, self.failures.found.pop()
        self._tidy()

    def _tidy(self) -> None:
        """Everything open is let go of, and what was removed comes back."""
        for handle in [*self.view._handles]:
            self.view.release("", handle)
        self.session._requests._listings.clear()
        if not (self.store.path / SMALL.ns_hex / part_path(KEY, PART)).exists():
            put(self.store, KEY, manifest=SMALL)
            self.catalog.refresh(NS, KEY, PART)

    def close(self) -> None:
        logging.getLogger("kvfs.daemon.fuse.session").removeHandler(self.failures)
        self.kernel.close()
        os.close(self.session._fd)
        os.close(self._table)
        super().close()


@dataclass(frozen=True)
class Target:
    """A target, and bytes to begin with."""

    make: Callable[[], Callable[[bytes], None]]
    seeds: tuple[bytes, ...]


def _requests() -> tuple[bytes, ...]:
    """A sound request of each kind."""
    name = part_path(KEY, PART).rpartition("/")[2].encode() + b"\0"
    bodies = (name, bytes(40) + name, bytes(16) + name, bytes(64), bytes(128), b"\0" * 24 + b"user.kvfs.hits\0")
    return tuple(bytes([n, node]) + body for n in range(len(Op)) for node in range(5) for body in bodies)


def _good_header() -> bytes:
    meta = chunk.PartMeta(MANIFEST.ns, headers.KEY, bytes(32), 256, 512, headers.PART)
    return chunk.encode_header(MANIFEST, meta, bytes(32))


TARGETS: Final[dict[str, Target]] = {
    "header": Target(lambda: header, (_good_header(), *headers.ATTACKS.values())),
    "frame": Target(
        lambda: frame,
        (
            msgpack.packb({"seq": 1, "verb": "lookup", "ns": KEY, "keys": KEY * 2}),
            msgpack.packb({"seq": 1, "error": "ChunkNotFound", "args": ["x"]}),
            msgpack.packb({"seq": 1, "masks": b"\1" * 8}),
            *(raw[4:] for raw in frames.ATTACKS.values()),
        ),
    ),
    "manifest": Target(
        lambda: manifest,
        (
            *(text.encode() for text in manifests.ATTACKS.values() if len(text) < 10_000),
            str(MANIFEST.to_json()).replace("'", '"').replace("None", "null").encode(),
        ),
    ),
    "snapshot": Target(
        Snapshot,
        tuple(raw[len(_MAGIC) + 8 :] for raw in (derived.SOUND, *derived.SNAPSHOTS.values()) if len(raw) < 5000),
    ),
    "requests": Target(Requests, _requests()),
}
