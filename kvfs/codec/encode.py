"""A coded part from a raw one."""

from concurrent.futures import Executor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvfs import _native
from kvfs.chunk import PartHeader
from kvfs.codec.index import LAYER_ALIGNMENT, Index
from kvfs.codec.levels import LEVELS, Level
from kvfs.codec.partfile import CodedPart, frame, run
from kvfs.codec.rope import Rope
from kvfs.errors import ChunkCorrupt, IdentityError, Unsupported

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["encode_part"]


def encode_part(
    header: PartHeader, data: "Buffer", level: Level, rope: Rope | None = None, executor: Executor | None = None
) -> bytes:
    """The whole file of a coded part, from header and data region of a raw one.

    Its streams have been decoded, and the checksums it holds are of what they gave.  Values that a lossy level cannot
    hold (not finite, or too far apart) make the part lossless.  The threads of an executor share the layers.

    Raises IdentityError for a lossy level in a namespace of exact chunks, Unsupported for element types and head sizes
    that the codec does not code, and ChunkCorrupt ``checksum`` if the data is not what its header says.
    """
    lay, meta, name = header.layout, header.meta, f"{header.meta.key.hex()}.{header.meta.part}"
    if header.fidelity == "exact" and not level.lossless:
        raise IdentityError(f"{level.form} is lossy and the namespace is exact")
    index = Index.of(lay, meta, level.lossless, rope)
    if not index.shape.codable:
        channels = "+".join(str(s.channels) for s in index.shape.sections)
        raise Unsupported(f"{level.form} of {index.shape.dtype} in {channels} channels")
    if _native.sums(data, lay.bounds) != header.sums:
        raise ChunkCorrupt(name, "checksum", "the data to encode is not what its header says")

    streams = _streams(index, data, level, meta.position, executor)
    if streams is None:
        return encode_part(header, data, LEVELS["lossless"], executor=executor)
    layers = [b"".join(streams[i : i + index.heads]) for i in range(0, len(streams), index.heads)]
    coded = b"".join(x + bytes(-len(x) % LAYER_ALIGNMENT) for x in layers)
    index = replace(index, sizes=np.array([len(s) for s in streams]))
    index = replace(index, layer_sums=_native.sums(coded, index.bounds))
    decoded = CodedPart(meta, level, header.fidelity, index, 0, len(coded), name).decode(coded, executor=executor)
    index = replace(index, sums=_native.sums(decoded, lay.bounds))
    if level.lossless and index.sums != header.sums:
        raise ChunkCorrupt(name, "checksum", "the lossless streams do not give back the data")
    return frame(meta, level, header.fidelity, index) + coded


def _streams(
    index: Index, data: "Buffer", level: Level, position: int, executor: Executor | None
) -> list[bytes] | None:
    """A stream for each layer and head; None if the level cannot hold the values."""
    turns = index.turns(position)

    def encode(batch: tuple[int, int]) -> list[bytes] | None:
        places = index.places[batch[0] * index.heads : batch[1] * index.heads]
        return _native.codec_encode(index.shape.array(), level.steps or (0, 0), turns, data, places)

    streams = list[bytes]()
    for some in run(executor, encode, index.batches()):
        if some is None:
            return None
        streams += some
    return streams
