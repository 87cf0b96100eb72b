"""Frames of the control socket: what may be said, and how bytes and descriptors travel.

A frame is a u32 (little endian) length and one msgpack map.  Everything in it is flat: keys and ids go as one
blob, documents (a manifest, statistics) as JSON text.  Both ends decode strictly: a field that is missing, unknown,
given twice or of another type is a ProtocolError, and the connection it came on is closed.
"""

import array
import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from kvfs import errors
from kvfs.errors import DeadlineExceeded, KvfsError, ProtocolError

__all__ = [
    "KEY_BYTES",
    "MAX_DESCRIBED",
    "MAX_FDS",
    "MAX_FRAME",
    "MAX_KEYS",
    "VERBS",
    "Channel",
    "Deadline",
    "Verb",
    "check_reply",
    "check_request",
    "error_reply",
    "join_keys",
    "split_keys",
]

MAX_FRAME = 1 << 20
"""Bytes of a frame after its length."""
MAX_FDS = 250
"""Descriptors of one message; the kernel allows 253."""
KEY_BYTES = 32
MAX_KEYS = 16384
"""Keys of one lookup; a client asks for more in several."""
MAX_DESCRIBED = 128
"""Chunks described in one answer: with 64 parts each that fits into a document."""
MAX_DOCUMENT = 512 * 1024
MAX_TEXT = 512
MAX_NAMES = 64
_RECEIVE = 65536
_LENGTH = struct.Struct("<I")
_ANCILLARY = socket.CMSG_SPACE(253 * array.array("i").itemsize)


# --- verbs -------------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def _key(v: Any) -> bool:
    return type(v) is bytes and len(v) == KEY_BYTES


def _keys(v: Any) -> bool:
    return type(v) is bytes and len(v) % KEY_BYTES == 0 and len(v) <= MAX_KEYS * KEY_BYTES


def _few_keys(v: Any) -> bool:
    return _keys(v) and len(v) <= MAX_DESCRIBED * KEY_BYTES


def _blob(v: Any) -> bool:
    return type(v) is bytes


def _count(v: Any) -> bool:
    return type(v) is int and 0 <= v < 1 << 63


def _flag(v: Any) -> bool:
    return type(v) is bool


def _text(v: Any) -> bool:
    return type(v) is str and len(v) <= MAX_TEXT


def _document(v: Any) -> bool:
    return type(v) is str and len(v) <= MAX_DOCUMENT


def _names(v: Any) -> bool:
    return type(v) is list and 0 < len(v) <= MAX_NAMES and all(_text(x) for x in v)


class Verb(NamedTuple):
    """The fields of a request and of its answer; names in ``optional`` may be left out of the request."""

    request: Mapping[str, Check]
    reply: Mapping[str, Check]
    optional: frozenset[str] = frozenset()


_PART = {"ns": _key, "key": _key, "part": _text}

