"""The control socket: a thread a connection, strict frames, and nothing one peer does that another would feel."""

import contextlib
import fcntl
import json
import logging
import os
import select
import socket
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import kvfs
from kvfs import codec
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.facts import describe
from kvfs.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    IdentityError,
    KvfsError,
    ProtocolError,
    StoreFull,
    StoreReadOnly,
    Unsupported,
)
from kvfs.identity import Manifest, PartId
from kvfs.protocol import MAX_FDS, Channel, Deadline, check_request, error_reply, split_keys

__all__ = ["ControlServer", "Rules"]

log = logging.getLogger(__name__)

MAX_CONNECTIONS_OF_USER = 512
MAX_RESERVATIONS = 1024
"""Temp files that one connection may have open for writing."""
HELLO = 2.0
"""Seconds in which a new connection sends its first request."""
IDLE = 120.0
"""Seconds of silence after which a connection is closed; clients ping every 30."""
FRAME = 5.0
"""Seconds in which a frame that has begun arrives whole, and in which an answer is taken."""
ACCEPT_PAUSE = 0.1
SWEEP = 30
"""Seconds, at most, that one request to compact is worked on."""
MAX_OWING = 64
"""Connections, at most, with descriptors on their way that were not taken."""
PAGE = 4096
"""Rows of the index looked at for a page of keys: lookups wait meanwhile."""
BRINGING = frozenset({"lease", "reserve"})
"""Verbs whose answers bring descriptors."""

Fields = dict[str, Any]
Answer = tuple[Fields, list[int]]
"""The fields of an answer, and descriptors to send with it and then close."""


