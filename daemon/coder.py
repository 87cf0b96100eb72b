"""Parts coded and decoded in a process of its own, which runs when nothing else wants the processor.

A thread of such low priority would at times hold the interpreter lock without getting the processor, and everything
that waits for that lock, an engine's lookup too, would wait with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from kvfs import _native
from kvfs.chunk import open_part
from kvfs.codec import CodedPart, encode_part, level, rope_of
from kvfs.coded import open_coded, read_all
from kvfs.daemon.handover import Channel, dump_error, load_error
from kvfs.daemon.idle import come_last
from kvfs.errors import ChunkCorrupt, DaemonUnavailable, KvfsError
from kvfs.files import from_os_error
from kvfs.identity import PartId
from kvfs.store import Store
from kvfs.tenants import place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Self

    from typing_extensions import Buffer

    from kvfs.config import Config

log = logging.getLogger(__name__)

RAW: Final = "raw"
PR_SET_PDEATHSIG: Final = 1
PR_SET_NAME: Final = 15
NAME: Final = b"kvfs-coder"


class Made(NamedTuple):
    """A part written in another form: bytes of that file, its form, and seconds of processor time it took."""

    size: int
    form: str
    seconds: float


def make(store: Store, ns: bytes, key: bytes, part: PartId, form: str, out: int) -> Made:
    """Write a part in another form to the empty file ``out``: ``raw`` from its coded file, or coded (``form`` is the
    name of a level) from its raw one, losslessly where the level cannot hold its values.

    What has been written is read back, decoded, and compared with what it was made of. ChunkNotFound if the other form
    is not there, ChunkCorrupt if that is damaged or what was written is, Unsupported for what the codec does not code,
    StoreFull.
    """
    began, manifest = _seconds(), store.manifest(ns)
    if form == RAW:
        with open_coded(store.open_part(ns, key, part, coded=True), manifest, key, part) as coded:
            _write(store, out, [coded.raw_header(), coded.header.decode(coded.read())])
        with open_part(os.dup(out), manifest, key, part) as written:
            written.verify()
        return Made(os.fstat(out).st_size, RAW, _seconds() - began)
    with open_part(store.open_part(ns, key, part), manifest, key, part) as raw:
        rope = rope_of(manifest.config, manifest.kind(part.kind))
        _write(store, out, [encode_part(raw.header, raw.read(), level(form), rope)])
        sums = raw.header.sums
    name = f"{key.hex()}.{part}"
    blob = read_all(out, os.fstat(out).st_size, name)
    made = CodedPart.parse(blob, len(blob), name)
    made.expect(manifest, key, part)
    decoded = _native.sums(made.decode(blob), made.layout.bounds)
    if decoded != made.sums or (made.level.lossless and decoded != sums):
        raise ChunkCorrupt(name, "checksum", "what was coded does not decode to what it should")
    return Made(len(blob), made.form, _seconds() - began)


def _write(store: Store, out: int, pieces: Sequence[Buffer]) -> None:
    """Write and bring to the disk: the form that this is made of goes next."""
    try:
        at = 0
        for piece in pieces:
            view, done = memoryview(piece), 0
            while done < len(view):
                done += os.pwrite(out, view[done:], at + done)
            at += done
        os.fdatasync(out)
    except OSError as e:
        raise from_os_error(e, store.path) from e


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Coder:
    """`make` in a child process. Start it before any thread: it is forked. Thread-safe, one part at a time.

    The child comes last, and then gives up what ``confine`` takes from it.
    """

    def __init__(self, store: Path, confine: Callable[[], object] = lambda: None) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._channel, theirs = Channel.pair()
        self.pid = os.fork()
        if not self.pid:
            _serve(store, theirs.sock.detach(), confine)
        theirs.close()

    @classmethod
    def of(cls, config: Config, confine: Callable[[], object] = lambda: None) -> Self | None:
        """One for the store of a daemon; None if that is not to write."""
        return None if config.read_only or config.store is None else cls(config.store, confine)

    def make(self, ns: bytes, key: bytes, part: PartId, form: str, out: int, tenant: str = "") -> Made:
        """As `make`, in the store or in that of a tenant; DaemonUnavailable if the process has died."""
        with self._lock:
            sent = self._channel.send("make", [tenant, ns.hex(), key.hex(), str(part), form], [out])
            message = self._channel.receive(None) if sent else None
        if message is not None and message[0] == "error":
            raise load_error(message[1])
        if message is None or message[0] != "made":
            raise DaemonUnavailable(self._store, "its process that codes parts has died")
        return Made(*message[1])

    def close(self) -> None:
        """End the process, after the part that it is at."""
        self._channel.close()
        os.waitpid(self.pid, 0)


def _serve(path: Path, fd: int, confine: Callable[[], object]) -> None:
    """The child's life: nothing of its parent is left to it but the channel, standard error and its limits."""
    code = 1
    try:
        os.closerange(3, fd)
        os.closerange(fd + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_NAME, NAME)
        come_last()
        confine()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # now: a change of user forgets it
        channel = Channel.inherited(fd)
        with Store.open(path) as whole:
            while True:
                word, job, fds = channel.receive(None)
                if word != "make":
                    break
                tenant, ns, key, part, form = job
                with Store.open(place(path, tenant)) if tenant else contextlib.nullcontext(whole) as store:
                    _answer(channel, store, bytes.fromhex(ns), bytes.fromhex(key), PartId.parse(part), form, fds[0])
        code = 0
    except KvfsError as e:  # of the store, which its parent complains of too
        log.error("nothing codes parts of %s: %s", path, e)
    except Exception:
        log.exception("the process that codes parts of %s failed", path)
    finally:
        os._exit(code)


def _answer(channel: Channel, store: Store, ns: bytes, key: bytes, part: PartId, form: str, out: int) -> None:
    """Close the file before the answer: it is published only when nobody can write to it."""
    try:
        try:
            answer: tuple[str, object] = "made", make(store, ns, key, part, form, out)
        finally:
            os.close(out)
    except KvfsError as e:
        answer = "error", dump_error(e)
    channel.send(*answer)