VERBS: Mapping[str, Verb] = {
    "ping": Verb({}, {"version": _text}),
    # own: the secret of the tenant whose socket this is, empty on that of a store; public: that of the tenant whose
    # chunks are found here too, empty where there is none.
    "salts": Verb({}, {"own": _blob, "public": _blob}),
    "register": Verb({"manifest": _document, "info": _document}, {"ns": _key}),
    # masks: one u64 a key, bit i = part i of the namespace's manifest.
    "lookup": Verb({"ns": _key, "keys": _keys}, {"masks": _blob}),
    # The j-th part asked for is names[which[j]] of the j-th key; the answer carries a descriptor for each, in
    # order, in `verified` a byte 0 or 1, and in `forms` the number of its form (kvfs.codec.FORMS).  `lease` is a number
    # the client chose.  `coded`: the client takes coded forms too.
    "lease": Verb(
        {"ns": _key, "lease": _count, "keys": _keys, "names": _names, "which": _blob, "coded": _flag},
        {"verified": _blob, "forms": _blob},
        frozenset({"coded"}),
    ),
    # A lease of an earlier connection claimed again, without descriptors; `missing`: keys gone meanwhile.
    "hold": Verb({"ns": _key, "lease": _count, "keys": _keys}, {"missing": _count}),
    # leases: one u64 (little endian) each; unknown ones are none of the server's business.
    "release": Verb({"leases": _blob}, {}),
    # gone: nothing damaged is left in the part's place.
    "report": Verb({**_PART, "reason": _text}, {"gone": _flag}, frozenset({"reason"})),
    # The answer carries one writable descriptor.  `key`: of the chunk to come, for what is stored at its second coming.
    "reserve": Verb({"ns": _key, "nbytes": _count, "key": _key}, {"token": _text}, frozenset({"key"})),
    "publish": Verb({"token": _text, **_PART}, {"created": _flag}),
    "discard": Verb({"token": _text}, {}),
    "explain": Verb(
        {"ns": _key, "keys": _keys, "manifest": _document}, {"document": _document}, frozenset({"manifest"})
    ),
    "stats": Verb({}, {"document": _document}),
    # Keys of a namespace, a page a request: `begin` with 0, go on with what was `next`, until that is 0 again; all anew
    # when `table` is another.
    "keys": Verb({"ns": _key, "begin": _count}, {"keys": _keys, "next": _count, "table": _count}),
    # What is known of chunks: `chunks`, in the order of the keys; null for one that is gone.
    "describe": Verb({"ns": _key, "keys": _few_keys}, {"document": _document}),
    "touch": Verb({"ns": _key, "keys": _keys}, {}),
    "remove": Verb({"ns": _key, "key": _key}, {"removed": _flag}),
    "retire": Verb({"ns": _key}, {"chunks": _count}),
    # nbytes: how much to free, of one namespace or all.
    "evict": Verb({"ns": _key, "nbytes": _count}, {"chunks": _count, "bytes": _count}, frozenset({"ns"})),
    # For about `seconds`, bring chunks not used for `idle` seconds (as a rule: as configured), of one namespace or all,
    # to the coded form.
    "compact": Verb(
        {"ns": _key, "idle": _count, "seconds": _count},
        {"chunks": _count, "before": _count, "after": _count, "done": _flag},
        frozenset({"ns", "idle"}),
    ),
    # What that would do, if need be at another level.
    "plan": Verb(
        {"ns": _key, "idle": _count, "level": _text}, {"document": _document}, frozenset({"ns", "idle", "level"})
    ),
    # The operator's word on how far a namespace may be compacted.
    "force": Verb({"ns": _key, "level": _text}, {}),
    "pin": Verb({"ns": _key, "key": _key, "pinned": _flag}, {}),
    # The daemon lists its store; the answer counts parts it did not know and parts that were gone.
    "reconcile": Verb({}, {"found": _count, "gone": _count}),
    # Another worker takes over soon after the answer; it has an uptime of its own.
    "reload": Verb({}, {}),
}


