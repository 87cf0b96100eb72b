"""A coded part: a safetensors file of an index and the streams of all layers (docs/codec-format.md).

`CodedPart` reads one layer by layer, so that the first can be used before the last is decoded.
"""

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.chunk import MAX_HEADER, PartLayout, PartMeta, layout
from kvfs.codec.index import Index
from kvfs.codec.levels import LEVELS, Level
from kvfs.errors import ChunkCorrupt, IdentityError
from kvfs.identity import Manifest, PartId

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MAX_INDEX", "CodedPart", "frame", "run"]

ALIGNMENT = 64
"""The index starts at a multiple of it."""
MAX_INDEX = 1 << 20
OVERHEAD = 1 << 20
"""A coded part may be so much larger than its raw form: what cannot be compressed."""
_WRITER = "kvfs 0.1"
_UNSEALED = "0" * 16

_TEMPLATE = (
    '{"__metadata__":{"kvfs.format":"1","kvfs.ns":"<ns>","kvfs.key":"<key>","kvfs.parent":"<parent>",'
    '"kvfs.tokens":"<tokens>","kvfs.position":"<position>","kvfs.part":"<part>","kvfs.form":"<form>",'
    '"kvfs.fidelity":"<fidelity>","kvfs.codec":"1","kvfs.transform":"none","kvfs.index_sum":"<index_sum>",'
    '"kvfs.writer":"<writer>","kvfs.header_sum":"<header_sum>"},'
    '"index":{"dtype":"U8","shape":[<index>],"data_offsets":[0,<split>]},'
    '"layers":{"dtype":"U8","shape":[<layers>],"data_offsets":[<start>,<end>]}}'
)
_NUMBER = "[1-9][0-9]{0,9}"
_GRAMMAR = {
    "ns": "[0-9a-f]{64}", "key": "[0-9a-f]{64}", "parent": "[0-9a-f]{64}", "tokens": "[1-9][0-9]{0,3}",
    "position": "0|[1-9][0-9]{0,9}", "part": r"[a-z]{3,7}[0-9]{0,7}\.h[0-9]{1,2}",
    "form": "|".join(level.form for level in LEVELS.values()), "fidelity": "exact|lossy",
    "index_sum": "[0-9a-f]{16}", "writer": "[A-Za-z0-9 ._+-]{1,64}", "header_sum": "[0-9a-f]{16}",
    "index": _NUMBER, "split": _NUMBER, "layers": _NUMBER, "start": _NUMBER, "end": _NUMBER,
}  # fmt: skip
_HEADER = re.compile(re.sub("<(.*?)>", lambda m: f"(?P<{m[1]}>{_GRAMMAR[m[1]]})", re.escape(_TEMPLATE)) + " *")
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class CodedPart:
    """A coded part whose header and index have been checked.  ``data_start``: where the streams begin in the file."""

    meta: PartMeta
    level: Level
    fidelity: str
    index: Index
    data_start: int
    file_size: int
    name: str

    @classmethod
    def parse(cls, raw: "Buffer", file_size: int, name: str = "?") -> Self:
        """Read header and index from ``raw``, the first bytes of a file (MAX_HEADER + MAX_INDEX are always enough).

        Raises ChunkCorrupt with reason ``truncated``, ``header``, ``tensors``, ``size`` or ``wrong-fidelity``.
        """
        view = memoryview(raw).cast("B")
        size = 8 + int.from_bytes(view[:8], "little")
        if len(view) < 8 or size % ALIGNMENT or size > min(MAX_HEADER, len(view), file_size):
            raise ChunkCorrupt(name, "header", f"a header of {size} bytes in {len(view)} of a file of {file_size}")
        text = bytes(view[8:size]).decode("latin-1")
        m = _HEADER.fullmatch(text)
        if m is None or _seal(text[: m.start("header_sum")] + _UNSEALED + text[m.end("header_sum") :]) != text:
            raise ChunkCorrupt(name, "header", "not the header of a coded part, or not the checksum that it states")
        index, split, layers, start, end = (int(m[x]) for x in ("index", "split", "layers", "start", "end"))
        if not index == split == start <= MAX_INDEX or end != start + layers:
            raise ChunkCorrupt(name, "tensors", "index and layers do not abut")
        if size + end != file_size:
            raise ChunkCorrupt(name, "size", f"{file_size} bytes, its header says {size + end}")
        block = bytes(view[size : size + index])
        if len(block) < index:
            raise ChunkCorrupt(name, "truncated", f"{len(view)} bytes of header and index of {size + index}")
        if f"{_native.xxh3_64(block):016x}" != m["index_sum"]:
            raise ChunkCorrupt(name, "header", "the index does not have the checksum that the header states")
        level = next(x for x in LEVELS.values() if x.form == m["form"])
        if m["fidelity"] == "exact" and not level.lossless:
            raise ChunkCorrupt(name, "wrong-fidelity", f"{level.form} in a namespace of exact chunks")
        try:
            ns, key, parent = (bytes.fromhex(m[x]) for x in ("ns", "key", "parent"))
            meta = PartMeta(ns, key, parent, int(m["tokens"]), int(m["position"]), PartId.parse(m["part"]))
            parsed = Index.parse(block, level.lossless, meta.part.kind == "mla", meta.tokens)
            if parsed.bounds[-1] != layers:
                raise ValueError(f"streams of {parsed.bounds[-1]} bytes in {layers}")
            if file_size > parsed.layout.nbytes + OVERHEAD:
                raise ValueError(f"{file_size} bytes for {parsed.layout.nbytes} of KV")
        except (ValueError, IdentityError) as e:
            raise ChunkCorrupt(name, "tensors", f"an index that cannot be: {e}") from None
        return cls(meta, level, m["fidelity"], parsed, size + index, file_size, name)

    def expect(self, manifest: Manifest, key: bytes, part: PartId) -> None:
        """Make sure that this is the part ``part`` of chunk ``key``: ChunkCorrupt ``wrong-ns``, ``wrong-key``,
        ``wrong-part``, ``wrong-fidelity`` or ``wrong-shape`` if not.  Decode nothing before."""
        asked: Mapping[str, tuple[object, object]] = {
            "wrong-ns": (self.meta.ns.hex(), manifest.ns_hex),
            "wrong-key": (self.meta.key.hex(), key.hex()),
            "wrong-part": (self.meta.part, part),
            "wrong-fidelity": (self.fidelity, manifest.fidelity),
        }
        for reason, (has, wants) in asked.items():
            if has != wants:
                raise ChunkCorrupt(self.name, reason, f"its header says {has}, expected {wants}")
        if self.meta.tokens > manifest.chunk_tokens or self.layout != layout(manifest, part, self.meta.tokens):
            raise ChunkCorrupt(self.name, "wrong-shape", "its tensors are not those of this namespace")

    @property
    def form(self) -> str:
        """One of `kvfs.codec.FORMS`."""
        return self.level.form

    @property
    def layout(self) -> PartLayout:
        """Of the raw form; ``chunk.encode_header(manifest, meta, sums)`` makes its header."""
        return self.index.layout

    @property
    def sums(self) -> bytes:
        """Checksums of the raw form, one for each (tensor, head), as `chunk.PartHeader` has them."""
        return self.index.sums

    def turns(self) -> bytearray | None:
        """What RoPE turns the tokens by: for `decode_layers`."""
        return self.index.turns(self.meta.position)

    def decode(self, coded: "Buffer", out: "Buffer | None" = None, executor: Executor | None = None) -> "Buffer":
        """Decode the file ``coded`` to the data region of the raw form: into ``out``, or into new memory.

        The threads of an executor share the layers.  Raises as `decode_layers`.
        """
        data = bytearray(self.layout.nbytes) if out is None else out
        turns = self.turns()
        run(executor, lambda batch: self.decode_layers(coded, data, *batch, turns), self.index.batches())
        return data

    def decode_layers(self, coded: "Buffer", out: "Buffer", first: int, last: int, turns: bytearray | None) -> None:
        """Decode the layers ``first`` to ``last`` (counted in this part) of the file ``coded`` into ``out``, the data
        region of the raw form.

        Raises ChunkCorrupt ``truncated`` (the file is shorter than its header says), ``checksum`` or ``stream``.
        """
        view, index = memoryview(coded).cast("B"), self.index
        if len(view) != self.file_size:
            raise ChunkCorrupt(self.name, "truncated", f"{len(view)} bytes of a file of {self.file_size}")
        view = view[self.data_start :]
        if _native.sums(view, index.bounds[first : last + 1]) != index.layer_sums[8 * first : 8 * last]:
            raise ChunkCorrupt(self.name, "checksum", f"the streams of layers {first} to {last - 1}")
        streams = index.streams[first * index.heads : last * index.heads]
        bad = _native.codec_decode(index.shape.array(), turns, view, out, streams)
        if bad is not None:
            layer, head = divmod(bad[0], index.heads)
            raise ChunkCorrupt(self.name, "stream", f"layer {first + layer} head {head}: {bad[1]}")

    def arguments(self, fd: int, ops: npt.NDArray[np.int64], first: int, last: int) -> tuple[Any, ...]:
        """What `_native.load_coded` takes to decode rows [first, last) of this part, open as ``fd``, into paged KV.

        ``ops``, int64 ``[tensors, 12]``: offsets relative to the data region of the raw form.
        """
        x = self.index
        return (
            fd, self.data_start, x.bounds, x.layer_sums, x.shape.array(), self.turns(), x.streams,
            ops, first, last, self.meta.position,
        )  # fmt: skip


