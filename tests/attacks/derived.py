"""Files that daemons derive and read again: whole by their checksum, which anybody can compute, and made to hurt."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import msgpack
import numpy as np

from kvfs import _native
from kvfs.index import _MAGIC
from kvfs.rows import Rows
from tests.small import NS

if TYPE_CHECKING:
    from collections.abc import Callable


def snapshot(body: object) -> bytes:
    """A snapshot of the index with the checksum it needs."""
    raw = body if isinstance(body, bytes) else msgpack.packb(body)
    return _MAGIC + struct.pack("<Q", _native.xxh3_64(raw)) + raw


def _rows(count: int = 4, **columns: Any) -> dict[str, bytes]:
    """The columns of a text of so many chunks, some of them replaced."""
    rows = Rows()
    good: dict[str, Any] = {name: [0] * count for name in Rows.KEPT} | {
        "mask": [1] * count,
        "raw": [1] * count,
        "size": [12288] * count,
        "stamp": [1] * count,
        "tokens": [256] * count,
        "depth": list(range(count)),
        "parent": list(range(count)),
    }
    good |= columns
    packed = {name: np.array(good[name], dtype=getattr(rows, name).typecode).tobytes() for name in Rows.KEPT}
    return packed | {"keys": b"".join(bytes([n]) * 32 for n in range(1, count + 1))}


def _with(**columns: Any) -> bytes:
    return snapshot({NS: _rows(**columns)})


def _changed(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> bytes:
    return snapshot({NS: change(_rows())})


SOUND: Final = _with()
"""What all of these are made from; it is read."""

SNAPSHOTS: Final[dict[str, bytes]] = {
    "nothing": snapshot(b""),
    "a number": snapshot(7),
    "a list": snapshot([NS]),
    "nested too deep": snapshot(b"\x91" * 100_000),
    "a list of 4 billion": snapshot(b"\xdd\xff\xff\xff\xff"),
    "a map of 4 billion": snapshot(b"\xdf\xff\xff\xff\xff"),
    "an extension type": snapshot(b"\xc7\x04\x01abcd"),
    "a table that is a number": snapshot({NS: 7}),
    "no columns": snapshot({NS: {}}),
    "columns that are text": _changed(lambda rows: rows | {"mask": "0" * 32}),  # type: ignore[dict-item]
    "a column too short": _changed(lambda rows: rows | {"size": rows["size"][:-8]}),
    "a column too long": _changed(lambda rows: rows | {"hits": rows["hits"] * 2}),
    "a broken number": _changed(lambda rows: rows | {"size": rows["size"][:-3]}),
    "half a key": _changed(lambda rows: rows | {"keys": rows["keys"][:-16]}),
    "a key twice": _changed(lambda rows: rows | {"keys": rows["keys"][:32] * 4}),
    "a parent far away": _with(parent=[0, 1, 2, 0xFFFFFFFF]),
    "a parent just outside": _with(parent=[0, 1, 2, 5]),
    "its own parent": _with(parent=[1, 2, 3, 4]),
    "a circle": _with(parent=[4, 1, 2, 3]),
    "a circle of equals": _with(parent=[2, 1, 0, 0], depth=[0, 0, 0, 0]),
    "a parent that lies deeper": _with(depth=[3, 2, 1, 0]),
    "parts that there are not": _with(mask=[1, 1, 1, 1 << 63], raw=[1, 1, 1, 1 << 63]),
    "parts in no form": _with(raw=[1, 1, 0, 0]),
    "bytes of nothing": _with(mask=[1, 1, 0, 1], raw=[1, 1, 0, 1]),
    "more packed than there is": _with(packed=[12288, 12289, 0, 0]),
    "negative sizes": _with(size=[-1, 12288, 12288, -(1 << 62)]),
    "sizes that no number holds": _with(size=[(1 << 63) - 1] * 4),
}
"""Snapshots of the index."""

ROWS: Final = frozenset({"a key twice"} | {name for name in SNAPSHOTS if "parent" in name or "circle" in name})
"""Those that only say of rows what cannot be."""

CHECKED: Final[dict[str, bytes]] = {
    "nothing": b"",
    "half a number": b"12345",
    "a boot that is not this one": b"0" * 36 + bytes(8 * 64),
    "a boot id without end": b"0" * 100_000,
}
"""What the state of verification may hold behind its checksum."""

NOTES: Final[dict[str, bytes]] = {
    "no JSON": b"{",
    "a list": b"[]",
    "a number of 400,000 digits": b'{"time":' + b"9" * 400_000 + b"}",
    "nested too deep": b"[" * 500_000,
    "a time that is text": b'{"path":"x","reason":"y","time":"never"}',
    "a time without end": b'{"path":"x","reason":"y","time":1e999}',
    "a reason that is a list": b'{"path":["x"],"reason":["y"],"time":1.0}',
    "a path that leads away": b'{"path":"../../etc/passwd","reason":"checksum","time":1.0}',
    "bytes without end": b'{"1":1e999}',
    "surrogates": b'{"path":"\\ud800","reason":"\\udfff","time":1.0}',
    "control characters": b'{"path":"\\u001b[2J","reason":"\\u0000","time":1.0}',
}
"""Notes beside what is in lost+found, and other small documents."""
