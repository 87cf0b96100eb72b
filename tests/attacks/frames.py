"""Frames of the control socket: a length and what follows it."""

from __future__ import annotations

import struct
from typing import Final

import msgpack

from kvfs.protocol import MAX_FRAME


def frame(message: object) -> bytes:
    """A frame around a message, or around bytes that are none."""
    body = message if isinstance(message, bytes) else msgpack.packb(message)
    return struct.pack("<I", len(body)) + body


ATTACKS: Final[dict[str, bytes]] = {
    "too long": struct.pack("<I", MAX_FRAME + 1),
    "too long by far": struct.pack("<I", 0xFFFFFFFF) + b"\x81",
    "empty": frame(b""),
    "a code that is none": frame(b"\xc1"),
    "a list": frame([1, 2]),
    "a number": frame(7),
    "numbers for names": frame({1: 2}),
    "a long list inside": frame({"a": {"b": [[]] * 65}}),
    "more after the end": frame(msgpack.packb({"a": 1}) + b"\0"),
    "a field twice": frame(b"\x82\xa1a\x01\xa1a\x02"),
    "nested too deep": frame(b"\x91" * 5000),
    "maps nested too deep": frame(b"\x81\xa1a" * 5000),
    "a list of 4 billion": frame(b"\x81\xa1a\xdd\xff\xff\xff\xff"),
    "a map of 4 billion": frame(b"\xdf\xff\xff\xff\xff"),
    "2 GiB of bytes": frame(b"\x81\xa1a\xc6\x7f\xff\xff\xff"),
    "2 GiB of text": frame(b"\x81\xa1a\xdb\x7f\xff\xff\xff"),
    "text that is not UTF-8": frame(b"\x81\xa1a\xa2\xff\xff"),
    "an extension type": frame(b"\x81\xa1a\xc7\x04\x01abcd"),
    "a timestamp": frame(b"\x81\xa1a\xd6\xff\0\0\0\0"),
    "many fields": frame({f"field{n}": n for n in range(33)}),
    "a half": frame({"seq": 1, "verb": "ping"})[:-3] + b"\xc1\xc1\xc1",
}
