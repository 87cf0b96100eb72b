"""One file at a time: is it a sound part, is it where it belongs, and has it one name and the right mode."""

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from kvfs.chunk import open_part, read_header
from kvfs.coded import open_coded, read_coded_header
from kvfs.errors import ChunkCorrupt, ChunkNotFound, IdentityError, NamespaceNotFound
from kvfs.files import OPEN_DIR, OPEN_FILE, make_dir
from kvfs.fsck.findings import Finding, Repairs
from kvfs.identity import PartId
from kvfs.names import CODED, SUFFIX, leaf_name, part_name, part_path
from kvfs.store import FILE_MODE

__all__ = ["Chunk", "Parts", "Place"]

_MODES = (FILE_MODE, 0o400)
_COPY = 1 << 20


class Place(NamedTuple):
    """Where a part belongs, in its form."""

    ns: bytes
    key: bytes
    part: PartId
    coded: bool = False

    @property
    def path(self) -> str:
        """Relative to the store."""
        return f"{self.ns.hex()}/{part_path(self.key, self.part, self.coded)}"


@dataclass(slots=True)
class Chunk:
    """What the headers of a chunk's parts say, which of them are there in either form and which in their coded one, and
    when the newest of these got its name (Unix seconds)."""

    parent: bytes
    position: int
    mask: int = 0
    raw: int = 0
    coded: int = 0
    size: int = 0
    newest: float = 0.0


