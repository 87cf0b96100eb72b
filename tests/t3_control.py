"""The control socket against peers that are hostile, careless, or many."""

import array
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from kvfs.client import MountClient
from kvfs.daemon import control
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.control import ControlServer
from kvfs.errors import DaemonUnavailable, IdentityError, NamespaceNotFound, ProtocolError, StoreFull, StoreReadOnly
from kvfs.identity import PartId
from kvfs.protocol import MAX_FRAME, VERBS, Channel, Deadline, check_reply
from tests.conftest import Logs
from tests.daemons import catalog_of, put, serving
from tests.samples import MANIFEST, new_key, new_store

NS = MANIFEST.ns
FULL0 = PartId("full", 0)


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    new_store(tmp_path / "store").close()
    with catalog_of(tmp_path / "store") as found:
        yield found
        found.leases.check_integrity()
        assert len(found.leases) == 0
        assert not os.listdir(found.store.path / MANIFEST.ns_hex / "tmp")


@pytest.fixture
def server(catalog: Catalog, mount: Path) -> Iterator[ControlServer]:
    before = len(os.listdir("/proc/self/fd"))
    with serving(catalog, mount) as found:
        yield found
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the namespace's folder


@pytest.fixture
def victim(server: ControlServer, mount: Path) -> Iterator[MountClient]:
    """A well-behaved client, which must not feel what others do."""
    with MountClient(mount) as client:
        client.lookup(NS, [new_key()], timeout=5.0)
        yield client
        begun = time.perf_counter()
        assert client.lookup(NS, [new_key()], timeout=1.0) == [0]
        assert time.perf_counter() - begun < 0.3