class Peer(NamedTuple):
    """Who is at the other end, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class Rules(NamedTuple):
    """What holds for all who connect to one socket: who they are is decided by which socket that is.

    ``admins``: users who may remove chunks, beside the daemon's.  ``connections`` and ``files`` (being written): how
    many there may be.  ``salts``: secrets for keys, the peer's own and the public one.  ``about``: what `stats` adds.
    """

    admins: frozenset[int] = frozenset({0})
    connections: int = 1024
    files: int = 1 << 20
    salts: Callable[[], tuple[bytes, bytes]] = lambda: (b"", b"")
    about: Callable[[], Fields] = dict


class ControlServer:
    """Serves a catalog on a listening socket, which stays the caller's.

    `start` returns at once; `close` ends all connections, and with them their leases and reservations.
    """

    def __init__(
        self,
        catalog: Catalog,
        listener: socket.socket,
        reload: Callable[[], object] | None = None,
        rules: Rules = Rules(),  # noqa: B008 - immutable
    ) -> None:
        self.catalog, self.rules, self.reload = catalog, rules, reload
        self._listener = listener
        self._lock = threading.Lock()
        self._connections: dict[_Connection, threading.Thread] = {}
        self._users: Counter[int] = Counter()
        self._owing: set[_Connection] = set()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._accept, name="kvfs-control", daemon=True)

    def start(self) -> None:
        """Accept connections, in a thread."""
        self._listener.setblocking(False)
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, and end every connection."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        with self._lock:
            connections = dict(self._connections)
        for connection, thread in connections.items():
            connection.channel.shutdown()
            thread.join(FRAME)
        os.close(self._stop)

    def bring(self, connection: "_Connection") -> None:
        """A connection is about to be sent descriptors. On their way they count as open ones of the daemon's user:
        peers that never took theirs could leave none to the peers of other sockets. StoreFull."""
        with self._lock:
            if len(self._owing) >= MAX_OWING:
                self._owing = {each for each in self._owing if each in self._connections and each.owes()}
                if len(self._owing) >= MAX_OWING:
                    raise StoreFull(f"more than {MAX_OWING} clients that take no answers", "clients")
            self._owing.add(connection)

    def _accept(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        while self._stop not in {fd for fd, _ in poller.poll()}:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as e:  # out of descriptors: those connected go on
                log.warning("cannot accept a connection: %s", e.strerror)
                time.sleep(ACCEPT_PAUSE)
                continue
            self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        peer = Peer(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
        connection = _Connection(self, Channel(sock), peer)
        thread = threading.Thread(target=self._run, args=(connection,), name=f"kvfs-peer-{peer.pid}", daemon=True)
        with self._lock:
            if len(self._connections) >= self.rules.connections or self._users[peer.uid] >= MAX_CONNECTIONS_OF_USER:
                log.info("refused a connection of uid %d, pid %d: too many", peer.uid, peer.pid)
                connection.channel.close()
                return
            try:
                thread.start()
            except RuntimeError as e:  # out of threads
                log.warning("cannot serve a connection: %s", e)
                connection.channel.close()
                return
            self._connections[connection] = thread
            self._users[peer.uid] += 1

    def _run(self, connection: "_Connection") -> None:
        try:
            connection.run()
        except Exception:  # the daemon's loop: a fault of ours ends this connection only
            log.exception("a connection of pid %d failed", connection.peer.pid)
        finally:
            connection.close()
            with self._lock:
                del self._connections[connection]
                self._users[connection.peer.uid] -= 1


class _Connection:
    """One peer, its leases (which are held in its name) and its reservations."""

    def __init__(self, server: ControlServer, channel: Channel, peer: Peer) -> None:
        self.catalog, self.channel, self.peer = server.catalog, channel, peer
        self._server = server
        self._reserved: dict[str, bytes] = {}

    def run(self) -> None:
        """Serve until the peer leaves, is silent for too long, or says what the protocol does not allow."""
        patience = HELLO
        try:
            while True:
                self.channel.wait_readable(Deadline("the next request", patience))
                message, _ = self.channel.receive(Deadline("a request", FRAME))
                if not self._answer(message):
                    return
                patience = IDLE
        except ProtocolError as e:
            log.info("closed a connection of pid %d, uid %d: %s", self.peer.pid, self.peer.uid, e)
            with contextlib.suppress(DeadlineExceeded, OSError):
                self._send(error_reply(0, e))
        except (DeadlineExceeded, OSError):
            return  # gone, or as good as gone

    def close(self) -> None:
        """End what the peer held."""
        self.catalog.leases.drop(self)
        for token, ns in self._reserved.items():
            self.catalog.discard(ns, token)
        self.channel.close()

    def _answer(self, message: Fields) -> bool:
        """Answer one request; False if the connection is to be closed."""
        seq, verb, fields = check_request(message)
        begun = time.perf_counter()
        fds: list[int] = []
        if verb in BRINGING and self.owes():
            raise ProtocolError(f"{verb} before the last answer was taken")
        try:
            if verb in BRINGING:
                self._server.bring(self)
            answer, fds = getattr(self, f"_{verb}")(**fields)  # check_request knows the verb and its fields
            reply, result = {"seq": seq, **answer}, "ok"
        except KvfsError as e:
            reply, result = error_reply(seq, e), type(e).__name__
        except OSError as e:  # of the store's filesystem, or out of descriptors
            error = DaemonUnavailable(self.catalog.store.path, e.strerror)
            reply, result = error_reply(seq, error), type(error).__name__
        metrics = self.catalog.metrics
        metrics.control_requests.labels(verb, result).inc()
        metrics.control_seconds.labels(verb).observe(time.perf_counter() - begun)
        try:
            self._send(reply, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return result != ProtocolError.__name__

    def owes(self) -> bool:
        """Whether the peer has yet to take what was sent."""
        with contextlib.suppress(OSError):  # closed meanwhile
            fd = self.channel.sock.fileno()
            return fd >= 0 and fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)) != bytes(4)
        return False

    def _send(self, reply: Fields, fds: list[int] | None = None) -> None:
        self.channel.send(reply, Deadline("an answer", FRAME), fds or ())

    # --- verbs: the fields of each are in kvfs.protocol.VERBS ---

    def _ping(self) -> Answer:
        return {"version": kvfs.__version__}, []

    def _salts(self) -> Answer:
        own, public = self._server.rules.salts()
        return {"own": own, "public": public}, []

    def _register(self, manifest: str, info: str) -> Answer:
        return {"ns": self.catalog.register(_manifest(manifest), _object(info))}, []

    def _lookup(self, ns: bytes, keys: bytes) -> Answer:
        masks = self.catalog.lookup(ns, split_keys(keys))
        return {"masks": struct.pack(f"<{len(masks)}Q", *masks)}, []

    def _lease(self, ns: bytes, lease: int, keys: bytes, names: list[str], which: bytes, coded: bool = False) -> Answer:
        wanted = split_keys(keys)
        if len(which) != len(wanted) or len(which) > MAX_FDS or any(i >= len(names) for i in which):
            raise ProtocolError("lease: keys and parts do not fit")
        parts = [PartId.parse(name) for name in names]
        refs = [(key, parts[i]) for key, i in zip(wanted, which, strict=True)]
        opened = self.catalog.lease(self, lease, ns, refs, coded)
        about = {
            "verified": bytes(o.verified for o in opened),
            "forms": bytes(codec.FORMS.index(o.form) for o in opened),
        }
        return about, [o.fd for o in opened]

    def _hold(self, ns: bytes, lease: int, keys: bytes) -> Answer:
        return {"missing": self.catalog.hold(self, lease, ns, split_keys(keys))}, []

    def _release(self, leases: bytes) -> Answer:
        if len(leases) % 8:
            raise ProtocolError("release: a lease is a number of 8 bytes")
        for (lease,) in struct.iter_unpack("<Q", leases):
            self.catalog.leases.release(self, lease)
        return {}, []

    def _report(self, ns: bytes, key: bytes, part: str, reason: str | None = None) -> Answer:
        return {"gone": self.catalog.report(self, ns, key, PartId.parse(part), reason)}, []

    def _reserve(self, ns: bytes, nbytes: int, key: bytes | None = None) -> Answer:
        if len(self._reserved) >= MAX_RESERVATIONS:
            raise StoreFull(f"more than {MAX_RESERVATIONS} files of one client", "clients")
        if self.catalog.admission.files >= self._server.rules.files:
            raise StoreFull(f"more than {self._server.rules.files} files of all clients", "clients")
        temp = self.catalog.reserve(ns, nbytes, key)
        self._reserved[temp.name] = ns
        return {"token": temp.name}, [temp.fd]

    def _publish(self, token: str, ns: bytes, key: bytes, part: str) -> Answer:
        named = PartId.parse(part)
        if self._reserved.get(token) != ns:
            raise DaemonUnavailable(self.catalog.store.path, "the reservation ended with an earlier connection")
        del self._reserved[token]
        return {"created": self.catalog.publish_file(ns, token, key, named)}, []

    def _discard(self, token: str) -> Answer:
        ns = self._reserved.pop(token, None)
        if ns is not None:
            self.catalog.discard(ns, token)
        return {}, []

    def _explain(self, ns: bytes, keys: bytes, manifest: str | None = None) -> Answer:
        asker = None if manifest is None else _manifest(manifest)
        return _document(self.catalog.explain(ns, split_keys(keys), asker))

    def _stats(self) -> Answer:
        return _document(self.catalog.stats() | self._server.rules.about())

    def _keys(self, ns: bytes, begin: int) -> Answer:
        page = self.catalog.index.page(ns, begin, PAGE)
        return {"keys": b"".join(page.keys), "next": page.next, "table": page.table}, []

    def _describe(self, ns: bytes, keys: bytes) -> Answer:
        return _document({"chunks": [describe(self.catalog, ns, key) for key in split_keys(keys)]})

    def _touch(self, ns: bytes, keys: bytes) -> Answer:
        self.catalog.touch(ns, split_keys(keys))
        return {}, []

    def _remove(self, ns: bytes, key: bytes) -> Answer:
        self._administer()
        return {"removed": self.catalog.remove_chunk(ns, key)}, []

    def _retire(self, ns: bytes) -> Answer:
        self._administer()
        return {"chunks": self.catalog.retire(ns)}, []

    def _evict(self, nbytes: int, ns: bytes | None = None) -> Answer:
        self._administer()
        freed = self.catalog.evict(ns, nbytes)
        return {"chunks": freed.chunks, "bytes": freed.bytes}, []

    def _compact(self, seconds: int, idle: int | None = None, ns: bytes | None = None) -> Answer:
        self._administer()
        return self.catalog.sweep(ns, idle, min(seconds, SWEEP))._asdict(), []

    def _plan(self, idle: int | None = None, ns: bytes | None = None, level: str | None = None) -> Answer:
        self._administer()
        return _document(
            {"namespaces": self.catalog.sweeper.plan(ns, idle, None if level is None else codec.level(level))}
        )

    def _force(self, ns: bytes, level: str) -> Answer:
        self._administer()
        self.catalog.compactor.force(ns, codec.level(level))
        return {}, []

    def _pin(self, ns: bytes, key: bytes, pinned: bool) -> Answer:
        self._administer()
        self.catalog.pin(ns, key, pinned)
        return {}, []

    def _reconcile(self) -> Answer:
        self._administer()
        found, gone = self.catalog.reconcile()
        return {"found": found, "gone": gone}, []

    def _reload(self) -> Answer:
        self._administer()
        if self._server.reload is None:
            raise Unsupported("reload here: of a tenant, or without a keeper; unmount, and mount again")
        self._server.reload()
        return {}, []

    def _administer(self) -> None:
        if self.peer.uid not in self._server.rules.admins | {os.geteuid()}:
            raise StoreReadOnly(self.catalog.store.path, f"uid {self.peer.uid} may not remove what others use")


def _object(text: str) -> Fields:
    """A JSON object; IdentityError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise IdentityError("a JSON object is expected")
    return value


def _manifest(text: str) -> Manifest:
    return Manifest.from_json(_object(text))


def _document(value: Fields) -> Answer:
    return {"document": json.dumps(value)}, []
