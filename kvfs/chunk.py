"""One part file: a safetensors file with a strict, closed header, aligned data and a checksum per (tensor, head).

The format is in docs/format.md.  The reader accepts only what the writer writes: its limits are checked
and its grammar matched before anything is interpreted, so a hostile file costs microseconds.
"""

import errno
import functools
import mmap
import os
import re
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.errors import ChunkCorrupt, IdentityError, StoreFull
from kvfs.files import from_read_error
from kvfs.identity import KV_DTYPES, Manifest, PartId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

__all__ = [
    "ALIGNMENT",
    "MAX_HEADER",
    "PartFile",
    "PartHeader",
    "PartLayout",
    "PartMeta",
    "TensorSpec",
    "encode_header",
    "layout",
    "open_part",
    "parse_header",
    "read_header",
    "write_part",
]

FORMAT = "1"
ALIGNMENT = 4096
"""The data of every part starts at a multiple of this many bytes."""
MAX_HEADER = 65536
MAX_TENSORS = 1024
MAX_DATA = 1 << 31

_HEX32 = r"[0-9a-f]{64}"
_META_FIELDS = {
    "kvfs.format": r"[0-9]{1,4}",
    "kvfs.ns": _HEX32,
    "kvfs.key": _HEX32,
    "kvfs.parent": _HEX32,
    "kvfs.tokens": r"[1-9][0-9]{0,3}",
    "kvfs.position": r"0|[1-9][0-9]{0,9}",
    "kvfs.layers": r"[0-9]{1,4}-[0-9]{1,4} of [0-9]{1,4}",
    "kvfs.heads": r"[0-9]{1,4}-[0-9]{1,4} of [0-9]{1,4}",
    "kvfs.part": r"[a-z]{3,7}[0-9]{0,7}\.h[0-9]{1,2}",
    "kvfs.form": r"raw",
    "kvfs.fidelity": r"exact|lossy",
    "kvfs.sums": r"(?:[0-9a-f]{16})+",
    "kvfs.writer": r"[A-Za-z0-9 ._+-]{1,64}",
    "kvfs.header_sum": r"[0-9a-f]{16}",
}
_META = re.compile(",".join(f'"{re.escape(k)}":"({v})"' for k, v in _META_FIELDS.items()).encode())
_TENSOR = re.compile(
    rb'"(layers\.(?:0|[1-9][0-9]{0,3})\.(?:k|v|latent))":\{"dtype":"([A-Z0-9_]{1,8})",'
    rb'"shape":\[([1-9][0-9]{0,6}(?:,[1-9][0-9]{0,6}){1,2})\],"data_offsets":\[([0-9]{1,10}),([0-9]{1,10})\]\}'
)
_OPENING = b'{"__metadata__":{'
_ZERO_SUM = b'"kvfs.header_sum":"0000000000000000"'
_WRITER = "kvfs 0.1"


class PartMeta(NamedTuple):
    """Whose KV a part holds: ``tokens`` tokens from ``position`` on, after the chunk ``parent``."""

    ns: bytes
    key: bytes
    parent: bytes
    tokens: int
    position: int
    part: PartId


