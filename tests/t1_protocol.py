"""Frames and descriptors on real sockets: what passes, and what must not."""

import array
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import ChunkNotFound, DeadlineExceeded, IdentityError, ProtocolError
from kvfs.protocol import (
    MAX_FDS,
    MAX_FRAME,
    VERBS,
    Channel,
    Deadline,
    check_reply,
    check_request,
    decode,
    error_reply,
    join_keys,
    split_keys,
)
from tests.attacks import frames

KEY = b"k" * 32


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    a, b = (Channel(s) for s in socket.socketpair())
    yield a, b
    a.close()
    b.close()


def soon() -> Deadline:
    return Deadline("a test", 2.0)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def raw(message: object) -> bytes:
    body = message if isinstance(message, bytes) else msgpack.packb(message)
    return struct.pack("<I", len(body)) + body


def test_messages_and_descriptors_arrive_in_order(ends: tuple[Channel, Channel], tmp_path: Path) -> None:
    a, b = ends
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(MAX_FDS)]
    before = open_fds()
    a.send({"seq": 1}, soon(), fds)
    a.send({"seq": 2}, soon())
    message, received = b.receive(soon(), MAX_FDS)
    assert message == {"seq": 1}
    assert len(received) == MAX_FDS
    assert all(os.path.samestat(os.fstat(x), os.fstat(y)) for x, y in zip(fds, received, strict=True))
    assert not any(os.get_inheritable(fd) for fd in received)
    assert b.receive(soon(), MAX_FDS) == ({"seq": 2}, [])
    for fd in received:
        os.close(fd)
    assert open_fds() == before
    for fd in fds:
        os.close(fd)


