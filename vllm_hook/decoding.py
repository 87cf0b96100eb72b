"""Compacted parts on their way into an engine's blocks: decoded here, layer after layer, or hydrated by the store.

The first layers are in the blocks before the last ones have been read.
"""

import os
from collections.abc import Iterator

from kvfs.coded import CodedFile
from kvfs.errors import ChunkCorrupt
from kvfs.vllm_hook.staging import Bytes

__all__ = ["Ways", "decoded_layers", "room"]

OVERHEAD = 1 << 20
"""A coded part may be so much larger than its raw form: what cannot be compressed."""
STEP = 1 << 18
"""Memory for coded parts is taken in multiples of it, so that it can be used again for one of another size."""


def room(file: CodedFile) -> int:
    """Bytes of memory that reading a coded part takes. ChunkCorrupt ``size`` if it is larger than any can be."""
    h = file.header
    if h.file_size > h.layout.nbytes + OVERHEAD:
        raise ChunkCorrupt(h.name, "size", f"{h.file_size} bytes for {h.layout.nbytes} of KV")
    return -(-h.file_size // STEP) * STEP


def decoded_layers(file: CodedFile, buffer: Bytes, out: Bytes) -> Iterator[tuple[int, int]]:
    """Read a part into ``buffer`` (`room` bytes) and decode it into ``out``, the data region of the raw form; gives the
    ranges of layers as they get ready, in order.

    Streams are verified before they are decoded. ChunkCorrupt ``truncated``, ``checksum`` or ``stream``; OSError of the
    read.
    """
    h, index, turns = file.header, file.header.index, file.header.turns()
    view = memoryview(buffer.data)[: h.file_size]
    for first, last in index.batches():
        at, end = (h.data_start + int(index.bounds[i]) for i in (first, last))
        while at < end:
            got = os.preadv(file.fd, [view[at:end]], at)
            if got == 0:
                raise ChunkCorrupt(h.name, "truncated", "the file ends inside its streams")
            at += got
        h.decode_layers(view, out.data, first, last, turns)
        yield first, last


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