class TensorSpec(NamedTuple):
    """A tensor of a part: ``shape`` is ``(heads, tokens, dim)`` (``(tokens, dim)`` for a latent), ``start`` its
    byte offset in the data region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def heads(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class PartLayout:
    """Where each tensor of a part lies; equal for all parts of one namespace, kind and token count."""

    tensors: tuple[TensorSpec, ...]

    @functools.cached_property
    def nbytes(self) -> int:
        return self.tensors[-1].start + self.tensors[-1].nbytes

    @functools.cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Offsets that cut the data into the pieces that have a checksum each: one per (tensor, head)."""
        cuts = [t.start + h * (t.nbytes // t.heads) for t in self.tensors for h in range(t.heads)]
        return np.array([*cuts, self.nbytes], dtype=np.int64)

    @functools.cached_property
    def table(self) -> bytes:
        """The tensors as they stand in the header."""
        rows = (
            f'"{t.name}":{{"dtype":"{t.dtype}","shape":[{",".join(map(str, t.shape))}],'
            f'"data_offsets":[{t.start},{t.start + t.nbytes}]}}'
            for t in self.tensors
        )
        return ",".join(rows).encode()


@functools.lru_cache(maxsize=1024)
def layout(manifest: Manifest, part: PartId, tokens: int) -> PartLayout:
    """The layout of one part: layers ascending, K ``[heads, tokens, head_dim]`` before V ``[heads, tokens,
    head_dim_v]``.  IdentityError if the namespace has no such part or no chunk of so many tokens."""
    kind = manifest.kind(part.kind)
    manifest.bit(part)
    if not 0 < tokens <= manifest.chunk_tokens:
        raise IdentityError(f"a chunk holds 1 to {manifest.chunk_tokens} tokens, not {tokens}")
    heads = kind.kv_heads // kind.head_slices
    tensors, at = [], 0
    for layer in kind.layers:
        shapes: dict[str, tuple[int, ...]] = (
            {"latent": (tokens, kind.head_dim)}
            if kind.name == "mla"
            else {"k": (heads, tokens, kind.head_dim), "v": (heads, tokens, kind.head_dim_v)}
        )
        for which, shape in shapes.items():
            nbytes = KV_DTYPES[manifest.kv_dtype]
            for n in shape:
                nbytes *= n
            tensors.append(TensorSpec(f"layers.{layer}.{which}", manifest.kv_dtype, shape, at, nbytes))
            at += nbytes
    return PartLayout(tuple(tensors))


class PartHeader(NamedTuple):
    """What a part file says of itself; ``sums`` is one u64 (little endian) per (tensor, head)."""

    meta: PartMeta
    layout: PartLayout
    sums: bytes
    data_start: int
    form: str
    fidelity: str


def encode_header(manifest: Manifest, meta: PartMeta, sums: bytes, source: str = "raw") -> bytes:
    """The bytes before the data, a multiple of ALIGNMENT.  ``sums``: u64 little endian per (tensor, head).  ``source``:
    the form that the data was decoded from, which the writer's name then tells."""
    lay, kind = layout(manifest, meta.part, meta.tokens), manifest.kind(meta.part.kind)
    heads = kind.kv_heads // kind.head_slices
    first = meta.part.slice * heads
    fields = (
        FORMAT,
        meta.ns.hex(),
        meta.key.hex(),
        meta.parent.hex(),
        meta.tokens,
        meta.position,
        f"{kind.layers[0]}-{kind.layers[-1]} of {manifest.num_layers}",
        f"{first}-{first + heads - 1} of {kind.kv_heads}",
        meta.part,
        "raw",
        manifest.fidelity,
        sums.hex(),
        _WRITER if source == "raw" else f"{_WRITER} from {source}",
        "0" * 16,
    )
    head = ",".join(f'"{k}":"{v}"' for k, v in zip(_META_FIELDS, fields, strict=True)).encode()
    text = _OPENING + head + b"}," + lay.table + b"}"
    size = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if size > MAX_HEADER or len(sums) != 8 * (len(lay.bounds) - 1):
        raise IdentityError(f"a header of {size} bytes for {len(sums) // 8} checksums cannot be written")
    raw = struct.pack("<Q", size - 8) + text.ljust(size - 8)
    return raw.replace(_ZERO_SUM, b'"kvfs.header_sum":"%016x"' % _native.xxh3_64(raw), 1)


def parse_header(raw: bytes, file_size: int, name: str = "?") -> PartHeader:
    """Read a header from ``raw``, the first bytes of a file (its whole header at least).

    Raises ChunkCorrupt with reason ``truncated``, ``header`` (not our grammar, or its checksum is wrong),
    ``tensors`` (holes, sizes) or ``size`` (file longer or shorter than its tensors).
    """
    size = _header_size(raw, file_size, name)
    if len(raw) < size:
        raise ChunkCorrupt(name, "truncated", f"{len(raw)} bytes of a header of {size}")
    raw = raw[:size]
    end = raw.find(b"},", len(_OPENING) + 8)
    m = _META.fullmatch(raw, 8 + len(_OPENING), end) if end > 0 else None
    if m is None or raw[8 : 8 + len(_OPENING)] != _OPENING:
        raise ChunkCorrupt(name, "header", "not the header of a kvfs part")
    at = m.start(len(_META_FIELDS))
    if _native.xxh3_64(raw[:at] + b"0" * 16 + raw[at + 16 :]) != int(m[len(_META_FIELDS)], 16):
        raise ChunkCorrupt(name, "header", "the header does not have the checksum it states")
    fields = [g.decode() for g in m.groups()]
    if fields[0] != FORMAT:
        raise ChunkCorrupt(name, "header", f"format {fields[0]}, this version reads {FORMAT}")
    table = raw[end + 2 :].rstrip(b" ")
    if not table.endswith(b"}"):
        raise ChunkCorrupt(name, "header", "the header does not end as it should")
    try:
        lay = _parse_table(table[:-1])
        part = PartId.parse(fields[8])
    except (ValueError, IdentityError) as e:
        raise ChunkCorrupt(name, "tensors", str(e)) from None
    if size + lay.nbytes != file_size:
        raise ChunkCorrupt(name, "size", f"{file_size} bytes, its header says {size + lay.nbytes}")
    sums = bytes.fromhex(fields[11])
    if len(sums) != 8 * (len(lay.bounds) - 1):
        raise ChunkCorrupt(name, "header", f"{len(sums) // 8} checksums for {len(lay.bounds) - 1} pieces")
    ns, key, parent = (bytes.fromhex(f) for f in fields[1:4])
    meta = PartMeta(ns, key, parent, int(fields[4]), int(fields[5]), part)
    if any(t.shape[-2] != meta.tokens for t in lay.tensors):
        raise ChunkCorrupt(name, "tensors", f"a tensor does not hold {meta.tokens} tokens")
    return PartHeader(meta, lay, sums, size, fields[9], fields[10])


def _header_size(raw: bytes, file_size: int, name: str) -> int:
    if len(raw) < 8:
        raise ChunkCorrupt(name, "truncated", f"{file_size} bytes are too few for a header")
    size = 8 + int.from_bytes(raw[:8], "little")
    if size > MAX_HEADER or size % ALIGNMENT or size > file_size:
        raise ChunkCorrupt(name, "header", f"a header of {size} bytes in a file of {file_size}")
    return size


@functools.lru_cache(maxsize=256)
def _parse_table(table: bytes) -> PartLayout:
    """Tensors from their text; ValueError unless they abut, from 0, in a closed grammar.  All chunks of one
    shape have the same text, so this is done once for each shape."""
    tensors: list[TensorSpec] = []
    pos = at = 0
    while pos < len(table):
        m = _TENSOR.match(table, pos)
        if m is None or len(tensors) >= MAX_TENSORS:
            raise ValueError(f"at most {MAX_TENSORS} tensors named layers.<i>.k, .v or .latent are allowed")
        name, dtype = m[1].decode(), m[2].decode()
        shape = tuple(int(n) for n in m[3].split(b","))
        if dtype not in KV_DTYPES:
            raise ValueError(f"{name}: dtype {dtype} is not one of {', '.join(KV_DTYPES)}")
        nbytes = KV_DTYPES[dtype]
        for n in shape:
            nbytes *= n
        if (int(m[4]), int(m[5])) != (at, at + nbytes) or at + nbytes > MAX_DATA:
            raise ValueError(f"{name}: bytes {int(m[4])} to {int(m[5])} where {at} to {at + nbytes} were expected")
        tensors.append(TensorSpec(name, dtype, shape, at, nbytes))
        at += nbytes
        pos = m.end()
        if pos < len(table) and table[pos : pos + 1] != b",":
            raise ValueError("tensors are not separated by a comma")
        pos += 1
    if not tensors or pos == len(table) or len({t.name for t in tensors}) != len(tensors):
        raise ValueError("no tensors, or a name twice")
    return PartLayout(tuple(tensors))


def read_header(fd: int, name: str = "?") -> PartHeader:
    """The header of an open part, by one or two ``pread``; raises as `parse_header`, and ChunkCorrupt
    ``unreadable`` for an I/O error, ChunkNotFound for a file that another host has removed."""
    try:
        file_size = os.fstat(fd).st_size
        raw = os.pread(fd, ALIGNMENT, 0)
        size = _header_size(raw, file_size, name)
        if size > len(raw):
            raw += os.pread(fd, size - len(raw), len(raw))
    except OSError as e:
        raise from_read_error(e, name) from e
    return parse_header(raw, file_size, name)


def write_part(fd: int, manifest: Manifest, meta: PartMeta, payload: "Buffer") -> int:
    """Write header and ``payload`` (the data region as `layout` lays it out, contiguous) to an empty file.

    Returns the bytes written.  StoreFull when the disk or a quota is; IdentityError for a payload of the wrong size.
    """
    lay = layout(manifest, meta.part, meta.tokens)
    data = memoryview(payload).cast("B")
    if len(data) != lay.nbytes:
        raise IdentityError(f"a payload of {len(data)} bytes for a part of {lay.nbytes}")
    header = encode_header(manifest, meta, _native.sums(data, lay.bounds))
    try:
        at = os.pwritev(fd, [header, data], 0)
        while at < len(header) + len(data):
            if at < len(header):
                at += os.pwritev(fd, [header[at:], data], at)
            else:
                at += os.pwrite(fd, data[at - len(header) :], at)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFull(f"a part of {len(header) + len(data)} bytes") from e
        raise
    return at


class PartFile:
    """An open part whose header has been checked.  Closing it leaves maps of it valid."""

    def __init__(self, fd: int, header: PartHeader, name: str) -> None:
        self.fd, self.header, self.name = fd, header, name
        self._map: mmap.mmap | None = None

    def map(self) -> memoryview:
        """The data region, mapped read-only and shared with every other reader of the file.  Only for files
        on a local disk: a map of a network filesystem can raise SIGBUS."""
        if self._map is None:
            self._map = mmap.mmap(self.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        return memoryview(self._map)[self.header.data_start :]

    def tensor(self, name: str) -> memoryview:
        """The bytes of one tensor, mapped."""
        for t in self.header.layout.tensors:
            if t.name == name:
                return self.map()[t.start : t.start + t.nbytes]
        raise KeyError(name)

    def read(self) -> bytearray:
        """The data region copied by ``pread``: no fault can reach the caller.  ChunkCorrupt ``truncated`` or
        ``unreadable``, ChunkNotFound (removed by another host)."""
        h = self.header
        out = bytearray(h.layout.nbytes)
        view, at = memoryview(out), 0
        try:
            while at < len(out):
                n = os.preadv(self.fd, [view[at:]], h.data_start + at)
                if n == 0:
                    raise ChunkCorrupt(self.name, "truncated", "the file ends inside its data")
                at += n
        except OSError as e:
            raise from_read_error(e, self.name) from e
        return out

    def verify(self) -> bytearray:
        """Read the data and compare every checksum; returns the data.  ChunkCorrupt ``checksum`` names the
        first tensor and head that differ."""
        data, h = self.read(), self.header
        found = _native.sums(data, h.layout.bounds)
        if found != h.sums:
            bad = next(i for i in range(0, len(found), 8) if found[i : i + 8] != h.sums[i : i + 8]) // 8
            pieces = [(t.name, head) for t in h.layout.tensors for head in range(t.heads)]
            raise ChunkCorrupt(self.name, "checksum", "{} head {}".format(*pieces[bad]))
        return data

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_part(fd: int, manifest: Manifest, key: bytes, part: PartId) -> PartFile:
    """Take over ``fd`` as the part ``part`` of chunk ``key``; closes it if that is not what it holds.

    Raises as `read_header`, and ChunkCorrupt ``wrong-ns``, ``wrong-key``, ``wrong-part``, ``wrong-shape`` or
    ``wrong-fidelity`` when the header names something else than was asked for.
    """
    name = f"{key.hex()}.{part}"
    try:
        h = read_header(fd, name)
        asked: Mapping[str, tuple[object, object]] = {
            "wrong-ns": (h.meta.ns.hex(), manifest.ns_hex),
            "wrong-key": (h.meta.key.hex(), key.hex()),
            "wrong-part": (h.meta.part, part),
            "wrong-fidelity": (h.fidelity, manifest.fidelity),
        }
        for reason, (has, wants) in asked.items():
            if has != wants:
                raise ChunkCorrupt(name, reason, f"its header says {has}, expected {wants}")
        if h.meta.tokens > manifest.chunk_tokens or h.layout.tensors != layout(manifest, part, h.meta.tokens).tensors:
            raise ChunkCorrupt(name, "wrong-shape", "its tensors are not those of this namespace")
    except BaseException:
        os.close(fd)
        raise
    return PartFile(fd, h, name)