class Parts:
    """Settles files, and remembers the chunks they make up.  ``data``: compare the checksums of all payload."""

    def __init__(self, repairs: Repairs, data: bool) -> None:
        self._repairs, self._store, self._data = repairs, repairs.store, data
        self.chunks: dict[bytes, dict[bytes, Chunk]] = {}
        self.names: Counter[int] = Counter()
        """By inode, names beside a part's own that are known: temp files of publishers at work, and in a dry run
        what would have been removed."""
        self.count = self.bytes = 0

    def settle(self, dir_fd: int, path: str, place: Place | None) -> Iterator[Finding]:
        """See to the last component of ``path``, in the folder ``dir_fd``.  ``place`` is where its name says that it
        belongs; None for a name that is not a part's."""
        name = os.path.basename(path)
        label = f"{place.ns.hex()[:12]}.{name}" if place else name
        try:
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            fd = os.open(name, OPEN_FILE, dir_fd=dir_fd) if stat.S_ISREG(st.st_mode) else -1
        except FileNotFoundError:  # gone meanwhile
            return
        except PermissionError as e:
            yield self._repairs.report("unreadable", path, e.strerror or "not ours to read")
            return
        if fd < 0:
            kind = "not-a-file" if place else "foreign"
            yield self._repairs.move_away(kind, path, stat.filemode(st.st_mode), dir_fd, label)
            return
        try:
            home, chunk = self._identify(fd, name)
            yield from self._settle_part(dir_fd, path, fd, place, home, chunk)
        except ChunkNotFound:  # gone meanwhile, by another host
            return
        except ChunkCorrupt as e:
            kind, detail = (e.reason, str(e.args[2])) if place else ("foreign", f"no part: {e.args[2]}")
            yield self._repairs.move_away(kind, path, detail, dir_fd, label)
        finally:
            os.close(fd)

    def _identify(self, fd: int, name: str) -> tuple[Place, Chunk]:
        """Where a file belongs by its own header, which its checksum vouches for; ChunkCorrupt if it is no part of
        this store."""
        try:
            coded, meta = False, read_header(fd, name).meta
        except ChunkCorrupt as e:
            try:
                coded, meta = True, read_coded_header(fd, name).meta
            except ChunkCorrupt as of_coded:
                raise (of_coded if name.endswith(CODED + SUFFIX) else e) from None
        try:
            manifest = self._store.manifest(meta.ns)
            opened = open_coded if coded else open_part
            with opened(os.dup(fd), manifest, meta.key, meta.part) as file:
                if self._data:
                    file.verify()
        except NamespaceNotFound:
            raise ChunkCorrupt(name, "wrong-ns", f"its namespace {meta.ns.hex()[:12]} is not here") from None
        except IdentityError as e:
            raise ChunkCorrupt(name, "wrong-part", str(e)) from None
        return Place(meta.ns, meta.key, meta.part, coded), Chunk(meta.parent, meta.position)

    def _settle_part(
        self, dir_fd: int, path: str, fd: int, place: Place | None, home: Place, chunk: Chunk
    ) -> Iterator[Finding]:
        st = os.fstat(fd)
        if place != home:
            finding, homeless = self._bring_home(dir_fd, path, st, home)
            yield finding
            if homeless:
                return
        if st.st_nlink > 1 + self.names[st.st_ino] and self._is_linked(fd, home):
            detail = f"{st.st_nlink} names lead to it"
            yield self._repairs.repair(
                "hard-link", home.path, detail, "replaced by a copy", lambda: self._separate(fd, home)
            )
        elif st.st_mode & 0o7777 not in _MODES:
            detail = f"mode {st.st_mode & 0o7777:04o}"
            yield self._repairs.repair(
                "mode", home.path, detail, f"set to {FILE_MODE:04o}", lambda: os.fchmod(fd, FILE_MODE)
            )
        self._remember(home, chunk, st)

    def _is_linked(self, fd: int, home: Place) -> bool:
        """Whether a part has names that are no publisher's, who may be at work just now."""
        temps = self._store.second_names(home.ns, os.fstat(fd).st_ino)
        return os.fstat(fd).st_nlink > 1 + len(temps)

    def _bring_home(self, dir_fd: int, path: str, st: os.stat_result, home: Place) -> tuple[Finding, bool]:
        """Move a part to where it belongs, unless there is one; tells whether there is."""
        name, repairs = os.path.basename(path), self._repairs
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            there = os.stat(home.path, dir_fd=repairs.root, follow_symlinks=False)
            if os.path.samestat(there, st):
                self.names[st.st_ino] += repairs.dry_run
                second, remove = f"a second name of {home.path}", partial(os.unlink, name, dir_fd=dir_fd)
                return repairs.repair("hard-link", path, second, "removed", remove), True
            return repairs.move_away("duplicate", path, f"{home.path} is there too", dir_fd), True
        known = self.chunks.get(home.ns, {}).get(home.key)
        forms = (known.coded if home.coded else known.raw) if known else 0
        if forms & self._store.manifest(home.ns).bit(home.part):  # in a dry run
            return repairs.move_away("duplicate", path, f"{home.path} is there too", dir_fd), True

        def do() -> None:
            with self._leaf(home) as leaf:
                name_there = part_name(home.key, home.part, home.coded)
                os.link(name, name_there, src_dir_fd=dir_fd, dst_dir_fd=leaf, follow_symlinks=False)
            os.unlink(name, dir_fd=dir_fd)

        return repairs.repair("misplaced", path, "a part out of its place", f"moved to {home.path}", do), False

    @contextlib.contextmanager
    def _leaf(self, home: Place) -> Iterator[int]:
        """The folder of a part, made if need be."""
        ns = os.open(home.ns.hex(), OPEN_DIR, dir_fd=self._repairs.root)
        try:
            make_dir(leaf_name(home.key), ns)
            leaf = os.open(leaf_name(home.key), OPEN_DIR, dir_fd=ns)
            try:
                yield leaf
            finally:
                os.close(leaf)
        finally:
            os.close(ns)

    def _separate(self, fd: int, home: Place) -> None:
        """Put a checked copy in place of a part that has other names, which may be anybody's."""
        ns, key, part, coded = home
        temp = self._store.reserve(ns)
        try:
            at = 0
            while n := os.copy_file_range(fd, temp.fd, _COPY, at, at):
                at += n
            opened = open_coded if coded else open_part
            with opened(os.dup(temp.fd), self._store.manifest(ns), key, part) as copy:
                copy.verify()
        except BaseException:
            self._store.discard(ns, temp.name)
            raise
        finally:
            os.close(temp.fd)
        with self._leaf(home) as leaf:
            os.unlink(part_name(key, part, coded), dir_fd=leaf)
        self._store.publish(ns, temp.name, key, part, coded)

    def _remember(self, home: Place, chunk: Chunk, st: os.stat_result) -> None:
        rows = self.chunks.setdefault(home.ns, {})
        row = rows.setdefault(home.key, chunk)
        bit = self._store.manifest(home.ns).bit(home.part)
        row.mask |= bit
        if home.coded:
            row.coded |= bit
        else:
            row.raw |= bit
        row.size += st.st_size
        row.newest = max(row.newest, st.st_ctime)
        self.count += 1
        self.bytes += st.st_size
