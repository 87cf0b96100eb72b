"""Who holds which chunks.  A lease belongs to a holder (one connection) and ends with it."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence

from kvfs.errors import ChunkNotFound, StoreBusy, StoreFull

__all__ = ["Leases"]

MAX_LEASES = 65536
"""Leases of one holder, and chunks that they claim; one that never releases must not fill the daemon's memory."""
MAX_CLAIMS = 1 << 20
"""Chunks claimed by all holders together."""
SETTLE = 5.0
"""Seconds after a restart in which clients may claim again what they held; nothing is evicted meanwhile."""

Chunk = tuple[bytes, bytes]
"""Namespace and key."""


class Leases:
    """Claims on chunks, counted per chunk.  Thread-safe.

    ``resumed``: holders of an earlier worker are about to claim again what they hold.  ``others(ns, key)`` names who
    else of those that use the store holds a chunk, or any of a namespace (None).
    """

    def __init__(self, resumed: bool = False) -> None:
        self._lock = threading.Lock()
        self._held: dict[Hashable, dict[int, frozenset[Chunk]]] = {}
        self._count: Counter[Chunk] = Counter()
        self._claims: Counter[Hashable] = Counter()  # chunks of each holder's leases
        self._going: set[bytes | Chunk] = set()  # namespaces and chunks being removed: not to be claimed
        self._settled = time.monotonic() + (SETTLE if resumed else 0.0)
        self.others: Callable[[bytes, bytes | None], str | None] = lambda _ns, _key: None

    def grant(self, holder: Hashable, lease: int, ns: bytes, keys: Sequence[bytes]) -> None:
        """Claim chunks for ``holder`` under its number ``lease``, in place of what that number claimed before.

        ChunkNotFound for a chunk that is being removed; StoreFull for a holder with too many leases.
        """
        chunks = frozenset((ns, key) for key in keys)
        with self._lock:
            if self._going and (ns in self._going or not self._going.isdisjoint(chunks)):
                raise ChunkNotFound(f"{ns.hex()[:12]}, being removed")
            own = self._held.get(holder, {})
            before = own.get(lease, frozenset())
            more = len(chunks) - len(before)
            if (len(own) >= MAX_LEASES and lease not in own) or self._claims[holder] + more > MAX_LEASES:
                raise StoreFull(f"more than {MAX_LEASES} leases of one client")
            if self._claims.total() + more > MAX_CLAIMS:
                raise StoreFull(f"more than {MAX_CLAIMS} leased chunks")
            self._held[holder] = own
            self._drop(holder, before)
            own[lease] = chunks
            self._count.update(chunks)
            self._claims[holder] += len(chunks)

    def release(self, holder: Hashable, lease: int) -> None:
        """End a lease; one that is unknown has ended already."""
        with self._lock:
            own = self._held.get(holder, {})
            self._drop(holder, own.pop(lease, frozenset()))
            if not own:
                self._held.pop(holder, None)
                self._claims.pop(holder, None)

    def drop(self, holder: Hashable) -> None:
        """End all leases of a holder."""
        with self._lock:
            for chunks in self._held.pop(holder, {}).values():
                self._drop(holder, chunks)
            self._claims.pop(holder, None)

    def _drop(self, holder: Hashable, chunks: frozenset[Chunk]) -> None:
        self._claims[holder] -= len(chunks)
        for chunk in chunks:
            self._count[chunk] -= 1
            if not self._count[chunk]:
                del self._count[chunk]

    def _claims_on(self, ns: bytes, key: bytes | None) -> int:
        return self._count[ns, key] if key is not None else sum(n for (of, _), n in self._count.items() if of == ns)

    def held(self, ns: bytes, key: bytes | None) -> int:
        """How many leases claim a chunk, or (None) chunks of a namespace."""
        with self._lock:
            return self._claims_on(ns, key)

    def chunks(self) -> list[Chunk]:
        """All chunks that are claimed."""
        with self._lock:
            return list(self._count)

    def holds(self, holder: Hashable, ns: bytes, key: bytes) -> bool:
        """Whether one of the holder's leases claims the chunk."""
        with self._lock:
            return any((ns, key) in chunks for chunks in self._held.get(holder, {}).values())

    @contextlib.contextmanager
    def removing(self, ns: bytes, key: bytes | None = None) -> Iterator[None]:
        """While a chunk, or all of a namespace, is removed: nobody can claim it.

        StoreBusy if somebody has, or may be about to claim it again after a restart.
        """
        target: bytes | Chunk = ns if key is None else (ns, key)
        what = f"namespace {ns.hex()[:12]}" if key is None else f"chunk {key.hex()[:12]}"
        if (other := self.others(ns, key)) is not None:
            raise StoreBusy(what, other)
        with self._lock:
            if claims := self._claims_on(ns, key):
                raise StoreBusy(what, f"{claims} leases")
            if not self.settled:
                raise StoreBusy(what, "readers of before the restart, perhaps")
            self._going.add(target)
        try:
            yield
        finally:
            with self._lock:
                self._going.discard(target)

    @property
    def settled(self) -> bool:
        """Whether what is not held is free: holders of before a restart have had their time."""
        return time.monotonic() >= self._settled

    def __len__(self) -> int:
        """How many chunks are claimed."""
        with self._lock:
            return len(self._count)

    def check_integrity(self) -> None:
        """AssertionError if the counts are not those of the leases; for tests."""
        with self._lock:
            counted = Counter(chunk for own in self._held.values() for chunks in own.values() for chunk in chunks)
            assert counted == self._count
            assert all(self._held.values())
            claims = {holder: sum(map(len, own.values())) for holder, own in self._held.items()}
            assert claims == {holder: n for holder, n in self._claims.items() if holder in claims or n}
