"""The tree on disk: namespaces, part files, publishing without replacing, quarantine.  Works with no daemon.

Nothing is renamed over, truncated or edited in place: a part is written to a unique temp file of its
namespace and linked to its final name, where an existing name is success.  Every open goes by folder
descriptors with O_NOFOLLOW, so nothing planted in the tree leads outside it.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from kvfs import files, marker, retired, temps
from kvfs.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    IdentityError,
    KvfsError,
    NamespaceNotFound,
    NotAStore,
    StoreBusy,
    StoreReadOnly,
)
from kvfs.files import DIR_MODE, OPEN_DIR, OPEN_FILE, beneath, from_os_error, lock, make_dir, read_small, write_new
from kvfs.folders import Folders
from kvfs.identity import Manifest, PartId
from kvfs.names import is_leaf, is_ns, leaf_name, parse_file_name, part_name, part_path
from kvfs.network import is_network
from kvfs.quarantine import Quarantine
from kvfs.temps import TEMP_GRACE, TEMPS, Temp
from kvfs.trash import REQUESTS, Trash

__all__ = ["TEMPS", "TEMP_GRACE", "Found", "Store", "Temp"]

MANIFEST = "manifest.json"
FILE_MODE = 0o440
TRIES = 5
"""Times that a namespace is made for one who registers it, if it is retired each time."""


class Found(NamedTuple):
    """A file of a part met by `Store.scan`; ``coded``: it holds the coded form.  A part may have both forms."""

    key: bytes
    part: PartId
    entry: "os.DirEntry[str]"
    coded: bool


class Store:
    """A folder that holds namespaces.  ``durability`` is ``relaxed`` (no fsync) or ``full``.  ``trash`` keeps what was
    removed from a store that several hosts use, for a while; None on a local one."""

    def __init__(self, path: Path, root_fd: int, durability: str) -> None:
        self.path, self.durability = path, durability
        self._root = root_fd
        self.lost = Quarantine(root_fd)
        self.trash: Trash | None = None
        self._folders = Folders(root_fd, path)
        self._ns_dir = self._folders.get
        self._manifests: dict[bytes, Manifest] = {}
        self._lock_fd = -1

    # --- opening ---

    @classmethod
    def init(cls, path: str | os.PathLike[str], durability: str = "relaxed") -> Self:
        """Make a store in an empty or absent folder, or open the store that is there."""
        p = Path(path)
        try:
            p.mkdir(mode=DIR_MODE, parents=True, exist_ok=True)
            if not (p / marker.NAME).exists():
                fd = os.open(p, OPEN_DIR)
                try:
                    if not marker.is_free(fd):
                        raise StoreReadOnly(p, "the folder is not empty and not a store; name an empty one")
                    make_dir(".kvfs", fd)
                    marker.write(fd)
                finally:
                    os.close(fd)
        except OSError as e:
            raise from_os_error(e, p) from e
        return cls.open(p, durability)

    @classmethod
    def open(cls, path: str | os.PathLike[str], durability: str = "relaxed", shared: bool | None = None) -> Self:
        """Open an existing store; NotAStore if there is none.  ``shared``: whether other hosts use it too, by default
        if it lies on a network filesystem."""
        p = Path(path)
        try:
            fd = os.open(p, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if (stated := marker.found(fd)) != marker.FORMAT:
                    raise IdentityError(f"{p} has format {stated}, this version reads {marker.FORMAT}")
                shared = is_network(p) if shared is None else shared
            except BaseException:
                os.close(fd)
                raise
        except (FileNotFoundError, NotADirectoryError):
            raise NotAStore(p, p) from None
        except ValueError as e:
            if isinstance(e, KvfsError):
                raise
            raise IdentityError(f"{p / marker.NAME} is damaged ({e}); `kvfs fsck` writes it anew") from None
        except OSError as e:
            raise from_os_error(e, p) from e
        store = cls(p, fd, durability)
        store.trash = Trash(fd) if shared else None
        return store

    def close(self) -> None:
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):  # an owner's name in a lock that is free tells of a crash
                os.ftruncate(self._lock_fd, 0)
        self._folders.close()
        for fd in (self._root, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._root = self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def derived(self) -> Path:
        """The folder of derived, disposable files (index snapshot, lock)."""
        return self.path / ".kvfs"

    def lock_daemon(self, owner: str) -> None:
        """Become the one daemon of this store on this host until `close`; StoreBusy names the other."""
        name = f"daemon.{re.sub(r'[^A-Za-z0-9.-]', '_', socket.gethostname())}.lock"
        try:
            make_dir(".kvfs", self._root)
            self._lock_fd = lock(self.derived, name, owner)
        except BlockingIOError as e:
            raise StoreBusy(self.path, f"{e}; stop it first, or use its mount") from None
        except OSError as e:
            raise from_os_error(e, self.derived / name) from None

    # --- namespaces ---

    def namespaces(self) -> list[bytes]:
        """Digests of all namespaces with a readable manifest, in order."""
        out = []
        for name in sorted(filter(is_ns, files.names_in(self._root))):
            with contextlib.suppress(NamespaceNotFound, IdentityError):
                self._drop_stale(bytes.fromhex(name))
                self.manifest(bytes.fromhex(name))
                out.append(bytes.fromhex(name))
        return out

    def manifest(self, ns: bytes) -> Manifest:
        """The manifest of a namespace; NamespaceNotFound, or IdentityError if its digest is not its name."""
        if ns not in self._manifests:
            m = Manifest.from_json(self._manifest_file(ns)[1]["identity"])
            if m.ns != ns:
                raise IdentityError(f"{ns.hex()[:12]} has the manifest of {m.ns_hex[:12]}; `kvfs fsck` moves it away")
            self._manifests[ns] = m
        return self._manifests[ns]

    def info(self, ns: bytes) -> dict[str, Any]:
        """What people call the namespace (``name``, ``revision``, ...)."""
        return dict(self._manifest_file(ns)[1].get("info") or {})

    def manifest_text(self, ns: bytes) -> bytes:
        """The file of the manifest, which reads as one; NamespaceNotFound, IdentityError."""
        return self._manifest_file(ns)[0]

    def _manifest_file(self, ns: bytes) -> tuple[bytes, dict[str, Any]]:
        folder, text, d = self._ns_dir(ns), b"", None
        try:
            text = read_small(folder, MANIFEST)
            d = json.loads(text)
        except FileNotFoundError:
            raise NamespaceNotFound(ns.hex()[:12]) from None
        except OSError as e:
            if not files.is_damage(e):
                raise from_os_error(e, self.path / ns.hex()[:12]) from e
        except (ValueError, RecursionError):
            pass
        if not isinstance(d, dict) or not isinstance(d.get("identity"), dict):
            raise IdentityError(f"{ns.hex()[:12]}/{MANIFEST} is damaged; `kvfs fsck` moves it away")
        return text, d

    def register(self, manifest: Manifest, info: Mapping[str, Any] | None = None) -> bytes:
        """Make the namespace of a manifest, or find it.  The first to register writes ``info``."""
        ns = manifest.ns
        self._drop_stale(ns)
        try:
            with contextlib.suppress(NamespaceNotFound):
                if self.manifest(ns) == manifest:
                    return ns
            for _ in range(TRIES):
                if self._make(manifest, info or {}) and not self._drop_stale(ns):  # else retired meanwhile
                    return ns
        except OSError as e:
            raise from_os_error(e, self.path / manifest.ns_hex[:12]) from e
        raise NamespaceNotFound(ns.hex()[:12])

    def _make(self, manifest: Manifest, info: Mapping[str, Any]) -> bool:
        """Make a namespace or what it lacks; False if it is taken away meanwhile."""
        make_dir(manifest.ns_hex, self._root)
        text = json.dumps({"identity": manifest.to_json(), "info": dict(info)}, indent=1, sort_keys=True)
        try:
            ns_dir = self._ns_dir(manifest.ns)
            make_dir(TEMPS, ns_dir)
            with beneath(ns_dir, TEMPS) as folder:
                write_new(ns_dir, MANIFEST, text.encode(), folder)
        except (NamespaceNotFound, FileNotFoundError):
            self._forget(manifest.ns)
            return False
        self._manifests[manifest.ns] = manifest
        return True

    def retire(self, ns: bytes) -> None:
        """Remove a namespace with all its chunks: it is gone at once, and its bytes before this returns, unless they go
        to the trash."""
        self._ns_dir(ns)
        if self.trash is not None:
            if not self.trash.take(ns, self._root, ns.hex()):
                raise NamespaceNotFound(ns.hex()[:12])
            self._forget(ns)
            return
        trash = f".kvfs/{retired.name_for(ns.hex()[:12])}"
        try:
            os.rename(ns.hex(), trash, src_dir_fd=self._root, dst_dir_fd=self._root)
        except FileNotFoundError:
            raise NamespaceNotFound(ns.hex()[:12]) from None
        self._forget(ns)
        shutil.rmtree(self.path / trash, ignore_errors=True)

    def _drop_stale(self, ns: bytes) -> bool:
        """Forget a namespace that somebody has retired, before it is listed or anything is written to it; whether it
        was."""
        if stale := self._folders.is_stale(ns):
            self._forget(ns)
        return stale

    def _forget(self, ns: bytes) -> None:
        self._manifests.pop(ns, None)
        self._folders.forget(ns)

    # --- parts ---

    def open_part(self, ns: bytes, key: bytes, part: PartId, coded: bool = False) -> int:
        """A read-only descriptor of a part in its raw form, or in its coded one.  ChunkNotFound if it is not there in
        that form; ChunkCorrupt ``not-a-file``: not one regular file; OSError for what says nothing of the part, such as
        a want of descriptors."""
        name, root = part_name(key, part, coded), self._ns_dir(ns)
        try:
            with beneath(root, name[:3]) as leaf:
                fd = os.open(name, OPEN_FILE, dir_fd=leaf)
        except OSError as e:
            raise files.from_read_error(e, f"{key.hex()}.{part}") from None
        try:
            st = os.fstat(fd)
            if st.st_nlink > 1:
                for temp in self.second_names(ns, st.st_ino):
                    self.discard(ns, temp)
                st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode) or st.st_nlink > 1:
                what = f"{st.st_nlink} names, {stat.filemode(st.st_mode)}"
                raise ChunkCorrupt(f"{key.hex()}.{part}", "not-a-file", what)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def second_names(self, ns: bytes, ino: int) -> list[str]:
        """The temp names of a part whose publisher is between its link and its unlink, or died there."""
        return [name for name, st in temps.listed(self._ns_dir(ns)) if st.st_ino == ino]

    def masks(self, ns: bytes, keys: Sequence[bytes]) -> list[int]:
        """Presence mask of each chunk, by looking for its files in either form; 0 where nothing is stored."""
        root, manifest = self._ns_dir(ns), self.manifest(ns)
        there = functools.partial(os.access, mode=os.F_OK, dir_fd=root, follow_symlinks=False)

        def mask(key: bytes) -> int:
            names = ((p, part_path(key, p), part_path(key, p, coded=True)) for p in manifest.parts)
            return sum(manifest.bit(p) for p, raw, coded in names if there(raw) or there(coded))

        return [mask(key) for key in keys]

    def size(self, ns: bytes, key: bytes, part: PartId, coded: bool = False) -> int | None:
        """Bytes of a part's file of this form, as it is now; None if there is none."""
        absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with absent, beneath(self._root, ns.hex()) as folder, beneath(folder, leaf_name(key)) as leaf:
            return os.stat(part_name(key, part, coded), dir_fd=leaf, follow_symlinks=False).st_size
        return None

    def scan(self, ns: bytes) -> Iterator[Found]:
        """Every part file of a namespace, of both forms, by listing; foreign names are skipped."""
        for leaf in filter(is_leaf, files.names_in(self._ns_dir(ns))):
            yield from self.scan_leaf(ns, leaf)

    def scan_leaf(self, ns: bytes, leaf: str) -> Iterator[Found]:
        """The parts of one leaf folder."""
        absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with absent, beneath(self._ns_dir(ns), leaf) as fd, os.scandir(fd) as it:
            for e in it:
                if (found := parse_file_name(e.name)) and e.name.startswith(leaf):
                    yield Found(found.key, found.part, e, found.coded)

    # --- writing ---

    def reserve(self, ns: bytes) -> Temp:
        """A new empty temp file.  NamespaceNotFound, StoreFull, StoreReadOnly."""
        self._drop_stale(ns)
        try:
            return temps.create(self._ns_dir(ns))
        except OSError as e:
            raise from_os_error(e, self.path / ns.hex()[:12]) from e

    def open_temp(self, ns: bytes, temp: str) -> int:
        """A fresh read-only descriptor of a temp file, for checking it before `publish`."""
        try:
            with beneath(self._ns_dir(ns), TEMPS) as folder:
                return os.open(temps.checked(temp), OPEN_FILE, dir_fd=folder)
        except FileNotFoundError:
            raise ChunkNotFound(f"temp {temp}") from None
        except OSError as e:
            raise from_os_error(e, self.path / ns.hex()[:12]) from None

    def publish(self, ns: bytes, temp: str, key: bytes, part: PartId, coded: bool = False) -> bool:
        """Give a written and checked temp file its final name, in its form; the temp name is gone afterwards.

        True if it is new, False if the part was there already: its bytes are as good.  With ``full`` durability data
        and folder are on disk before this returns; after a failed fsync nothing is published.
        """
        root, name = self._ns_dir(ns), part_name(key, part, coded)
        self.manifest(ns).bit(part)
        created = True
        try:
            fd = self.open_temp(ns, temp)
            try:
                os.fchmod(fd, FILE_MODE)
                if self.durability == "full":
                    os.fsync(fd)
            finally:
                os.close(fd)
            make_dir(name[:3], root)
            with beneath(root, TEMPS) as folder, beneath(root, name[:3]) as leaf:
                try:
                    os.link(temp, name, src_dir_fd=folder, dst_dir_fd=leaf, follow_symlinks=False)
                except FileExistsError:
                    created = False
                if self.durability == "full":
                    os.fsync(leaf)
        except OSError as e:
            if isinstance(e, KvfsError):
                raise
            raise from_os_error(e, self.path / ns.hex()[:12]) from e
        finally:
            self.discard(ns, temp)
        return created

    def discard(self, ns: bytes, temp: str) -> None:
        """Remove a temp file; it may be gone already."""
        temps.discard(self._ns_dir(ns), temp)

    def remove(
        self,
        ns: bytes,
        key: bytes,
        parts: Sequence[PartId],
        forms: Sequence[bool] = (False, True),
        epoch: int = REQUESTS,
    ) -> None:
        """Unlink parts of a chunk, in both forms or (coded: True) one, or put them into the trash for the janitor of
        ``epoch``: StoreBusy if its time is over.  Open descriptors and maps of them go on working."""
        absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with absent, beneath(self._ns_dir(ns), leaf_name(key)) as leaf:
            for part, coded in itertools.product(parts, forms):
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                    if self.trash is not None:
                        self.trash.take(ns, leaf, part_name(key, part, coded), epoch)
                    else:
                        os.unlink(part_name(key, part, coded), dir_fd=leaf)

    def quarantine(self, ns: bytes, key: bytes, part: PartId, reason: str, coded: bool = False) -> bool:
        """Move one form of a part to ``lost+found/`` with its reason; False if another process already took it away."""
        return self.lost.take_part(self._ns_dir(ns), ns, key, part, reason, coded)

    def reap_temps(self, ns: bytes, older_than: float = TEMP_GRACE) -> int:
        """Remove temp files not written to for ``older_than`` seconds; returns how many."""
        return temps.reap(self._ns_dir(ns), older_than)
