"""The store through a mount: every verb goes to the daemon behind ``<mount>/.kvfs/sock``."""

import contextlib
import functools
import itertools
import json
import math
import os
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvfs.client.claims import Lease, LeasedPart, Reservation
from kvfs.client.fork import restart_in_child
from kvfs.client.link import Call, Link
from kvfs.codec import FORMS
from kvfs.errors import DaemonUnavailable, KvfsError, ProtocolError
from kvfs.identity import Manifest, PartId, Salts, canonical_json
from kvfs.protocol import MAX_DESCRIBED, MAX_FDS, MAX_KEYS, Deadline, join_keys, split_keys

__all__ = ["MountClient"]

RELEASE = 1.0
"""Seconds to give something back. No engine waits for it, and a busy host must not look like a dead daemon."""
GREETING = 1.0
AGAIN = 0.05


class MountClient:
    """A store served by a daemon.  Thread-safe; survives the daemon's restart, a fork, and a mount that blocks.

    Two connections, so that a slow publish never delays a lookup: one for readers, one for all else.  Leases end
    with their connection; those that are live are claimed again on the next one.
    """

    def __init__(self, mount: str | os.PathLike[str]) -> None:
        path = Path(mount) / ".kvfs" / "sock"
        self.path = Path(mount)
        self._reads, self._writes = Link(path, self._claim_again), Link(path)
        self.restart()
        restart_in_child(self)

    def restart(self) -> None:
        """Forget all leases: in a forked child they are the parent's."""
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._leases: dict[int, tuple[bytes, list[bytes]]] = {}  # live: namespace and keys
        self._ended: list[int] = []  # ended here, perhaps still claimed at the daemon

    def close(self) -> None:
        """End the connections, and with them all leases and reservations."""
        self._reads.close()
        self._writes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading ---

    def lookup(self, ns: bytes, keys: Sequence[bytes], timeout: float = 0.05) -> list[int]:
        """The presence mask of each key: bit i is part i of the namespace's manifest, 0 is absent.

        NamespaceNotFound, DeadlineExceeded, DaemonUnavailable.
        """
        deadline = Deadline(f"lookup at {self.path}", timeout)
        masks: list[int] = []
        for at in range(0, len(keys), MAX_KEYS):
            some = keys[at : at + MAX_KEYS]
            reply, _ = self._reads.call("lookup", deadline.left(), ns=ns, keys=join_keys(some))
            if len(reply["masks"]) != 8 * len(some):
                raise ProtocolError(f"{len(reply['masks'])} bytes of masks for {len(some)} keys")
            masks += np.frombuffer(reply["masks"], dtype="<u8").tolist()
        return masks

    def lease(
        self, ns: bytes, refs: Sequence[tuple[bytes, PartId]], timeout: float = 0.5, coded: bool = False
    ) -> Lease:
        """Open parts for reading and keep their chunks from eviction; all of them or none.  ``coded``: take a part as
        it is stored; otherwise one without its raw form is decoded first.

        ChunkNotFound names the first missing part; ChunkCorrupt, NamespaceNotFound, DeadlineExceeded,
        DaemonUnavailable, StoreBusy if there is no memory to decode it now.
        """
        deadline = Deadline(f"lease at {self.path}", timeout)
        parts: list[LeasedPart] = []
        ids: list[int] = []
        try:
            for at in range(0, len(refs), MAX_FDS):
                parts += self._lease_some(ns, refs[at : at + MAX_FDS], deadline, ids, coded)
        except BaseException:
            Lease(tuple(parts), functools.partial(self._end, ids)).release()
            raise
        return Lease(tuple(parts), functools.partial(self._end, ids))

    def _lease_some(
        self, ns: bytes, refs: Sequence[tuple[bytes, PartId]], deadline: Deadline, ids: list[int], coded: bool
    ) -> list[LeasedPart]:
        number = {part: i for i, part in enumerate(dict.fromkeys(part for _, part in refs))}
        with self._lock:
            lease = next(self._ids)
        keys = [key for key, _ in refs]
        reply, fds = self._reads.call(
            "lease",
            deadline.left(),
            nfds=len(refs),
            ns=ns,
            lease=lease,
            keys=join_keys(keys),
            names=[str(part) for part in number],
            which=bytes(number[part] for _, part in refs),
            coded=coded,
        )
        verified, forms = reply["verified"], reply["forms"]
        if {len(fds), len(verified), len(forms)} != {len(refs)} or any(form >= len(FORMS) for form in forms):
            for fd in fds:
                os.close(fd)
            raise ProtocolError(f"{len(fds)} descriptors for {len(refs)} parts")
        with self._lock:
            self._leases[lease] = (ns, list(dict.fromkeys(keys)))
        ids.append(lease)
        opened = zip(refs, fds, verified, forms, strict=True)
        return [LeasedPart(*ref, fd, bool(ok), FORMS[form]) for ref, fd, ok, form in opened]

    def report(self, ns: bytes, key: bytes, part: PartId, reason: str | None = None, timeout: float = 1.0) -> bool:
        """Tell what reading a leased part showed: None, its checksums are right; else why it is damaged, and
        the daemon checks it again and takes it away.  True if nothing damaged is left in its place."""
        reply, _ = self._reads.call("report", timeout, ns=ns, key=key, part=str(part), **_given(reason=reason))
        return bool(reply["gone"])

    def touch(self, ns: bytes, keys: Sequence[bytes], timeout: float = 0.05) -> None:
        """Count chunks as used now."""
        for at in range(0, len(keys), MAX_KEYS):
            self._reads.call("touch", timeout, ns=ns, keys=join_keys(keys[at : at + MAX_KEYS]))

    def _end(self, ids: Sequence[int]) -> None:
        with self._lock:
            self._ended += [i for i in ids if self._leases.pop(i, None)]
        with contextlib.suppress(KvfsError):
            self._release(self._reads.call)

    def _release(self, call: Call) -> None:
        """Tell the daemon of every lease that has ended; those it could not be told stay listed."""
        with self._lock:
            ended = list(self._ended)
        if ended:
            call("release", RELEASE, leases=struct.pack(f"<{len(ended)}Q", *ended))
            with self._lock:
                self._ended = [i for i in self._ended if i not in ended]

    def _claim_again(self, call: Call) -> None:
        """On a new connection, which starts with no leases: claim those that are live."""
        with self._lock:
            live = dict(self._leases)
            self._ended.clear()
        for lease, (ns, keys) in live.items():
            with contextlib.suppress(KvfsError):  # retired meanwhile: the descriptors still read
                call("hold", GREETING, ns=ns, lease=lease, keys=join_keys(keys))
        self._release(call)

    def salts(self, timeout: float = 5.0) -> Salts:
        """The secrets that enter the keys of texts here: which socket this is decides which they are."""
        reply, _ = self._writes.call("salts", timeout)
        return Salts(reply["own"], reply["public"])

    # --- writing ---

    def register(self, manifest: Manifest, info: Mapping[str, Any] | None = None, timeout: float = 5.0) -> bytes:
        """Make the namespace of a manifest, or find it; ``info`` is what people call it.  Returns its digest."""
        document, about = canonical_json(manifest.to_json()).decode(), canonical_json(dict(info or {})).decode()
        reply, _ = self._writes.call("register", timeout, manifest=document, info=about)
        if reply["ns"] != manifest.ns:
            raise ProtocolError("the daemon derives another namespace from this manifest")
        return manifest.ns

    def reserve(self, ns: bytes, nbytes: int, timeout: float = 0.5, key: bytes | None = None) -> Reservation:
        """A new file to write one part of ``nbytes`` into, of the chunk ``key``: beyond the daemon's budget for writes
        only a key that is offered again is taken.  StoreFull (its ``reason``), StoreReadOnly, NamespaceNotFound."""
        reply, fds = self._writes.call("reserve", timeout, nfds=1, ns=ns, nbytes=nbytes, **_given(key=key))
        if not fds:
            raise ProtocolError("a reservation without a descriptor")
        return Reservation(ns, fds[0], reply["token"], functools.partial(self._discard, reply["token"]))

    def _discard(self, token: str) -> None:
        with contextlib.suppress(KvfsError):  # ends with the connection anyway
            self._writes.call("discard", RELEASE, token=token)

    def publish(self, ns: bytes, reservation: Reservation, key: bytes, part: PartId, timeout: float = 5.0) -> bool:
        """Check what was written and make it part ``part`` of chunk ``key``; closes the reservation.

        True if the part is new, False if it was there already.  StoreBusy while the file can still be written (a
        map of it is left), ChunkCorrupt, IdentityError, StoreFull; DaemonUnavailable if the connection it was
        reserved on has ended.
        """
        reservation.spend()
        reply, _ = self._writes.call("publish", timeout, token=reservation.token, ns=ns, key=key, part=str(part))
        return bool(reply["created"])

    def remove(self, ns: bytes, key: bytes, timeout: float = 5.0) -> bool:
        """Remove a chunk; False if there was none.  StoreBusy while it is leased.  Needs the daemon's rights."""
        return bool(self._writes.call("remove", timeout, ns=ns, key=key)[0]["removed"])

    def retire(self, ns: bytes, timeout: float = 60.0) -> int:
        """Remove a namespace and all its chunks; returns how many.  Needs the daemon's rights."""
        return int(self._writes.call("retire", timeout, ns=ns)[0]["chunks"])

    def evict(self, ns: bytes | None, nbytes: int, timeout: float = 600.0) -> tuple[int, int]:
        """Have the least useful chunks of a namespace, or of all (None), removed until ``nbytes`` are free; returns
        chunks and bytes.  Needs the daemon's rights."""
        reply, _ = self._writes.call("evict", timeout, nbytes=nbytes, **_given(ns=ns))
        return int(reply["chunks"]), int(reply["bytes"])

    def compact(self, ns: bytes | None, idle: int | None, seconds: int, timeout: float = 600.0) -> dict[str, Any]:
        """Have chunks of a namespace, or of all (None), that were not used for ``idle`` seconds (None: as the daemon is
        configured) brought to the coded form, for about ``seconds``; returns ``chunks``, bytes ``before`` and
        ``after``, and whether all is ``done``.  Needs the daemon's rights."""
        return self._writes.call("compact", timeout, seconds=seconds, **_given(ns=ns, idle=idle))[0]

    def plan(self, ns: bytes | None, idle: int | None, level: str | None = None, timeout: float = 600.0) -> list[Any]:
        """What `compact` would do, by namespace: see `kvfs.daemon.sweep.Sweeper.plan`."""
        return list(self._document("plan", timeout, **_given(ns=ns, idle=idle, level=level))["namespaces"])

    def force(self, ns: bytes, level: str, timeout: float = 5.0) -> None:
        """Have a namespace of fidelity lossy compacted to a level, whatever `kvfs quality` found.  IdentityError.
        Needs the daemon's rights."""
        self._writes.call("force", timeout, ns=ns, level=level)

    def pin(self, ns: bytes, key: bytes, pinned: bool, timeout: float = 5.0) -> None:
        """Keep a chunk and those before it in its text from eviction, or end that.  ChunkNotFound.  Needs the daemon's
        rights."""
        self._writes.call("pin", timeout, ns=ns, key=key, pinned=pinned)

    def reconcile(self, timeout: float = 600.0) -> tuple[int, int]:
        """Have the daemon list its store and correct its index; returns parts that it did not know, and parts that
        were gone.  Needs the daemon's rights."""
        reply, _ = self._writes.call("reconcile", timeout)
        return int(reply["found"]), int(reply["gone"])

    def reload(self, timeout: float = 30.0) -> None:
        """Have a fresh worker take over, and return when it answers.  Needs the daemon's rights; Unsupported where a
        daemon is one process, DeadlineExceeded."""
        deadline = Deadline(f"reload at {self.path}", timeout)
        begun, uptime = time.monotonic(), math.inf
        self._writes.call("ping", deadline.left())
        with contextlib.suppress(DaemonUnavailable):  # it may leave before it has answered
            self._writes.call("reload", deadline.left())
        while uptime > time.monotonic() - begun:
            time.sleep(min(AGAIN, deadline.left()))
            with contextlib.suppress(DaemonUnavailable):
                uptime = self.stats(deadline.left())["uptime"]

    # --- asking ---

    def explain(
        self, ns: bytes, keys: Sequence[bytes], manifest: Manifest | None = None, timeout: float = 5.0
    ) -> dict[str, Any]:
        """Why a text hits or misses: see `kvfs.explain.explain`.  ``manifest`` is needed where the store may not
        know the namespace."""
        fields: dict[str, Any] = {} if manifest is None else {"manifest": canonical_json(manifest.to_json()).decode()}
        return self._document("explain", timeout, ns=ns, keys=join_keys(keys[:MAX_KEYS]), **fields)

    def stats(self, timeout: float = 5.0) -> dict[str, Any]:
        """What the daemon holds and has counted since it started."""
        return self._document("stats", timeout)

    def keys(self, ns: bytes, timeout: float = 5.0) -> list[bytes]:
        """The keys of all chunks of a namespace, in no order; ``timeout`` is for a page of them.  NamespaceNotFound."""
        found: dict[bytes, None] = {}
        begin, table = 0, None
        while table is None or begin:
            page, _ = self._writes.call("keys", timeout, ns=ns, begin=begin)
            if table not in {None, page["table"]}:  # the daemon has started anew, and counts differently
                found, begin, table = {}, 0, None
                continue
            found |= dict.fromkeys(split_keys(page["keys"]))
            begin, table = page["next"], page["table"]
        return list(found)

    def describe(self, ns: bytes, keys: Sequence[bytes], timeout: float = 5.0) -> list[dict[str, Any] | None]:
        """What is known of each chunk: ``tokens``, ``form``, ``hits``, ``last_use``, ``pinned``, and the bytes of its
        ``parts`` by name; None for one that is gone.  ``timeout`` is for each `MAX_DESCRIBED`.  NamespaceNotFound."""
        told: list[dict[str, Any] | None] = []
        for at in range(0, len(keys), MAX_DESCRIBED):
            some = keys[at : at + MAX_DESCRIBED]
            chunks = self._document("describe", timeout, ns=ns, keys=join_keys(some))["chunks"]
            if len(chunks) != len(some):
                raise ProtocolError(f"{len(chunks)} descriptions of {len(some)} chunks")
            told += chunks
        return told

    def _document(self, verb: str, timeout: float, **fields: Any) -> dict[str, Any]:
        document = json.loads(self._writes.call(verb, timeout, **fields)[0]["document"])
        if not isinstance(document, dict):
            raise ProtocolError(f"the answer to {verb} is not an object")
        return document


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}
