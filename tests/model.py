"""What a model of a mounted store knows: namespaces as dictionaries, and the one store that all examples use."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvfs import _native, chunk
from kvfs.errors import DaemonUnavailable, DeadlineExceeded
from kvfs.identity import GroupKind, Manifest
from kvfs.upkeep.leases import SETTLE
from tests.mounted import processes, until
from tests.samples import payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvfs.client import MountClient
    from kvfs.identity import PartId

PATIENCE = 30.0
"""Seconds that a daemon may take to come back."""


@dataclass
class Chunk:
    """What the dictionary knows of a chunk: its parts, and which of these are damaged."""

    parent: bytes
    position: int
    parts: set[PartId]
    bad: set[PartId] = field(default_factory=set)
    pinned: bool = False


@dataclass
class Bed:
    """One mounted store for all examples."""

    store: Path
    mount: Path
    client: MountClient
    settled: float = 0.0
    """When readers of before the last restart have had their time, in monotonic seconds."""
    done: int = 0
    examples: Iterator[int] = field(default_factory=itertools.count)
    accidents: int = 0
    left: list[Space] = field(default_factory=list)
    """Namespaces that could not be retired, as nothing is for a while after a restart."""

    def ask(self, work: Callable[[], Any]) -> Any:
        """The answer of a daemon that may just be coming back."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return work()
            except (DaemonUnavailable, DeadlineExceeded):
                assert time.monotonic() < deadline, "no daemon"
                time.sleep(0.01)

    @property
    def is_settled(self) -> bool:
        return time.monotonic() > self.settled

    def replace_worker(self, kill: bool) -> None:
        """Kill the worker, or have it replaced; back when the next one knows what is there."""
        before = processes(self.store)["worker"]
        if kill:
            os.kill(before, signal.SIGKILL)
            until(lambda: processes(self.store).get("worker", before) != before)
        else:
            self.ask(lambda: self.client.reload(PATIENCE))
        self.ask(self.client.reconcile)
        self.settled = time.monotonic() + SETTLE
        self.accidents += 1

    def retire(self, *spaces: Space) -> None:
        """Remove namespaces, now or when that may be."""
        self.left += spaces
        while self.left and self.is_settled:
            ns = self.left.pop().ns
            self.ask(lambda ns=ns: self.client.retire(ns))


class Space:
    """A namespace and its dictionary."""

    def __init__(self, bed: Bed, name: str, example: int) -> None:
        self.bed, self.name = bed, name
        self.manifest = Manifest(
            weights=f"{example:064x}",
            config={"model_type": name},
            model_dtype="bfloat16",
            kv_dtype="BF16",
            kinds=(GroupKind("swa512", (0,), 1, 8, 8), GroupKind("full", (1,), 1, 8, 8)),
        )
        self.ns, self.parts = self.manifest.ns, self.manifest.parts
        self.chunks: dict[bytes, Chunk] = {}
        self.opened: set[tuple[bytes, PartId]] = set()
        """What has been read by its name in the mount."""
        self._made = 0

    def register(self) -> None:
        self.bed.ask(lambda: self.bed.client.register(self.manifest, {"name": self.name}))

    def new_key(self) -> bytes:
        self._made += 1
        return hashlib.sha256(self.ns + self._made.to_bytes(4, "little")).digest()

    def pick(self, n: int) -> bytes | None:
        return list(self.chunks)[n % len(self.chunks)] if self.chunks else None

    def drop(self, key: bytes, part: PartId | None = None) -> None:
        self.chunks[key].parts -= set(self.parts) if part is None else {part}
        if not self.chunks[key].parts:
            del self.chunks[key]

    def mask(self, key: bytes) -> int:
        there = self.chunks[key].parts if key in self.chunks else set()
        return sum(self.manifest.bit(part) for part in there)

    def text(self, key: bytes) -> Iterator[bytes]:
        """A chunk and what comes before it, as far as it is there."""
        at: bytes | None = key
        while at in self.chunks:
            yield at
            at = self.chunks[at].parent

    def raw(self, key: bytes, part: PartId, parent: bytes, position: int) -> bytes:
        """The file of a part."""
        data = payload(key, part, self.manifest)
        lay = chunk.layout(self.manifest, part, 256)
        meta = chunk.PartMeta(self.ns, key, parent, 256, position, part)
        return chunk.encode_header(self.manifest, meta, _native.sums(data, lay.bounds)) + data
