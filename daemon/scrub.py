"""Reading everything again, slowly and behind everyone's back: damage at rest is found before a reader meets it.

The unit is a leaf folder, the longest unread one first; when each was last read in full is kept beside the snapshot of
the index, so a restart goes on where it was.  In a folder the parts that are not known to be whole come first.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

import msgpack

from kvfs import _native, files
from kvfs.chunk import open_part
from kvfs.coded import CodedFile, open_coded
from kvfs.daemon.idle import be_idle
from kvfs.errors import ChunkCorrupt, ChunkNotFound, KvfsError
from kvfs.names import is_leaf

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

    from kvfs.chunk import PartFile
    from kvfs.daemon.catalog import Catalog
    from kvfs.store import Found

log = logging.getLogger(__name__)

AGAIN: Final = 7 * 86400.0
"""Seconds after which a part is read again; a store that takes longer at its rate is read without a pause."""

QUIET: Final = 1.0
"""Seconds without a lease, an open or a publication after which the scrubber goes on."""

LOADING: Final = 30.0
"""Seconds that a load may take, at most: leases that are older are of readers who keep them."""

POLL: Final = 0.25
PATIENCE: Final = 5.0
REST: Final = 60.0
"""Seconds between looks for something to read."""

WINDOW: Final = 1 << 20
"""Bytes read at a time, or one checksummed piece if that has more."""

LEAST: Final = 1 << 20
"""Bytes that a read counts as, at least: a small part costs as much processor time as a large one takes bandwidth."""

RUN: Final = 16 << 20
"""Bytes read in one go, before the pause that the rate asks for. A thread that pauses after each small part finds
nothing of what it needs in the processor's caches, which costs several times as much as the part itself."""

LEAVES: Final = 4096
MAGIC: Final = b"kvfs-scrub/1\n"
Leaf = tuple[bytes, str]
"""Namespace and name of a leaf folder."""


