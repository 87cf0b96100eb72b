"""How bytes get between part files and an engine's blocks: in host memory by native code, on a GPU by streams.

Both ways keep the rule of the cancel token: what can block (a read) writes only into memory of kvfs, and when
``cancel()`` has returned nothing is written into the engine's blocks any more.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvfs import _native
from kvfs.chunk import PartFile, PartMeta, layout
from kvfs.coded import CodedFile
from kvfs.device import Rows, gather_rows, pinned, rows_of, scatter_rows
from kvfs.errors import ChunkCorrupt
from kvfs.identity import Manifest, PartId
from kvfs.vllm_hook.layout import PagedKV
from kvfs.vllm_hook.staging import Bytes, Staging, pageable

__all__ = ["CodedRows", "Copy", "DeviceCopy", "HostCopy"]

Table = npt.NDArray[np.int64]

CodedRows = tuple[CodedFile, Manifest, int, int]
"""A coded part, its namespace, and which of its rows: [first, last)."""

LOAD_BYTES = 256 << 20
"""Pinned memory that loads pass through, at most."""


class HostCopy:
    """For KV in host memory. Loads read into a buffer of their thread, gathers run on the calling thread."""

    allocate = staticmethod(pageable)

    def __init__(self, kv: PagedKV) -> None:
        self._kv = kv

    def load(
        self,
        file: PartFile,
        manifest: Manifest,
        table: Table,
        first: int,
        last: int,
        sums: bytes | None,
        token: _native.CancelToken,
    ) -> int:
        """Fill the blocks of ``table`` with rows [first, last) of a part; returns the bytes written.

        ``sums`` are those of its header, if it is to be verified. ChunkCorrupt ``checksum``; OSError of the read;
        InterruptedError once ``token`` is cancelled.
        """
        h = file.header
        ops = self._kv.ops(manifest, h.meta.part, h.meta.tokens, h.data_start)
        try:
            return _native.load(file.fd, ops, table, first, last, h.meta.position, sums, token)
        except ValueError as e:
            if not e.args or e.args[0] != "checksum":
                raise
            raise ChunkCorrupt(file.name, "checksum", f"tensor {e.args[1]} head {e.args[2]}") from None

    def decode(self, parts: Sequence[CodedRows], table: Table, token: _native.CancelToken) -> None:
        """As `load`, from the coded forms of several parts.

        ChunkCorrupt ``checksum`` or ``stream``; OSError of a read; InterruptedError once ``token`` is cancelled.
        """
        todo = []
        for file, manifest, first, last in parts:
            h = file.header
            ops = self._kv.ops(manifest, h.meta.part, h.meta.tokens)
            todo.append(h.arguments(file.fd, ops, first, last))
        try:
            _native.load_coded(todo, table, token)
        except ValueError as e:
            if not e.args or e.args[0] not in {"checksum", "stream"}:
                raise
            reason, layer, head, bad, *why = e.args
            where = " ".join([f"layer {layer} head {head}", *why])
            raise ChunkCorrupt(parts[bad][0].header.name, reason, where) from None

    def gather(
        self, manifest: Manifest, part: PartId, tokens: int, position: int, table: Table, out: Bytes
    ) -> Callable[[], None] | None:
        """Copy a whole part from blocks into ``out``. Returns what to call before reading ``out``: nothing here."""
        _native.gather(self._kv.ops(manifest, part, tokens), table, 0, tokens, position, out)
        return None

    def order(self) -> None:
        """Let what the engine does next come after the gathers so far: they are done."""


class DeviceCopy:
    """For KV on a GPU: pinned memory, and streams beside the engine's."""

    allocate = staticmethod(pinned)

    def __init__(self, kv: PagedKV) -> None:
        self._kv = kv
        self._ring = Staging(LOAD_BYTES, pinned)
        self._in, self._out = torch.cuda.Stream(kv.device), torch.cuda.Stream(kv.device)

    def load(
        self,
        file: PartFile,
        manifest: Manifest,
        table: Table,
        first: int,
        last: int,
        sums: bytes | None,
        token: _native.CancelToken,
    ) -> int:
        """As `HostCopy.load`. DeadlineExceeded if no pinned memory gets free."""
        h = file.header
        with self._ring.lend(h.layout.nbytes) as data:
            read_into(file, data)
            if sums is not None and _native.sums(data, h.layout.bounds) != sums:
                raise ChunkCorrupt(file.name, "checksum", "a tensor differs")
            return self._push(manifest, h.meta, table, first, last, data, token)

    def decode(self, parts: Sequence[CodedRows], table: Table, token: _native.CancelToken) -> None:
        """As `HostCopy.decode`, but that a whole part is decoded, by the CPU, before its first layer goes to the GPU.
        ChunkCorrupt ``truncated`` too; DeadlineExceeded if no pinned memory gets free."""
        for file, manifest, first, last in parts:
            h = file.header
            with self._ring.lend(h.layout.nbytes) as data:
                h.decode(file.read(), data.data)
                self._push(manifest, h.meta, table, first, last, data, token)

    def _push(
        self,
        manifest: Manifest,
        meta: PartMeta,
        table: Table,
        first: int,
        last: int,
        data: Bytes,
        token: _native.CancelToken,
    ) -> int:
        if not token.acquire():
            raise InterruptedError
        try:
            with torch.cuda.stream(self._in):
                self._in.wait_stream(self._out)  # a gather may still read blocks that were freed since
                moving = torch.from_numpy(data).to(self._kv.device, non_blocking=True)
                moved = move_part(
                    self._kv, manifest, meta.part, meta.tokens, meta.position, table, first, last, moving, scatter_rows
                )
            self._in.synchronize()
        finally:
            token.release()
        token.add_progress(moved)
        return moved

    def gather(
        self, manifest: Manifest, part: PartId, tokens: int, position: int, table: Table, out: Bytes
    ) -> Callable[[], None] | None:
        """As `HostCopy.gather`, on a stream of its own after what the engine has launched so far; ``out`` is pinned."""
        self._out.wait_stream(torch.cuda.current_stream(self._kv.device))
        with torch.cuda.stream(self._out):
            data = torch.empty(out.nbytes, dtype=torch.uint8, device=self._kv.device)
            move_part(self._kv, manifest, part, tokens, position, table, 0, tokens, data, gather_rows)
            torch.from_numpy(out).copy_(data, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._out)
        ready: Callable[[], None] = done.synchronize
        return ready

    def order(self) -> None:
        """Let the engine's stream wait for the gathers so far: its next step may reuse their blocks."""
        torch.cuda.current_stream(self._kv.device).wait_stream(self._out)


