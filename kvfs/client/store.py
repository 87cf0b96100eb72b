"""The store as a folder, with no daemon: presence by ``stat``, reading by ``open``, publishing by ``link``."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import kvfs
from kvfs.client.claims import Lease, LeasedPart, Reservation
from kvfs.client.fork import restart_in_child
from kvfs.client.lane import Lane
from kvfs.errors import ChunkCorrupt, ChunkNotFound, KvfsError
from kvfs.explain import Known, explain
from kvfs.hydrate import Area
from kvfs.identity import Manifest, PartId
from kvfs.names import leaf_name, part_path
from kvfs.network import is_network
from kvfs.protocol import Deadline
from kvfs.reader import Reader
from kvfs.store import Store, Temp
from kvfs.verify import Verifier

__all__ = ["StoreClient"]

RELEASE = 0.05
MAX_DECODED = 1 << 30
"""Bytes of parts decoded for readers of this client."""
RELISTS = 8
"""Leaf folders listed again, at most, for one lookup on a network filesystem."""
RELIST_AGAIN = 1.0
"""Seconds for which a listing of a leaf folder is news enough."""


class StoreClient:
    """A store without a daemon.  Thread-safe; may be used across a fork.

    Whatever touches the disk runs in a thread of the client's own, readers' and writers' calls apart, so that a
    hanging filesystem costs its callers no more than their deadline.  What has been verified is known to this
    process only.  Nobody evicts, so a lease is just open files.
    """

    def __init__(self, path: str | os.PathLike[str], durability: str = "relaxed") -> None:
        self.path = Path(path)
        self._durability = durability
        self._reads, self._writes = Lane(path), Lane(path)
        self._reader: Reader | None = None
        self._listed: dict[tuple[bytes, str], float] = {}
        self._counts = {"hits": 0, "misses": 0, "publishes": 0, "drops": 0}
        self._quarantined: dict[str, int] = {}
        self._started = time.monotonic()
        self.network: bool | None = None
        """Whether other hosts may change the store; None until it has been opened."""
        self.restart()
        restart_in_child(self)

    def restart(self) -> None:
        """Be as new, in a forked child: what has been verified is known to one process only."""
        self._opening = threading.Lock()
        if self._reader is not None:
            self._forget(self._reader)
            self._reader = None

    def close(self) -> None:
        """End the threads and close the store; leases stay readable."""
        idle = [lane.close() for lane in (self._reads, self._writes)]
        if all(idle) and self._reader is not None:
            self._forget(self._reader)
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _forget(reader: Reader) -> None:
        reader.area.close()
        reader.verifier.store.close()

    def _open(self) -> Reader:
        """The store, opened by whichever lane needs it first."""
        with self._opening:
            if self._reader is None:
                verifier = Verifier(Store.open(self.path, self._durability))
                self._reader = Reader(verifier, Area(MAX_DECODED), self._lost)
                if self.network is None:
                    self.network = is_network(self.path)
            return self._reader

    # --- reading ---

    def lookup(self, ns: bytes, keys: Sequence[bytes], timeout: float = 0.05) -> list[int]:
        """The presence mask of each key: bit i is part i of the namespace's manifest, 0 is absent.

        NamespaceNotFound, NotAStore, DeadlineExceeded, DaemonUnavailable.
        """
        budget = Deadline("listing", timeout / 2)
        masks = self._reads.call("lookup", timeout, lambda: self._masks(ns, keys, budget))
        misses = masks.count(0)
        self._counts["hits"] += len(masks) - misses
        self._counts["misses"] += misses
        return masks

    def _masks(self, ns: bytes, keys: Sequence[bytes], budget: Deadline) -> list[int]:
        store = self._open().verifier.store
        masks = store.masks(ns, keys)
        if self.network:
            whole = store.manifest(ns).all_parts
            gaps = [i for i, mask in enumerate(masks) if mask != whole][:RELISTS]
            for i in gaps:
                if budget.is_over():
                    break
                if self._list_again(store, ns, leaf_name(keys[i])):
                    [masks[i]] = store.masks(ns, (keys[i],))
        return masks

    def _list_again(self, store: Store, ns: bytes, leaf: str) -> bool:
        """List a leaf folder, unless that was done just now.

        An NFS client that once saw a name absent goes on saying so for 30 s, until the folder is listed.
        """
        now = time.monotonic()
        if now - self._listed.get((ns, leaf), -RELIST_AGAIN) < RELIST_AGAIN:
            return False
        for _ in store.scan_leaf(ns, leaf):
            pass
        self._listed[ns, leaf] = now
        return True

    def lease(
        self, ns: bytes, refs: Sequence[tuple[bytes, PartId]], timeout: float = 0.5, coded: bool = False
    ) -> Lease:
        """Open parts for reading; all of them or none.  ``coded``: take a part as it is stored; otherwise one without
        its raw form is decoded first.

        ChunkNotFound names the first missing part; ChunkCorrupt, NamespaceNotFound, NotAStore, DeadlineExceeded,
        DaemonUnavailable, StoreBusy if decoded parts in use take all the memory that they may.
        """
        return self._reads.call("lease", timeout, lambda: self._lease(ns, refs, coded), Lease.release)

    def _lease(self, ns: bytes, refs: Sequence[tuple[bytes, PartId]], coded: bool) -> Lease:
        reader = self._open()
        parts: list[LeasedPart] = []
        try:
            for key, part in refs:
                opened = reader.open(ns, key, part, coded)
                parts.append(LeasedPart(key, part, opened.fd, opened.verified, opened.form))
        except BaseException:
            Lease(tuple(parts), _nothing).release()
            raise
        return Lease(tuple(parts), _nothing)

    def report(self, ns: bytes, key: bytes, part: PartId, reason: str | None = None, timeout: float = 1.0) -> bool:
        """Tell what reading a leased part showed: None, its checksums are right; else why it is damaged, and it is
        checked again and taken away.  True if nothing damaged is left in its place."""
        return self._reads.call("report", timeout, lambda: self._report(ns, key, part, reason))

    def _report(self, ns: bytes, key: bytes, part: PartId, reason: str | None) -> bool:
        verifier = self._open().verifier
        store = verifier.store
        if reason is None:
            with contextlib.suppress(ChunkNotFound):
                verifier.vouch(ns, key, part)
        else:
            damage = {coded: error for coded, error in verifier.recheck(ns, key, part).items() if error is not None}
            for coded, error in damage.items():
                self._lost(ns, key, part, error, coded)
            if damage:
                return not any(os.path.lexists(store.path / ns.hex() / part_path(key, part, coded)) for coded in damage)
        return not store.masks(ns, [key])[0] & store.manifest(ns).bit(part)

    def touch(self, ns: bytes, keys: Sequence[bytes], timeout: float = 0.05) -> None:
        """Do nothing: recency is the daemon's to keep."""

    # --- writing ---

    def register(self, manifest: Manifest, info: Mapping[str, Any] | None = None, timeout: float = 5.0) -> bytes:
        """Make the namespace of a manifest, or find it; ``info`` is what people call it.  Returns its digest."""
        return self._writes.call("register", timeout, lambda: self._open().verifier.store.register(manifest, info))

    def reserve(
        self,
        ns: bytes,
        nbytes: int,
        timeout: float = 0.5,
        key: bytes | None = None,  # noqa: ARG002 - for a daemon that limits writes
    ) -> Reservation:
        """A new file to write one part of ``nbytes`` into.  StoreFull, StoreReadOnly, NamespaceNotFound."""

        def undo(temp: Temp) -> None:
            os.close(temp.fd)
            self._open().verifier.store.discard(ns, temp.name)

        temp = self._writes.call("reserve", timeout, lambda: self._open().verifier.reserve(ns, nbytes), undo)
        return Reservation(ns, temp.fd, temp.name, functools.partial(self._discard, ns, temp.name))

    def _discard(self, ns: bytes, token: str) -> None:
        with contextlib.suppress(KvfsError):  # reaped as a dead writer's, later
            self._writes.call("discard", RELEASE, lambda: self._open().verifier.store.discard(ns, token))

    def publish(self, ns: bytes, reservation: Reservation, key: bytes, part: PartId, timeout: float = 5.0) -> bool:
        """Check what was written and make it part ``part`` of chunk ``key``; closes the reservation.

        True if the part is new, False if it was there already.  StoreBusy while the file can still be written (a
        map of it is left), ChunkCorrupt, IdentityError, StoreFull.
        """
        reservation.spend()
        token = reservation.token
        try:
            admitted = self._writes.call("publish", timeout, lambda: self._open().verifier.admit(ns, token, key, part))
        except KvfsError:
            self._counts["drops"] += 1
            raise
        self._counts["publishes"] += admitted.created
        return admitted.created

    def remove(self, ns: bytes, key: bytes, timeout: float = 5.0) -> bool:
        """Remove a chunk; False if there was none."""

        def remove() -> bool:
            store = self._open().verifier.store
            [mask] = store.masks(ns, (key,))
            store.remove(ns, key, store.manifest(ns).parts)
            return mask != 0

        return self._writes.call("remove", timeout, remove)

    def retire(self, ns: bytes, timeout: float = 60.0) -> int:
        """Remove a namespace and all its chunks; returns how many."""

        def retire() -> int:
            store = self._open().verifier.store
            chunks = len({found.key for found in store.scan(ns)})
            store.retire(ns)
            return chunks

        return self._writes.call("retire", timeout, retire)

    # --- asking ---

    def explain(
        self, ns: bytes, keys: Sequence[bytes], manifest: Manifest | None = None, timeout: float = 5.0
    ) -> dict[str, Any]:
        """Why a text hits or misses: see `kvfs.explain.explain`.  ``manifest`` is needed where the store may not
        know the namespace."""

        def ask() -> dict[str, Any]:
            store = self._open().verifier.store
            known = {n: Known(store.manifest(n), store.info(n), None) for n in store.namespaces()}
            masks = store.masks(ns, keys) if ns in known else []
            return explain(ns, keys, masks, known, manifest)

        return self._writes.call("explain", timeout, ask)

    def stats(self, timeout: float = 5.0) -> dict[str, Any]:
        """What the store holds, by listing it, and what this client has counted."""
        return self._writes.call("stats", timeout, self._stats)

    def _stats(self) -> dict[str, Any]:
        store = self._open().verifier.store
        namespaces = [_namespace_stats(store, ns) for ns in store.namespaces()]
        lost, lost_bytes = store.lost.totals()
        space = os.statvfs(self.path)
        return {
            "version": kvfs.__version__,
            "store": str(self.path),
            "uptime": time.monotonic() - self._started,
            "chunks": sum(n["chunks"] for n in namespaces),
            "bytes": sum(n["bytes"] for n in namespaces),
            "free": space.f_bavail * space.f_frsize,
            "namespaces": namespaces,
            **self._counts,
            "leases": 0,
            "quarantined": dict(self._quarantined),
            "lost_found": {"entries": lost, "bytes": lost_bytes, "purged": store.lost.purged},
        }

    def _lost(self, ns: bytes, key: bytes, part: PartId, error: ChunkNotFound | ChunkCorrupt, coded: bool) -> None:
        if isinstance(error, ChunkCorrupt):
            self._open().verifier.quarantine(ns, key, part, error, coded)
            self._quarantined[error.reason] = self._quarantined.get(error.reason, 0) + 1


def _namespace_stats(store: Store, ns: bytes) -> dict[str, Any]:
    keys, size = set(), 0
    for found in store.scan(ns):
        with contextlib.suppress(FileNotFoundError):
            size += found.entry.stat(follow_symlinks=False).st_size
            keys.add(found.key)
    info = store.info(ns)
    return {
        "ns": ns.hex(),
        "name": info.get("name"),
        "revision": info.get("revision"),
        "chunks": len(keys),
        "bytes": size,
    }


def _nothing() -> None:
    """What ends with a lease of a bare store, besides its files."""
