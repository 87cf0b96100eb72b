"""Coded parts on their way into an engine's blocks: read and decoded layer after layer, and which of them are.

The first layers are in the blocks before the last ones have been read.
"""

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from kvfs.chunk import MAX_HEADER, PartMeta
from kvfs.codec import MAX_INDEX, CodedPart
from kvfs.errors import ChunkCorrupt
from kvfs.identity import Manifest, PartId
from kvfs.vllm_hook.staging import Bytes

__all__ = ["CodedFile", "Ways", "open_coded"]

HEAD = 1 << 16
"""Bytes that hold header and index of nearly every coded part."""
OVERHEAD = 1 << 20
"""A coded part may be so much larger than its raw form: what cannot be compressed."""
STEP = 1 << 18
"""Memory for coded parts is taken in multiples of it, so that it can be used again for one of another size."""


class CodedFile:
    """An open coded part whose header and index have been checked."""

    def __init__(self, fd: int, coded: CodedPart) -> None:
        self.fd, self.coded = fd, coded

    @property
    def meta(self) -> PartMeta:
        return self.coded.meta

    @property
    def name(self) -> str:
        return self.coded.name

    @property
    def room(self) -> int:
        """Bytes of memory that reading it takes."""
        return -(-self.coded.file_size // STEP) * STEP

    def layers(self, buffer: Bytes, out: Bytes) -> Iterator[tuple[int, int]]:
        """Read into ``buffer`` (`room` bytes) and decode into ``out``, the data region of the raw form; gives the
        ranges of layers as they get ready, in order.

        Streams are verified before they are decoded. ChunkCorrupt ``truncated``, ``checksum`` or ``stream``; OSError of
        the read.
        """
        coded, index, turns = self.coded, self.coded.index, self.coded.turns()
        view = memoryview(buffer.data)[: coded.file_size]
        for first, last in index.batches():
            at, end = (coded.data_start + int(index.bounds[i]) for i in (first, last))
            while at < end:
                got = os.preadv(self.fd, [view[at:end]], at)
                if got == 0:
                    raise ChunkCorrupt(self.name, "truncated", "the file ends inside its streams")
                at += got
            coded.decode_layers(view, out, first, last, turns)
            yield first, last

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_coded(fd: int, manifest: Manifest, key: bytes, part: PartId) -> CodedFile:
    """Take over ``fd`` as the coded form of the part ``part`` of chunk ``key``; closes it if that is not what it holds.

    Raises as `CodedPart.parse` and `CodedPart.expect`; OSError of the read.
    """
    name = f"{key.hex()}.{part}"
    try:
        size = os.fstat(fd).st_size
        try:
            coded = CodedPart.parse(os.pread(fd, HEAD, 0), size, name)
        except ChunkCorrupt as e:
            if e.reason != "truncated":
                raise
            coded = CodedPart.parse(os.pread(fd, MAX_HEADER + MAX_INDEX, 0), size, name)
        coded.expect(manifest, key, part)
        if size > coded.layout.nbytes + OVERHEAD:
            raise ChunkCorrupt(name, "size", f"{size} bytes for {coded.layout.nbytes} of KV")
    except BaseException:
        os.close(fd)
        raise
    return CodedFile(fd, coded)


class Ways:
    """How to get at a compacted part: decode it here, or have it hydrated and read that. Whichever has been faster.

    Speeds are bytes of the raw form a second, of one part on one thread, from asking for it until it is in the blocks:
    what decoding is worth here depends on the instruction set, on how many cores are left beside the engine, and on how
    fast the medium is; what hydration is worth on how much the daemon has to do and on what it has hydrated already.
    """

    WEIGHT = 0.3
    """Of a new sample."""
    TRY = 64
    """One part of so many goes the other way, so that neither figure grows old."""

    def __init__(self) -> None:
        self.speeds = {True: 0.0, False: 0.0}
        self._parts = 0

    def decodes(self) -> bool:
        """Whether the next part is to be decoded here."""
        self._parts += 1
        faster = self.speeds[True] >= self.speeds[False]
        return faster if self._parts % self.TRY else not faster

    def took(self, decoded: bool, nbytes: int, seconds: float) -> None:
        """A part of ``nbytes`` in its raw form took so long, decoded here or hydrated."""
        old, sample = self.speeds[decoded], nbytes / max(seconds, 1e-9)
        self.speeds[decoded] = old + self.WEIGHT * (sample - old) if old else sample