class Scrubber:
    """Reads the parts of a catalog at ``rate`` bytes/s, in a thread of its own with idle priority.

    What is damaged goes the way of every damaged part: checked again, to quarantine, counted, logged.
    """

    def __init__(self, catalog: Catalog, rate: int) -> None:
        self._catalog, self._rate = catalog, rate
        self._path = catalog.store.derived / f"scrub.{socket.gethostname()}"
        self._read: dict[bytes, array.array[int]] = self._load()
        self._dirty = False
        self._next = 0.0  # when what has been read is no more than the rate allows
        self._buffer = bytearray(WINDOW)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvfs-scrub", daemon=True)

    def start(self) -> None:
        """Begin, or go on where the last one was."""
        self._thread.start()

    def close(self) -> None:
        """Stop, within one read; what has been read is saved."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)
        if self._thread.is_alive():
            log.warning("a read of %s takes more than %g s", self._catalog.store.path, PATIENCE)
        self.save()

    # --- what to read next ---

    def _run(self) -> None:
        be_idle()
        while not self._stop.is_set():
            for ns, leaf in self._due():
                if not self.read_leaf(ns, leaf):
                    return
            self._stop.wait(REST)

    def _due(self) -> list[Leaf]:
        """Leaf folders to be read, the longest unread first; also tells since when everything has been read."""
        read = {leaf: self._read_at(leaf) for leaf in self._leaves()}
        since = min(read.values(), default=0)
        self._catalog.metrics.scrub_complete.set(since)
        limit = time.time() - AGAIN
        return sorted((leaf for leaf, when in read.items() if when < limit), key=lambda leaf: (read[leaf], leaf))

    def _leaves(self) -> Iterator[Leaf]:
        for ns in self._catalog.index.namespaces():
            with contextlib.suppress(OSError):  # retired meanwhile
                for name in filter(is_leaf, os.listdir(self._catalog.store.path / ns.hex())):
                    yield ns, name

    def _read_at(self, leaf: Leaf) -> int:
        times = self._read.get(leaf[0])
        return times[int(leaf[1], 16)] if times else 0

    # --- reading ---

    def read_leaf(self, ns: bytes, leaf: str) -> bool:
        """Read the parts of a leaf folder; False if it was stopped."""
        begun, verifier = int(time.time()), self._catalog.verifier
        try:
            found = [(verifier.age(each.entry.stat(follow_symlinks=False)), each) for each in self._scan(ns, leaf)]
            for _, each in sorted(found, key=lambda pair: pair[0]):
                if not self._read_part(ns, each):
                    return False
        except (KvfsError, OSError) as e:  # retired or changed meanwhile, or the volume is away
            log.debug("cannot read %s/%s: %s", ns.hex()[:12], leaf, e)
            return not self._stop.wait(POLL)
        self._read.setdefault(ns, array.array("I", bytes(4 * LEAVES)))[int(leaf, 16)] = begun
        self._dirty = True
        return True

    def _scan(self, ns: bytes, leaf: str) -> Iterator[Found]:
        manifest = self._catalog.store.manifest(ns)
        return (each for each in self._catalog.store.scan_leaf(ns, leaf) if each.part in manifest.parts)

    def _read_part(self, ns: bytes, found: Found) -> bool:
        """Read one part; False if it was stopped."""
        catalog, (key, part, _, coded) = self._catalog, found
        try:
            fd = catalog.store.open_part(ns, key, part, coded)
            before = os.fstat(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead: what it brings in would stay
            opened = open_coded if coded else open_part
            with opened(fd, catalog.store.manifest(ns), key, part) as file:
                if not self._compare(file):
                    return False
            catalog.verifier.mark(before)
        except ChunkNotFound:  # removed meanwhile
            pass
        except ChunkCorrupt as e:
            if catalog.damaged(ns, key, part, e.reason):
                catalog.metrics.scrub_damaged.inc()
        return True

    def _compare(self, file: PartFile | CodedFile) -> bool:
        """Compare all checksums of a part, window by window; False if it was stopped.  ChunkCorrupt."""
        if isinstance(file, CodedFile):
            cuts, sums, name = file.header.index.bounds, file.header.index.layer_sums, file.header.name
        else:
            cuts, sums, name = file.header.layout.bounds, file.header.sums, file.name
        for first, last in windows(cuts):
            bounds = cuts[first : last + 1] - cuts[first]
            if not self._turn(int(bounds[-1])):
                return False
            data = self._pread(file.fd, int(bounds[-1]), file.header.data_start + int(cuts[first]), name)
            if _native.sums(data, bounds) != sums[8 * first : 8 * last]:
                raise ChunkCorrupt(name, "checksum", f"one of the pieces {first} to {last - 1}")
            self._catalog.metrics.scrub_bytes.inc(len(data))
        return True

    def _pread(self, fd: int, size: int, at: int, name: str) -> memoryview:
        """Read, and leave the page cache as it was: what was not in it goes again."""
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        data, done = memoryview(self._buffer)[:size], 0
        try:
            done = os.preadv(fd, [data], at, os.RWF_NOWAIT)
            cold = at + done
        except BlockingIOError:
            cold = at
        except OSError:  # the filesystem cannot tell: better too much in the cache than too little
            cold = at + size
        try:
            while done < size:
                n = os.preadv(fd, [data[done:]], at + done)
                if n == 0:
                    raise ChunkCorrupt(name, "truncated", "the file ends inside its data")
                done += n
        except OSError as e:
            if isinstance(e, ChunkCorrupt):
                raise
            raise ChunkCorrupt(name, "unreadable", e.strerror) from e
        if cold < at + size:
            os.posix_fadvise(fd, cold, at + size - cold, os.POSIX_FADV_DONTNEED)
        return data

    def _turn(self, size: int) -> bool:
        """Wait until ``size`` bytes may be read: the rate allows it, and nobody is at work.  False if stopped."""
        ahead = self._next - time.monotonic()
        until = self._next if ahead * self._rate >= RUN else 0.0
        while (wait := max(until - time.monotonic(), POLL if self._is_busy() else 0.0)) > 0:
            if self._stop.wait(wait):
                return False
        self._next = max(self._next, time.monotonic()) + max(size, LEAST) / self._rate
        return not self._stop.is_set()

    def _is_busy(self) -> bool:
        since = time.monotonic() - self._catalog.last_use
        return since < QUIET or (since < LOADING and len(self._catalog.leases) > 0)

    # --- across restarts ---

    def save(self) -> None:
        """Write when each leaf folder was read; derived data, safe to delete at any time."""
        if self._dirty and not self._catalog.config.read_only:
            self._dirty = False
            known = set(self._catalog.index.namespaces())
            raw = msgpack.packb({ns: times.tobytes() for ns, times in self._read.copy().items() if ns in known})
            try:
                files.replace(self._path, MAGIC + struct.pack("<Q", _native.xxh3_64(raw)) + raw)
            except OSError as e:
                log.warning("cannot write %s: %s; the next start reads all parts anew", self._path, e.strerror)

    def _load(self) -> dict[bytes, array.array[int]]:
        body = files.read_sealed(self._path, MAGIC)
        if body is None:
            return {}
        try:
            times = {ns: array.array("I", of) for ns, of in dict(msgpack.unpackb(body)).items()}
        except (ValueError, TypeError, RecursionError):
            return {}
        return {ns: of for ns, of in times.items() if len(of) == LEAVES}


def windows(cuts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """The pieces between cuts in runs ``first``, ``last`` (excluded) of at most `WINDOW` bytes, at least one piece."""
    bounds = cuts.tolist()
    first = 0
    for piece in range(1, len(bounds)):
        if piece + 1 == len(bounds) or bounds[piece + 1] - bounds[first] > WINDOW:
            yield first, piece
            first = piece
