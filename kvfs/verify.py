"""Which parts are known to be whole, and the way of a new or a doubtful part: checked, then admitted or put away.

A part is read in full once per boot and host, or at every open if so configured.  A file that has been checked is
recognised by device, inode, size, mtime and ctime; ctime changes with anything done to it and cannot be set back.
"""

import errno
import fcntl
import hashlib
import itertools
import os
import signal
import struct
import threading
from pathlib import Path
from typing import NamedTuple

from kvfs import _native, files
from kvfs.chunk import PartMeta, open_part
from kvfs.codec import FORMS
from kvfs.coded import CodedFile, form_of, open_coded, open_stored
from kvfs.errors import ChunkCorrupt, ChunkNotFound, StoreBusy, StoreFull
from kvfs.identity import PartId
from kvfs.network import is_network
from kvfs.store import Store, Temp

__all__ = ["Admitted", "Opened", "Verifier", "read_state"]

_MAGIC = b"kvfs-verified/1\n"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MAX_REMEMBERED = 1 << 20
"""Files remembered; the oldest go first, and are read again when next opened."""
_NO_FILE_LEASES = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)


class Opened(NamedTuple):
    """A part open for reading: its descriptor, whether it is known to be whole, its size in bytes, the inode of its
    file in the store, and the form of what the descriptor gives."""

    fd: int
    verified: bool
    size: int
    inode: int
    form: str = "raw"


class Admitted(NamedTuple):
    """A part published: False for ``created`` if it was there already; bytes of its file; what its header says."""

    created: bool
    size: int
    meta: PartMeta


