"""Part files in the coded form: opened, checked, and decoded to a file of the raw form in memory.

The memory file is sealed: nobody, root included, can change or resize it, so it may be handed to anyone and passed
through by the kernel as a file on disk is.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
from types import TracebackType
from typing import Self

from kvfs import _native
from kvfs.chunk import MAX_HEADER, PartFile, encode_header, open_part
from kvfs.codec import FORMS, MAX_INDEX, CodedPart
from kvfs.errors import ChunkCorrupt, ChunkNotFound
from kvfs.files import SEALS, from_read_error
from kvfs.identity import Manifest, PartId
from kvfs.store import Store

__all__ = ["CodedFile", "form_of", "open_coded", "open_stored", "read_all", "read_coded_header", "reopen"]

NOEXEC_SEAL = 8
"""MFD_NOEXEC_SEAL, Linux 6.3: not to be executed, may be sealed."""
_START = re.compile(
    rb'.{8}{"__metadata__":{"kvfs\.format":"1","kvfs\.ns":"(?P<ns>[0-9a-f]{64})","kvfs\.key":"(?P<key>[0-9a-f]{64})",'
    rb'[^{}]*"kvfs\.part":"(?P<part>[a-z0-9.]+)","kvfs\.form":"(?P<form>[a-z0-9.-]+)",'
    rb'"kvfs\.fidelity":"(?P<fidelity>[a-z]+)"',
    re.DOTALL,
)
_STARTS_WITHIN = 1024
"""What says which part a file is, and the bytes it lies within."""
_FIRST = 16384
"""Bytes that hold header and index of nearly every coded part."""


class CodedFile:
    """An open coded part whose header and index have been checked; ``header`` says what they hold."""

    def __init__(self, fd: int, manifest: Manifest, header: CodedPart) -> None:
        self.fd, self.header, self._manifest = fd, header, manifest

    def raw_header(self) -> bytes:
        """The bytes before the data of the raw form that this decodes to."""
        source = "raw" if self.header.level.lossless else self.header.form
        return encode_header(self._manifest, self.header.meta, self.header.sums, source)

    def raw_size(self) -> int:
        """Bytes of the raw form's file."""
        return len(self.raw_header()) + self.header.layout.nbytes

    def read(self) -> bytearray:
        """The whole file, by ``pread``.  ChunkCorrupt ``truncated`` or ``unreadable``."""
        return read_all(self.fd, self.header.file_size, self.header.name)

    def verify(self) -> None:
        """Read the file and compare the checksums of its streams.  ChunkCorrupt ``checksum``, and as `read`."""
        streams = memoryview(self.read())[self.header.data_start :]
        if _native.sums(streams, self.header.index.bounds) != self.header.index.layer_sums:
            raise ChunkCorrupt(self.header.name, "checksum", "the streams of a layer differ")

    def decode(self) -> int:
        """A read-only descriptor of a sealed file in memory with the raw form, header included.

        ChunkCorrupt as `read` and `CodedPart.decode`; OSError (ENOMEM, ENOSPC) where there is no memory for it.
        """
        header, nbytes = self.raw_header(), self.header.layout.nbytes
        coded = self.read()
        fd = _memory_file(len(header) + nbytes)
        try:
            with mmap.mmap(fd, len(header) + nbytes) as memory:
                memory[: len(header)] = header
                with memoryview(memory) as view, view[len(header) :] as data:
                    self.header.decode(coded, data)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            return reopen(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_coded(fd: int, manifest: Manifest, key: bytes, part: PartId) -> CodedFile:
    """Take over ``fd`` as the coded form of part ``part`` of chunk ``key``; closes it if that is not what it holds.

    ChunkCorrupt as `CodedPart.parse` and `CodedPart.expect`, and ``unreadable`` for an I/O error.
    """
    name = f"{key.hex()}.{part}"
    try:
        coded = read_coded_header(fd, name)
        coded.expect(manifest, key, part)
    except BaseException:
        os.close(fd)
        raise
    return CodedFile(fd, manifest, coded)


def read_coded_header(fd: int, name: str = "?") -> CodedPart:
    """Header and index of an open coded part; raises as `CodedPart.parse`, and ChunkCorrupt ``unreadable``."""
    try:
        return _parse(fd, _FIRST, name)
    except ChunkCorrupt as e:
        if e.reason != "truncated":
            raise
    return _parse(fd, MAX_HEADER + MAX_INDEX, name)


def form_of(fd: int, manifest: Manifest, key: bytes, part: PartId) -> str:
    """Which form an open file says that it is of part ``part`` of chunk ``key``; its index is not read, nor its header
    verified.  ChunkCorrupt ``header`` for what no coded part begins with, ``unreadable``, and as `CodedPart.expect`."""
    name = f"{key.hex()}.{part}"
    try:
        start = _START.match(os.pread(fd, _STARTS_WITHIN, 0))
    except OSError as e:
        raise from_read_error(e, name) from e
    if start is None or (form := start["form"].decode()) not in FORMS[1:]:
        raise ChunkCorrupt(name, "header", "not the header of a coded part")
    wanted = {"ns": manifest.ns_hex, "key": key.hex(), "part": str(part), "fidelity": manifest.fidelity}
    for what, wants in wanted.items():
        if (has := start[what].decode()) != wants:
            raise ChunkCorrupt(name, f"wrong-{what}", f"its header says {has}, expected {wants}")
    return form


def _parse(fd: int, nbytes: int, name: str) -> CodedPart:
    try:
        return CodedPart.parse(os.pread(fd, nbytes, 0), os.fstat(fd).st_size, name)
    except OSError as e:
        raise from_read_error(e, name) from e


def open_stored(store: Store, ns: bytes, key: bytes, part: PartId) -> PartFile | CodedFile:
    """A part in its raw form, or else in its coded one, its header checked.  ChunkNotFound if it has neither;
    ChunkCorrupt."""
    manifest = store.manifest(ns)
    with contextlib.suppress(ChunkNotFound):
        return open_part(store.open_part(ns, key, part), manifest, key, part)
    with contextlib.suppress(ChunkNotFound):
        return open_coded(store.open_part(ns, key, part, coded=True), manifest, key, part)
    return open_part(store.open_part(ns, key, part), manifest, key, part)  # it was brought back meanwhile, or is gone


def reopen(fd: int) -> int:
    """Another read-only descriptor of the same file, which the kernel counts by itself."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def read_all(fd: int, size: int, name: str) -> bytearray:
    """The whole of an open file of ``size`` bytes, by ``pread``.  ChunkCorrupt ``truncated`` or ``unreadable``."""
    out = bytearray(size)
    view, at = memoryview(out), 0
    try:
        while at < size:
            if (n := os.preadv(fd, [view[at:]], at)) == 0:
                raise ChunkCorrupt(name, "truncated", "the file ends inside its data")
            at += n
    except OSError as e:
        raise from_read_error(e, name) from e
    return out


def _memory_file(size: int) -> int:
    """A new file in memory with all its pages, so that writing through a map cannot fault."""
    try:
        fd = os.memfd_create("kvfs-part", os.MFD_CLOEXEC | NOEXEC_SEAL)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("kvfs-part", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o440)
        os.posix_fallocate(fd, 0, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