Copy = HostCopy | DeviceCopy


def move_part(
    kv: PagedKV,
    manifest: Manifest,
    part: PartId,
    tokens: int,
    position: int,
    table: Table,
    first: int,
    last: int,
    data: torch.Tensor,
    move: Callable[[torch.Tensor, torch.Tensor, Rows], None],
) -> int:
    """Move rows [first, last) of every tensor of a part between paged views and ``data``, its bytes on their device.

    Returns the bytes moved.
    """
    tensors = iter(layout(manifest, part, tokens).tensors)
    rows: dict[tuple[int, int], Rows] = {}
    moved = 0
    for layer in kv.views(part):
        for view, spec in zip((layer.k, layer.v), tensors, strict=False):
            where = (layer.group, view.shape[2])
            if where not in rows:
                rows[where] = rows_of(table[layer.group], view.shape[2], position, first, last, kv.device)
            move(view, data[spec.start : spec.start + spec.nbytes].view(view.dtype).view(spec.shape), rows[where])
            moved += len(rows[where].rows) * spec.nbytes // tokens
    return moved


def read_into(file: PartFile, buffer: Bytes) -> None:
    """Read the data of a part. ChunkCorrupt ``truncated``; OSError."""
    view, at = memoryview(buffer.data), 0
    while at < len(view):
        got = os.preadv(file.fd, [view[at:]], file.header.data_start + at)
        if got == 0:
            raise ChunkCorrupt(file.name, "truncated", "the file ends inside its data")
        at += got