def test_a_frame_in_single_bytes_is_put_together(ends: tuple[Channel, Channel]) -> None:
    a, b = ends

    def trickle() -> None:
        a.sock.setblocking(True)
        for byte in raw({"seq": 7, "keys": KEY * 100}):
            a.sock.send(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    assert b.receive(soon())[0] == {"seq": 7, "keys": KEY * 100}
    thread.join()


def test_the_largest_frame_passes_and_one_byte_more_does_not(ends: tuple[Channel, Channel]) -> None:
    a, b = ends
    largest = {"x": bytes(MAX_FRAME - len(msgpack.packb({"x": bytes(MAX_FRAME // 2)})) + MAX_FRAME // 2)}
    assert len(msgpack.packb(largest)) == MAX_FRAME
    sender = threading.Thread(target=a.send, args=(largest, soon()))
    sender.start()
    assert b.receive(soon())[0] == largest
    sender.join()
    with pytest.raises(ProtocolError, match="too long"):
        a.send({"x": largest["x"] + b"1"}, soon())


def test_stray_descriptors_are_closed(ends: tuple[Channel, Channel], tmp_path: Path) -> None:
    a, b = ends
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(5)]
    before = open_fds()
    a.send({"seq": 1}, soon(), fds)
    with pytest.raises(ProtocolError, match="5 descriptors where 0"):
        b.receive(soon())
    assert open_fds() == before
    for fd in fds:
        os.close(fd)


def test_descriptors_received_with_half_a_frame_are_closed(ends: tuple[Channel, Channel]) -> None:
    a, b = ends
    before = open_fds()
    a.sock.sendmsg([b"\xff\0\0\0abc"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))])
    a.shutdown()
    with pytest.raises(ConnectionError):
        b.receive(soon(), 2)
    assert open_fds() == before


def test_truncated_control_data_is_an_error(ends: tuple[Channel, Channel], tmp_path: Path) -> None:
    """More descriptors than one message may bring, in two that are read as one."""
    a, b = ends
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(MAX_FDS)]
    before = open_fds()
    frame = raw({"seq": 1})
    for piece in (frame[:5], frame[5:]):
        a.sock.sendmsg([piece], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    with pytest.raises(ProtocolError, match="more descriptors than fit"):
        b.receive(soon(), MAX_FDS)
    assert open_fds() == before
    for fd in fds:
        os.close(fd)


def test_no_descriptor_left_in_the_receiver_is_an_error(ends: tuple[Channel, Channel]) -> None:
    import resource

    a, b = ends
    a.send({"seq": 1}, soon(), [0, 1, 2])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(n) for n in os.listdir("/proc/self/fd"))
    spare = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
    try:
        while True:
            try:
                spare.append(os.dup(0))
            except OSError:
                break
        with pytest.raises(ProtocolError, match="more descriptors than fit"):
            b.receive(soon(), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in spare:
            os.close(fd)


def test_a_silent_peer_costs_the_deadline(ends: tuple[Channel, Channel]) -> None:
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"a test took longer than its deadline of 0\.05 s"):
        ends[0].receive(Deadline("a test", 0.05))
    assert 0.04 < time.monotonic() - begun < 0.5


def test_a_peer_that_does_not_read_costs_the_deadline(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(DeadlineExceeded):
        ends[0].send({"x": bytes(MAX_FRAME - 64)}, Deadline("a test", 0.1))


def test_the_end_of_the_stream_is_a_connection_error(ends: tuple[Channel, Channel]) -> None:
    a, b = ends
    a.close()
    with pytest.raises(ConnectionError):
        b.receive(soon())
    with pytest.raises(ConnectionError):
        b.send({}, soon())


@pytest.mark.parametrize("name", frames.ATTACKS)
def test_malformed_frames_are_refused(ends: tuple[Channel, Channel], name: str) -> None:
    a, b = ends
    a.sock.sendall(frames.ATTACKS[name])
    with pytest.raises(ProtocolError):
        b.receive(soon())


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_a_map_or_a_protocol_error(body: bytes) -> None:
    try:
        message = decode(body)
    except ProtocolError:
        return
    assert type(message) is dict
    try:
        check_request(message)
    except ProtocolError:
        return
    assert message["verb"] in VERBS


def test_a_request_is_checked_field_by_field() -> None:
    good = {"seq": 3, "verb": "lookup", "ns": KEY, "keys": KEY * 2}
    assert check_request(good) == (3, "lookup", {"ns": KEY, "keys": KEY * 2})
    for change in (
        {"verb": "destroy"},
        {"verb": None},
        {"verb": ["lookup"]},
        {"seq": -1},
        {"seq": True},
        {"seq": 1 << 63},
        {"seq": None},
        {"ns": "k" * 32},
        {"ns": KEY[1:]},
        {"keys": KEY[1:]},
        {"keys": [KEY]},
        {"extra": 1},
    ):
        with pytest.raises(ProtocolError):
            check_request(good | change)
    for field in good:
        with pytest.raises(ProtocolError):
            check_request({k: v for k, v in good.items() if k != field})


def test_optional_fields_may_be_absent_but_not_wrong() -> None:
    report = {"seq": 0, "verb": "report", "ns": KEY, "key": KEY, "part": "full.h0"}
    assert check_request(report)[2].get("reason") is None
    with pytest.raises(ProtocolError, match="reason"):
        check_request(report | {"reason": None})


def test_an_answer_must_answer() -> None:
    assert check_reply({"seq": 4, "masks": b""}, 4, "lookup") == {"masks": b""}
    for bad in (
        {"seq": 5, "masks": b""},
        {"masks": b""},
        {"seq": 4},
        {"seq": 4, "masks": b"", "more": 1},
        {"seq": 4, "masks": 1},
    ):
        with pytest.raises(ProtocolError):
            check_reply(bad, 4, "lookup")


def test_errors_arrive_as_they_were() -> None:
    for error in (ChunkNotFound("ab12.full.h0"), DeadlineExceeded("x", "0.05"), IdentityError("no {such} part")):
        reported = check_reply(error_reply(9, error), 9, "lease")
        assert type(reported) is type(error)
        assert str(reported) == str(error)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("SystemExit", []),
        ("KvfsError.errno", []),
        ("os", []),
        ("DeadlineExceeded", ["one"]),
        ("ChunkNotFound", "ab"),
        ("ChunkNotFound", [1]),
        (None, []),
    ],
)
def test_errors_that_are_none_are_refused(name: object, args: object) -> None:
    with pytest.raises(ProtocolError):
        check_reply({"seq": 1, "error": name, "args": args}, 1, "ping")


def test_keys_travel_as_one_blob() -> None:
    keys = [bytes([i]) * 32 for i in range(5)]
    assert split_keys(join_keys(keys)) == keys
    with pytest.raises(ProtocolError):
        join_keys([b"short"])