def frame(meta: PartMeta, level: Level, fidelity: str, index: Index) -> bytes:
    """Header and index: what stands in a coded part before its streams."""
    block, streams = index.pack(), int(index.bounds[-1])
    values = {
        "ns": meta.ns.hex(), "key": meta.key.hex(), "parent": meta.parent.hex(), "tokens": meta.tokens,
        "position": meta.position, "part": meta.part, "form": level.form, "fidelity": fidelity, "writer": _WRITER,
        "index_sum": f"{_native.xxh3_64(block):016x}", "header_sum": _UNSEALED, "index": len(block),
        "split": len(block), "layers": streams, "start": len(block), "end": len(block) + streams,
    }  # fmt: skip
    text = re.sub("<(.*?)>", lambda m: str(values[m[1]]), _TEMPLATE)
    size = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    return struct.pack("<Q", size - 8) + _seal(text.ljust(size - 8)).encode() + block


def _seal(text: str) -> str:
    """The text with its own checksum in place of that of none."""
    mark = '"kvfs.header_sum":"{}"'
    return text.replace(mark.format(_UNSEALED), mark.format(f"{_native.xxh3_64(text.encode('latin-1')):016x}"), 1)


def run(executor: Executor | None, f: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """``f`` of each item, in order, by the threads of an executor if there is one."""
    return list((executor.map if executor else map)(f, items))