class Verifier:
    """The verification state of one store.  Thread-safe.  ``always``: trust nothing that was checked before."""

    def __init__(self, store: Store, always: bool = False) -> None:
        self.store = store
        self._always, self._is_network = always, is_network(store.path)
        self._good: dict[int, int] = {}  # the n-th check, in order
        self._checks = itertools.count()
        self._lock = threading.Lock()

    def is_verified(self, st: os.stat_result) -> bool:
        """Whether this very state of the file has been read in full and found whole."""
        return not self._always and _fingerprint(st) in self._good

    def mark(self, st: os.stat_result) -> None:
        """The file in this state has been read in full and is whole."""
        state = _fingerprint(st)
        with self._lock:
            self._good.pop(state, None)
            self._good[state] = next(self._checks)
            if len(self._good) > MAX_REMEMBERED:
                del self._good[next(iter(self._good))]

    def age(self, st: os.stat_result) -> int:
        """Sorts files by when they were last found whole: the never, then the longest ago first."""
        return self._good.get(_fingerprint(st), -1)

    def open(self, ns: bytes, key: bytes, part: PartId, coded: bool = False) -> Opened:
        """Open a part in one form without reading it, for somebody who checks what he reads; raises as
        `Store.open_part`, and of the coded form as `form_of`."""
        fd = self.store.open_part(ns, key, part, coded)
        try:
            st, form = os.fstat(fd), form_of(fd, self.store.manifest(ns), key, part) if coded else FORMS[0]
            return Opened(fd, self.is_verified(st), st.st_size, st.st_ino, form)
        except BaseException:
            os.close(fd)
            raise

    def open_coded(self, ns: bytes, key: bytes, part: PartId) -> CodedFile:
        """Open a part in its coded form and read header and index; ChunkNotFound, ChunkCorrupt."""
        return open_coded(self.store.open_part(ns, key, part, coded=True), self.store.manifest(ns), key, part)

    def check(self, fd: int, ns: bytes, key: bytes, part: PartId, coded: bool = False) -> None:
        """Read an open part in full and mark it.  ChunkCorrupt says what is wrong."""
        before, manifest = os.fstat(fd), self.store.manifest(ns)
        opened = open_coded if coded else open_part
        with opened(os.dup(fd), manifest, key, part) as file:
            file.verify()
        self.mark(before)

    def peek(self, ns: bytes, key: bytes, part: PartId, coded: bool = False) -> tuple[PartMeta, int]:
        """What the header of a part's file says, and its size, its data unread.  ChunkNotFound, ChunkCorrupt."""
        manifest = self.store.manifest(ns)
        opened = open_coded if coded else open_part
        with opened(self.store.open_part(ns, key, part, coded), manifest, key, part) as file:
            return file.header.meta, os.fstat(file.fd).st_size

    def vouch(self, ns: bytes, key: bytes, part: PartId) -> None:
        """A reader has read the part in full, as it is stored, and found it whole."""
        with open_stored(self.store, ns, key, part) as file:
            self.mark(os.fstat(file.fd))

    def recheck(self, ns: bytes, key: bytes, part: PartId) -> dict[bool, ChunkCorrupt | None]:
        """Read all files of a part that somebody found damaged.  By form (True: coded), what is wrong; nothing for one
        that is not there."""
        found: dict[bool, ChunkCorrupt | None] = {}
        for coded in (False, True):
            try:
                fd = self.store.open_part(ns, key, part, coded)
                try:
                    self.check(fd, ns, key, part, coded)
                    found[coded] = None
                finally:
                    os.close(fd)
            except ChunkNotFound:
                pass
            except ChunkCorrupt as e:
                found[coded] = e
        return found

    def quarantine(self, ns: bytes, key: bytes, part: PartId, error: ChunkCorrupt, coded: bool = False) -> None:
        """Move a damaged form of a part to ``lost+found``.  On a store that cannot be written it stays, unused."""
        try:
            self.store.quarantine(ns, key, part, error.reason, coded)
        except OSError as e:
            if e.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise files.from_os_error(e, self.store.path) from e

    # --- new parts ---

    def reserve(self, ns: bytes, nbytes: int) -> Temp:
        """A temp file for a part of ``nbytes``; StoreFull if the filesystem has no room for it."""
        space = os.statvfs(self.store.path)
        if space.f_bavail * space.f_frsize < nbytes:
            raise StoreFull(f"a part of {nbytes} bytes in {self.store.path}")
        return self.store.reserve(ns)

    def admit(self, ns: bytes, temp: str, key: bytes, part: PartId, coded: bool = False) -> Admitted:
        """Check a temp file in full and publish it, in its form; it is gone afterwards, whatever happens.

        StoreBusy while anybody can still write to it, ChunkCorrupt if it does not hold that part, undamaged;
        IdentityError, StoreFull, StoreReadOnly, ChunkNotFound (no such temp file).
        """
        try:
            self.store.manifest(ns).bit(part)
            fd = self.store.open_temp(ns, temp)
            try:
                _seal(fd, f"{key.hex()}.{part}", self._is_network)
                opened = open_coded if coded else open_part
                with opened(os.dup(fd), self.store.manifest(ns), key, part) as file:
                    before = os.fstat(fd)
                    file.verify()
                    meta = file.header.meta
                created = self.store.publish(ns, temp, key, part, coded)
                after = os.fstat(fd)
                if created and after.st_mtime_ns == before.st_mtime_ns:
                    self.mark(after)  # the link has changed its ctime
                return Admitted(created, after.st_size, meta)
            finally:
                os.close(fd)  # ends the file lease too
        finally:
            self.store.discard(ns, temp)

    # --- across restarts ---

    def save(self, path: Path) -> None:
        """Write the state for a restart in the same boot; derived data, safe to delete at any time."""
        with self._lock:
            good = list(self._good)
        body = _boot_id() + struct.pack(f"<{len(good)}Q", *good)
        files.replace(path, _MAGIC + struct.pack("<Q", _native.xxh3_64(body)) + body)

    def load(self, path: Path) -> bool:
        """Read the state; False, and nothing is verified, unless it is whole and of this boot."""
        body, boot = read_state(path), _boot_id()
        if body is None or not body.startswith(boot):
            return False
        count = (len(body) - len(boot)) // 8
        good = struct.unpack_from(f"<{count}Q", body, len(boot))
        with self._lock:
            self._good = dict(zip(itertools.islice(good, MAX_REMEMBERED), self._checks, strict=False))
        return True


def read_state(path: Path) -> bytes | None:
    """What a file that `Verifier.save` wrote holds; None unless it is there and whole."""
    return files.read_sealed(path, _MAGIC)


def _boot_id() -> bytes:
    return _BOOT_ID.read_bytes().strip()


def _fingerprint(st: os.stat_result) -> int:
    state = struct.pack("<QQqqq", st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little")


def _seal(fd: int, name: str, is_network: bool) -> None:
    """Make the file read-only, and prove that nobody holds it writable; StoreBusy if somebody does.

    The proof is a read lease (``F_SETLEASE``): the kernel refuses it while a writable descriptor or map exists,
    and makes anyone who opens the file for writing wait as long as ``fd`` is open.  Network filesystems
    have no such leases (NFS refuses one to any file it has no delegation of); there the volume's writers are trusted.
    """
    os.fchmod(fd, 0o440)
    if is_network:
        return
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # of a lease being broken; ignored, where SIGIO would kill
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as e:
        if e.errno == errno.EAGAIN:
            raise StoreBusy(f"part {name}", "its writer, who has not closed or unmapped it") from None
        if e.errno not in _NO_FILE_LEASES:
            raise files.from_os_error(e, Path(name)) from e
