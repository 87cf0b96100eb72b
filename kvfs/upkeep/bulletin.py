"""What each of several users of a store tells the others, in a file of its own: ``.kvfs/bulletin.<name>``.

Three things: which chunks it holds and has pinned, which have come or gone by its hand, and which it used.  So nobody
lists the store to find what another has published, and the janitor knows what is held and used elsewhere.  The
file is replaced whole.  One that does not change is that of a dead user, whose leases have ended; pins stay.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import msgpack

from kvfs import _native, files
from kvfs.upkeep.office import Pace, boottime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

__all__ = ["Board", "Bulletin", "News"]

log = logging.getLogger(__name__)

_MAGIC: Final = b"kvfs-bulletin/1\n"
_FILE: Final = re.compile(r"bulletin\.(.+)")
_REPLACING: Final = re.compile(r".+\.[0-9a-f]{16}\.tmp")
RING: Final = 2048
"""Events told, at most; who looks too seldom to see them all lists the store instead."""
OLD: Final = 60.0
"""Seconds for which an event is told, so that the file of an idle user is small."""
AGAIN: Final = 10.0
"""Seconds in which a chunk is told to be in use once."""
_EVENT: Final = struct.Struct("<c32s32s")
_CHANGED, _USED = b"c", b"u"

Chunk = tuple[bytes, bytes]
"""Namespace and key."""


class News(NamedTuple):
    """What others have told: chunks (namespace, key) that came or went, chunks that were used, and whether more has
    happened than they could tell."""

    changed: list[Chunk]
    used: list[Chunk]
    missed: bool


class Bulletin:
    """What this process tells, until it is written.  Thread-safe; nothing but `publish` and `withdraw` touches the
    disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ring: deque[tuple[float, bytes]] = deque(maxlen=RING)
        self._count = 0
        self._lately: dict[bytes, float] = {}
        self._id = os.urandom(8)
        self._beats = itertools.count(1)
        self._told = 0

    def changed(self, ns: bytes, key: bytes) -> None:
        """A chunk has come or gone, wholly or in part."""
        self._say(_EVENT.pack(_CHANGED, ns, key), time.monotonic())

    def used(self, ns: bytes, key: bytes) -> None:
        """A chunk has been used, and with it all before it in its text."""
        now, event = time.monotonic(), _EVENT.pack(_USED, ns, key)
        if now - self._lately.get(event, -AGAIN) >= AGAIN:
            if len(self._lately) >= RING:
                self._lately.clear()
            self._lately[event] = now
            self._say(event, now)

    def _say(self, event: bytes, now: float) -> None:
        with self._lock:
            self._ring.append((now, event))
            self._count += 1

    def publish(self, path: Path, held: Iterable[Chunk], pinned: Iterable[Chunk], due: bool) -> None:
        """Write the file if there is something new to tell, or if it is ``due`` as a sign of life.  OSError."""
        with self._lock:
            while self._ring and self._ring[0][0] < time.monotonic() - OLD:
                self._ring.popleft()
            ring, count = b"".join(event for _, event in self._ring), self._count
        claims = {"held": _tokens(held), "pinned": _tokens(pinned)}
        told = _native.xxh3_64(msgpack.packb([count, claims]))
        if due or told != self._told:
            body = {"id": self._id, "beat": next(self._beats), "count": count, "ring": ring, **claims}
            raw = msgpack.packb(body)
            files.replace(path, _MAGIC + struct.pack("<Q", _native.xxh3_64(raw)) + raw)
            self._told = told


def _tokens(chunks: Iterable[Chunk]) -> bytes:
    return b"".join(sorted({_token(ns, key) for ns, key in chunks}))


def _token(ns: bytes, key: bytes) -> bytes:
    """A chunk in 16 bytes; two that are taken for one are both kept."""
    return ns[:8] + key[:8]


def _split(raw: bytes, width: int) -> Iterator[bytes]:
    return (raw[i : i + width] for i in range(0, len(raw), width))


@dataclass
class _Other:
    """Another user, as its file was last read."""

    since: float
    id: bytes = b""
    beat: int = 0
    count: int = 0
    held: frozenset[bytes] = frozenset()
    pinned: frozenset[bytes] = field(default=frozenset())


class Board:
    """The bulletins of all others in one folder.  Only one thread may `read`; anyone may ask."""

    def __init__(self, folder: Path, own: str, pace: Pace, clock: Callable[[], float] = boottime) -> None:
        self._folder, self._own, self._pace, self._clock = folder, own, pace, clock
        self._others: dict[str, _Other] = {}

    def read(self) -> News:
        """What is new since the last time.  OSError if the folder cannot be listed; of a bulletin that cannot be read,
        what it said last counts on."""
        news = News([], [], False)
        others = dict(self._others)
        listed = (name for name in os.listdir(self._folder) if not _REPLACING.fullmatch(name))
        names = {m[1] for name in listed if (m := _FILE.fullmatch(name))}
        for gone in others.keys() - names:
            del others[gone]
        for name in names - {self._own}:
            other = others.setdefault(name, _Other(self._clock()))
            raw = files.read_sealed(self._folder / f"bulletin.{name}", _MAGIC)
            if raw is not None:
                missed = self._take(other, raw, news)
                news = news._replace(missed=news.missed or missed)
        self._others = others
        return news

    def _take(self, other: _Other, raw: bytes, news: News) -> bool:
        try:
            body = msgpack.unpackb(raw)
            ident, beat, count, ring = body["id"], int(body["beat"]), int(body["count"]), body["ring"]
            held, pinned = (frozenset(_split(body[which], 16)) for which in ("held", "pinned"))
            events = [_EVENT.unpack(each) for each in _split(ring, _EVENT.size)]
        except (ValueError, TypeError, KeyError, struct.error) as e:
            log.debug("a bulletin in %s cannot be understood: %s", self._folder, e)
            return False
        if (ident, beat) == (other.id, other.beat):
            return False
        is_known = ident == other.id
        fresh = min(count - other.count, len(events)) if is_known else len(events)
        for kind, ns, key in events[len(events) - fresh :]:
            (news.changed if kind == _CHANGED else news.used).append((ns, key))
        missed = is_known and count - other.count > len(events)
        other.since, other.id, other.beat, other.count = self._clock(), ident, beat, count
        other.held, other.pinned = held, pinned
        return missed

    def holder(self, ns: bytes, key: bytes | None) -> str | None:
        """Who else holds a chunk, or any of a namespace; None if nobody does.  Pins of the dead count."""
        for name, other in self._others.items():
            for claims in (other.held if self._is_alive(other) else frozenset(), other.pinned):
                if any(each[:8] == ns[:8] for each in claims) if key is None else _token(ns, key) in claims:
                    return name
        return None

    def _is_alive(self, other: _Other) -> bool:
        return self._clock() - other.since < self._pace.stale

    def living(self) -> list[str]:
        """Names of the others that are alive."""
        return sorted(name for name, other in self._others.items() if self._is_alive(other))

    def held(self) -> int:
        """Chunks that the living hold."""
        return sum(len(other.held) for other in self._others.values() if self._is_alive(other))

    def dead(self) -> list[str]:
        """Names of those that are not, and have pinned nothing: their bulletins may go."""
        return [n for n, other in self._others.items() if not self._is_alive(other) and not other.pinned]