def check_request(message: Mapping[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """Split a request into its sequence number, verb and fields; ProtocolError unless it is one."""
    fields = dict(message)
    seq, name = fields.pop("seq", None), fields.pop("verb", None)
    if not _count(seq) or type(name) is not str or name not in VERBS:
        raise ProtocolError(f"{str(name)[:40]!r} is not a verb")
    verb = VERBS[name]
    _check_fields(name, fields, verb.request, verb.optional)
    return seq, name, fields


def check_reply(message: Mapping[str, Any], seq: int, name: str) -> dict[str, Any] | KvfsError:
    """The fields of the answer to request ``seq``, or the error it reports.  ProtocolError is raised for anything
    that does not answer the request."""
    fields = dict(message)
    if fields.pop("seq", None) != seq:
        raise ProtocolError(f"an answer to another request than {name} {seq}")
    if "error" in fields:
        return _reported(fields)
    _check_fields(f"answer to {name}", fields, VERBS[name].reply, frozenset())
    return fields


def _check_fields(what: str, fields: Mapping[str, Any], schema: Mapping[str, Check], optional: frozenset[str]) -> None:
    if unknown := fields.keys() - schema.keys():
        raise ProtocolError(f"{what}: unknown field {str(min(unknown, key=str))[:40]!r}")
    if missing := schema.keys() - fields.keys() - optional:
        raise ProtocolError(f"{what}: field {min(missing)} is missing")
    for name, value in fields.items():
        if not schema[name](value):
            raise ProtocolError(f"{what}: field {name} is not what it should be")


def error_reply(seq: int, error: KvfsError) -> dict[str, Any]:
    """The answer that makes the client raise the same error."""
    return {"seq": seq, "error": type(error).__name__, "args": [str(a)[:MAX_TEXT] for a in error.args][:MAX_NAMES]}


def _reported(fields: Mapping[str, Any]) -> KvfsError:
    name, args = fields["error"], fields.get("args")
    if type(name) is not str or name not in errors.__all__ or type(args) is not list or not all(_text(a) for a in args):
        raise ProtocolError("an error this version does not know")
    error: KvfsError = getattr(errors, name)(*args)
    try:
        str(error)
    except IndexError:
        raise ProtocolError(f"{name} with {len(args)} arguments") from None
    return error


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as one blob; ProtocolError if one has not 32 bytes."""
    if any(len(k) != KEY_BYTES for k in keys):
        raise ProtocolError(f"a key has {KEY_BYTES} bytes")
    return b"".join(keys)


def split_keys(blob: bytes) -> list[bytes]:
    """The keys of a blob that `join_keys` made."""
    return [blob[i : i + KEY_BYTES] for i in range(0, len(blob), KEY_BYTES)]


# --- bytes -------------------------------------------------------------------------------------


class Deadline:
    """The moment at which ``what``, begun now, has taken ``seconds`` and is given up."""

    def __init__(self, what: str, seconds: float) -> None:
        self.what, self.seconds = what, seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, more than 0; DeadlineExceeded when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.exceeded()
        return left

    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._end

    def exceeded(self) -> DeadlineExceeded:
        """The error to raise when the time is up."""
        return DeadlineExceeded(self.what, f"{self.seconds:.3g}")


def _unique(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    d = dict(pairs)
    if len(d) != len(pairs):
        raise ProtocolError("a field is given twice")
    return d


def decode(body: bytes) -> dict[str, Any]:
    """One message; ProtocolError for anything but a flat map with text for names."""
    try:
        message = msgpack.unpackb(
            body, strict_map_key=True, object_pairs_hook=_unique, max_map_len=32, max_array_len=MAX_NAMES, max_ext_len=0
        )
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as e:
        if isinstance(e, ProtocolError):
            raise
        raise ProtocolError(f"not msgpack ({type(e).__name__})") from None
    if type(message) is not dict:
        raise ProtocolError("a message is a map")
    return message


class Channel:
    """One end of a connection: whole messages, with descriptors beside them.

    Not thread-safe.  After any exception but DeadlineExceeded from `receive` with nothing received, the stream is
    out of step and the channel is good for nothing but `close`.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._buffer = bytearray()
        self._fds: list[int] = []

    def close(self) -> None:
        self._close_fds()
        self.sock.close()

    def shutdown(self) -> None:
        """End the connection for both sides, also under a thread that waits in it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def send(self, message: Mapping[str, Any], deadline: Deadline, fds: Sequence[int] = ()) -> None:
        """Send one message by ``deadline``.  ProtocolError if it is too long,
        DeadlineExceeded, ConnectionError."""
        body: bytes = msgpack.packb(message)
        if len(body) > MAX_FRAME or len(fds) > MAX_FDS:
            raise ProtocolError(f"a message of {len(body)} bytes with {len(fds)} descriptors is too long")
        data = memoryview(_LENGTH.pack(len(body)) + body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            try:
                data = data[self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL) :]
                rights = []
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def receive(self, deadline: Deadline, nfds: int = 0) -> tuple[dict[str, Any], list[int]]:
        """The next message and its descriptors (close-on-exec, the caller's to close): ``nfds`` or none.

        ProtocolError for a message that is malformed, too long, or comes with another number of descriptors;
        DeadlineExceeded; ConnectionError at the end of the stream.  Descriptors that come with those are closed.
        """
        try:
            self._fill(_LENGTH.size, deadline, nfds)
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME:
                raise ProtocolError(f"a frame of {size} bytes")
            self._fill(_LENGTH.size + size, deadline, nfds)
            body = bytes(memoryview(self._buffer)[_LENGTH.size : _LENGTH.size + size])
            del self._buffer[: _LENGTH.size + size]
            message = decode(body)
            if len(self._fds) not in (0, nfds):
                raise ProtocolError(f"{len(self._fds)} descriptors where {nfds} were expected")
        except BaseException:
            self._close_fds()
            raise
        fds, self._fds = self._fds, []
        return message, fds

    def wait_readable(self, deadline: Deadline) -> None:
        """Return when something can be received; DeadlineExceeded."""
        if not self._buffer:
            self._wait(select.POLLIN, deadline)

    def _fill(self, size: int, deadline: Deadline, nfds: int) -> None:
        while len(self._buffer) < size:
            try:
                data, ancillary, flags, _ = self.sock.recvmsg(_RECEIVE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(raw[: len(raw) - len(raw) % received.itemsize])
                    self._fds += received
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise ProtocolError("more descriptors than fit")
            if len(self._fds) > nfds:  # not once the frame is whole: a thousand half frames would bring as many each
                raise ProtocolError(f"{len(self._fds)} descriptors where {nfds} were expected")
            if not data:
                raise ConnectionResetError("the other end closed the connection")
            self._buffer += data

    def _wait(self, event: int, deadline: Deadline) -> None:
        poller = select.poll()
        poller.register(self.sock, event)
        if not poller.poll(deadline.left() * 1000):
            raise deadline.exceeded()

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