def dial(mount: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(os.fspath(mount / ".kvfs" / "sock"))
    sock.settimeout(10)
    return sock


def frame(message: object) -> bytes:
    body = message if isinstance(message, bytes) else msgpack.packb(message)
    return struct.pack("<I", len(body)) + body


def is_closed(sock: socket.socket, seconds: float = 5.0) -> bool:
    """Whether the server ends the connection; what it says before is read."""
    sock.settimeout(seconds)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


class Peer:
    """A client of the bare protocol."""

    def __init__(self, mount: Path) -> None:
        self.channel = Channel(dial(mount))
        self.seq = 0

    def ask(self, verb: str, nfds: int = 0, **fields: object) -> tuple[dict[str, object], list[int]]:
        self.seq += 1
        self.channel.send({"seq": self.seq, "verb": verb, **fields}, Deadline("a test", 5.0))
        message, fds = self.channel.receive(Deadline("a test", 5.0), nfds)
        reply = check_reply(message, self.seq, verb)
        if isinstance(reply, Exception):
            raise reply
        return reply, fds

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def test_every_verb_is_served() -> None:
    assert all(callable(getattr(control._Connection, f"_{verb}")) for verb in VERBS)


@pytest.mark.parametrize(
    "bad",
    [
        frame(b"\xc1"),
        frame([1]),
        frame({"seq": 1, "verb": "destroy"}),
        frame({"seq": 1, "verb": "lookup", "ns": NS}),
        frame({"seq": 1, "verb": "lookup", "ns": NS, "keys": b"", "more": 1}),
        frame({"seq": 1, "verb": "lease", "ns": NS, "lease": 1, "keys": NS, "names": ["full.h0"], "which": b"\1"}),
        frame({"seq": 1, "verb": "lease", "ns": NS, "lease": 1, "keys": NS, "names": ["full.h0"], "which": b""}),
        frame({"seq": 1, "verb": "release", "leases": b"odd"}),
        struct.pack("<I", MAX_FRAME + 1),
        struct.pack("<I", 0xFFFFFFFF) + b"x" * 100,
        os.urandom(4096),
    ],
)
def test_a_bad_frame_ends_its_own_connection(victim: MountClient, mount: Path, bad: bytes) -> None:
    with dial(mount) as sock:
        sock.sendall(bad)
        assert is_closed(sock)


def test_random_frames_hurt_nobody(victim: MountClient, mount: Path) -> None:
    rng = random.Random(7)
    values = [0, -1, 1 << 70, "", "x" * 600, b"", NS, NS * 3, [], ["a"] * 70, {}, None, True, 1.5, {"a": {}}]
    for _ in range(150):
        verb = rng.choice([*VERBS, "x", None])
        names = [*VERBS[verb].request, "zz"] if verb in VERBS else ["keys"]
        message = {"seq": rng.choice([1, None]), "verb": verb} | {
            name: rng.choice(values) for name in names if rng.random() < 0.9
        }
        with dial(mount) as sock:
            try:
                sock.sendall(
                    frame(message)
                    if message.get("seq") is not None and 1 << 70 not in message.values()
                    else b"\0\0\0\0"
                )
                sock.shutdown(socket.SHUT_WR)
                assert is_closed(sock)
            except ConnectionError:
                pass


def test_descriptors_sent_to_the_server_are_closed(victim: MountClient, mount: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with dial(mount) as sock:
        fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(10)]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sock.sendmsg([frame({"seq": 1, "verb": "ping"})], rights)
        assert is_closed(sock)
        for fd in fds:
            os.close(fd)
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_peer_that_leaves_in_the_middle(victim: MountClient, mount: Path) -> None:
    whole = frame({"seq": 1, "verb": "lookup", "ns": NS, "keys": NS * 100})
    for cut in (0, 1, 3, 4, 5, 100, len(whole) - 1, len(whole)):
        with dial(mount) as sock:
            sock.sendall(whole[:cut])


def test_silence_is_limited(server: ControlServer, mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says nothing, one that stops inside a frame, one that falls silent later."""
    monkeypatch.setattr(control, "HELLO", 0.2)
    monkeypatch.setattr(control, "FRAME", 0.2)
    monkeypatch.setattr(control, "IDLE", 0.4)
    with dial(mount) as mute, dial(mount) as half, dial(mount) as idle:
        half.sendall(frame({"seq": 1, "verb": "ping"})[:6])
        idle.sendall(frame({"seq": 1, "verb": "ping"}))
        assert idle.recv(100)
        assert is_closed(mute, 2.0)
        assert is_closed(half, 2.0)
        assert is_closed(idle, 2.0)


def test_a_peer_that_takes_no_answers_is_left(
    victim: MountClient, mount: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "FRAME", 0.2)
    ask = frame({"seq": 1, "verb": "lookup", "ns": NS, "keys": NS * 16384})
    with dial(mount) as sock, pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012 - the one that fails varies
        sock.settimeout(5)
        for _ in range(100):
            sock.sendall(ask)


def test_a_flood_of_connections_leaves_the_others_served(
    victim: MountClient, mount: Path, monkeypatch: pytest.MonkeyPatch, server: ControlServer
) -> None:
    monkeypatch.setattr(control, "MAX_CONNECTIONS_OF_USER", 40)
    socks = [dial(mount) for _ in range(200)]
    begun = time.perf_counter()
    victim.lookup(NS, [new_key()], timeout=1.0)
    assert time.perf_counter() - begun < 0.5
    assert sum(is_closed(s, 0.001) for s in socks) >= 160
    for s in socks:
        s.close()
    deadline = time.monotonic() + 5
    while sum(server._users.values()) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(server._users.values()) == 1  # the victim


def test_what_a_connection_held_ends_with_it(server: ControlServer, catalog: Catalog, mount: Path) -> None:
    with MountClient(mount) as client:
        key = new_key()
        put(client, key)
    with Peer(mount) as peer:
        _, fds = peer.ask("lease", 1, ns=NS, lease=1, keys=key, names=["full.h0"], which=b"\0")
        os.close(fds[0])
        _, fds = peer.ask("reserve", 1, ns=NS, nbytes=1)
        os.close(fds[0])
        assert catalog.leases.held(NS, key) == 1
        assert len(os.listdir(catalog.store.path / MANIFEST.ns_hex / "tmp")) == 1
    deadline = time.monotonic() + 5
    while (catalog.leases.held(NS, key) or os.listdir(catalog.store.path / MANIFEST.ns_hex / "tmp")) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert catalog.leases.held(NS, key) == 0


def test_one_connection_cannot_use_the_reservation_of_another(server: ControlServer, mount: Path) -> None:
    with Peer(mount) as mine, Peer(mount) as other:
        reply, fds = mine.ask("reserve", 1, ns=NS, nbytes=1)
        os.close(fds[0])
        with pytest.raises(DaemonUnavailable):
            other.ask("publish", token=reply["token"], ns=NS, key=new_key(), part="full.h0")
        other.ask("discard", token=reply["token"])
        mine.ask("discard", token=reply["token"])
        with pytest.raises(DaemonUnavailable):
            mine.ask("publish", token="../../etc/passwd", ns=NS, key=new_key(), part="full.h0")


def test_reservations_are_bounded(server: ControlServer, mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_RESERVATIONS", 2)
    with Peer(mount) as peer:
        for _ in range(2):
            os.close(peer.ask("reserve", 1, ns=NS, nbytes=1)[1][0])
        with pytest.raises(StoreFull):
            peer.ask("reserve", 1, ns=NS, nbytes=1)


def test_errors_of_a_request_leave_the_connection(server: ControlServer, mount: Path) -> None:
    with Peer(mount) as peer:
        for _ in range(3):
            with pytest.raises(NamespaceNotFound):
                peer.ask("lookup", ns=new_key(), keys=b"")
            with pytest.raises(IdentityError):
                peer.ask("report", ns=NS, key=new_key(), part="full.h99")
        for manifest in ("", "[]", "{}", "nonsense", "[" * 100_000, '{"kinds": 7}'):
            with pytest.raises(IdentityError):
                peer.ask("register", manifest=manifest, info="{}")
        assert peer.ask("ping")[0]["version"]


def test_holding_again_tells_what_is_gone(server: ControlServer, catalog: Catalog, mount: Path) -> None:
    with MountClient(mount) as client:
        key = new_key()
        put(client, key)
    with Peer(mount) as peer:
        assert peer.ask("hold", ns=NS, lease=5, keys=key + new_key())[0] == {"missing": 1}
        assert catalog.leases.held(NS, key) == 1
        peer.ask("release", leases=struct.pack("<2Q", 5, 77))
        assert catalog.leases.held(NS, key) == 0


def test_only_the_owner_and_root_remove(
    server: ControlServer, catalog: Catalog, mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen by a daemon of another user."""
    key = new_key()
    with MountClient(mount) as client:
        put(client, key)
        real = control.Peer
        monkeypatch.setattr(control, "Peer", lambda pid, _, gid: real(pid, 4711, gid))
        with Peer(mount) as stranger:
            with pytest.raises(StoreReadOnly, match="4711"):
                stranger.ask("remove", ns=NS, key=key)
            with pytest.raises(StoreReadOnly):
                stranger.ask("retire", ns=NS)
        monkeypatch.undo()
        assert client.remove(NS, key)


def test_a_fault_of_ours_ends_one_connection(
    victim: MountClient, mount: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, dial(mount) as sock:
        patch.setattr(catalog, "stats", fail)
        sock.sendall(frame({"seq": 1, "verb": "stats"}))
        assert is_closed(sock)
    logs.claim("a connection of pid .* failed", 40)


def test_requests_are_counted(server: ControlServer, catalog: Catalog, mount: Path) -> None:
    with Peer(mount) as peer:
        peer.ask("ping")
        with pytest.raises(NamespaceNotFound):
            peer.ask("lookup", ns=new_key(), keys=b"")
        with pytest.raises(ProtocolError):
            peer.ask("release", leases=b"odd")
    counted = catalog.metrics.snapshot()["kvfs_control_requests_total"]
    assert {frozenset(labels.split(",")): n for labels, n in counted.items()} == {
        frozenset({"verb=ping", "result=ok"}): 1,
        frozenset({"verb=lookup", "result=NamespaceNotFound"}): 1,
        frozenset({"verb=release", "result=ProtocolError"}): 1,
    }
