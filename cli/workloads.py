"""Workloads for `kvfs sim`: three that are generated, and the trace that a daemon has recorded."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvfs.errors import ConfigError
from kvfs.identity import CHUNK_TOKENS, TAIL_STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

TOKEN_BYTES = 131072
"""KV of a token of an 8 B model with 8 KV heads, 32 layers, 16 bits."""
PAUSE = 2.0
"""Mean seconds between requests; answers take `ANSWER`."""
ANSWER = 5.0


class Look(NamedTuple):
    """A request asks for the chunks of a text in their order, or for tails that may continue it, longest first."""

    time: float
    keys: tuple[bytes, ...]


class Stored(NamedTuple):
    """A part of a chunk has been stored: ``position`` counts the tokens before it, ``parent`` is None at 0."""

    time: float
    key: bytes
    parent: bytes | None
    position: int
    tokens: int
    size: int
    part: str = ""


Event = Look | Stored


@dataclass
class Text:
    """A text that grows: ``shared`` tokens of a beginning that others have too, named ``beginning``, then its own."""

    name: int
    beginning: str
    shared: int
    length: int
    tail: int = 0

    def key(self, end: int) -> bytes:
        """The key of the chunk or tail that ends at a token."""
        own = f"{self.name}" if end > self.shared else ""
        return hashlib.sha256(f"{self.beginning}/{own}/{end}".encode()).digest()

    def look(self, time: float) -> Iterator[Event]:
        """A request with the text as it is now."""
        ends = range(CHUNK_TOKENS, self.length + 1, CHUNK_TOKENS)
        yield Look(time, tuple(self.key(end) for end in ends))
        if self.tail // CHUNK_TOKENS == len(ends) and self.tail % CHUNK_TOKENS:
            yield Look(time, (self.key(self.tail),))
        yield from self.store(time)

    def store(self, time: float) -> Iterator[Event]:
        """All of it is stored."""
        whole = self.length // CHUNK_TOKENS * CHUNK_TOKENS
        self.tail = self.length // TAIL_STEP * TAIL_STEP
        for end in dict.fromkeys([*range(CHUNK_TOKENS, whole + 1, CHUNK_TOKENS), self.tail]):
            start = (end - 1) // CHUNK_TOKENS * CHUNK_TOKENS
            if end > start:
                parent = self.key(start) if start else None
                yield Stored(time, self.key(end), parent, start, end - start, (end - start) * TOKEN_BYTES)


def chat(r: random.Random, requests: int) -> Iterator[Event]:
    """Conversations of several rounds: 20 system prompts, six rounds in the mean, the latest most likely to go on."""
    prompts = [r.randint(300, 2500) for _ in range(20)]
    live: list[tuple[Text, int]] = []
    time = 0.0
    for number in range(requests):
        time += r.expovariate(1 / PAUSE)
        if live and r.random() < 0.82:
            text, left = live.pop(-1 - min(int(r.expovariate(1 / (len(live) * 0.15 + 1))), len(live) - 1))
        else:
            which = min(int(r.paretovariate(0.9)), len(prompts)) - 1
            text, left = Text(number, f"chat{which}", prompts[which], prompts[which]), int(r.expovariate(1 / 6)) + 1
        text.length += int(r.lognormvariate(5.0, 1.0))
        yield from text.look(time)
        text.length += int(r.lognormvariate(5.6, 0.8))
        yield from text.store(time + ANSWER)
        if left > 1:
            live = [*live, (text, left - 1)][-400:]


def rag(r: random.Random, requests: int) -> Iterator[Event]:
    """Questions about 600 shared documents, some asked for far more than others; which ones drifts."""
    documents = [min(60000, int(r.lognormvariate(8.5, 0.8))) + 600 for _ in range(600)]
    rank = list(range(len(documents)))
    for number, (time, place) in enumerate(arrivals(r, requests, len(documents), 0.8)):
        if number % 50 == 0:
            i, j = r.randrange(len(rank)), r.randrange(len(rank))
            rank[i], rank[j] = rank[j], rank[i]
        document = rank[place]
        text = Text(number, f"rag{document}", documents[document], documents[document] + r.randint(20, 400))
        yield from text.look(time)
        text.length += r.randint(50, 500)
        yield from text.store(time + ANSWER)


def system(r: random.Random, requests: int) -> Iterator[Event]:
    """Single requests that share one of 200 system prompts and nothing else."""
    prompts = [min(30000, int(r.lognormvariate(7.8, 0.9))) for _ in range(200)]
    for number, (time, which) in enumerate(arrivals(r, requests, len(prompts), 1.1)):
        length = prompts[which] + int(r.lognormvariate(6.5, 1.0))
        text = Text(number, f"system{which}", prompts[which], length)
        yield from text.look(time)
        text.length += int(r.lognormvariate(5.6, 0.8))
        yield from text.store(time + ANSWER)


def arrivals(r: random.Random, requests: int, choices: int, skew: float) -> Iterator[tuple[float, int]]:
    """When requests come, and which of the choices each takes: the n-th as often as n to the minus ``skew``."""
    weights = list(itertools.accumulate((n + 1) ** -skew for n in range(choices)))
    time = 0.0
    for _ in range(requests):
        time += r.expovariate(1 / PAUSE)
        yield time, r.choices(range(choices), cum_weights=weights)[0]


GENERATED: Mapping[str, Callable[[random.Random, int], Iterator[Event]]] = {"chat": chat, "rag": rag, "system": system}


def generate(name: str, requests: int, seed: int) -> list[Event]:
    """The events of a generated workload, in the order of their times; the same for the same seed."""
    return in_order([*GENERATED[name](random.Random(seed), requests)])  # noqa: S311 - no secret


def in_order(events: Sequence[Event]) -> list[Event]:
    """Sort by time; what happens at the same time keeps its order."""
    return sorted(events, key=lambda event: event.time)


def read_trace(path: Path) -> list[Event]:
    """Read what a daemon with the setting ``trace`` has recorded. ConfigError for anything else; the last line may be
    cut short."""
    from kvfs.daemon.trace import FORMAT, ID_BYTES

    events: list[Event] = []
    try:
        lines = path.read_text("ascii").splitlines()
        if not lines or json.loads(lines[0]) != FORMAT:
            raise ValueError
        for number, line in enumerate(lines[1:], start=2):
            try:
                each = json.loads(line)
            except ValueError:
                if number == len(lines):
                    break
                raise
            ns = bytes.fromhex(each["ns"])
            if "look" in each:
                ids = base64.b64decode(each["look"])
                keys = tuple(ns + ids[i : i + ID_BYTES] for i in range(0, len(ids), ID_BYTES))
                events.append(Look(each["t"], keys))
            else:
                key, parent = (ns + base64.b64decode(each[name]) for name in ("store", "parent"))
                position = each["position"]
                tokens, size, part = each["tokens"], each["bytes"], each["part"]
                events.append(Stored(each["t"], key, parent if position else None, position, tokens, size, part))
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is not a trace that a daemon has recorded ({type(e).__name__})") from None
    return in_order(events)
