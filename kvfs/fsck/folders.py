"""The folders of a store, and what lies in them: marker, namespaces and manifests, leaf folders, temp files."""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from functools import partial

from kvfs import marker
from kvfs.errors import IdentityError, KvfsError, NamespaceNotFound, NotAStore
from kvfs.files import DIR_MODE, OPEN_DIR, from_os_error, is_damage, make_dir, read_small
from kvfs.fsck.findings import Finding, Repairs
from kvfs.fsck.parts import Parts, Place
from kvfs.names import is_leaf, is_ns, is_temp, leaf_name, parse_file_name
from kvfs.quarantine import FOLDER
from kvfs.store import MANIFEST, TEMPS
from kvfs.tenants import FOLDER as TENANTS
from kvfs.trash import FOLDER as TRASH

__all__ = ["check_folder", "check_temp", "opened", "read_marker", "walk", "write_marker"]

DERIVED = ".kvfs"
IGNORED = ".nfs"
"""What such names begin with is a file that an NFS client still holds open after its removal."""


def read_marker(repairs: Repairs) -> str | None:
    """What is wrong with the marker; None if nothing is.

    NotAStore if there is none, and nothing else that shows that the folder was a store; IdentityError for another
    format, which is not ours to repair.
    """
    try:
        found = marker.found(repairs.root)
    except FileNotFoundError:
        if _was_store(repairs):
            return "missing"
        raise NotAStore(repairs.store.path, repairs.store.path) from None
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and not is_damage(e):
            raise from_os_error(e, repairs.store.path / marker.NAME) from e
        return f"damaged ({e})"
    if found != marker.FORMAT:
        raise IdentityError(f"{repairs.store.path} has format {found}, this version repairs {marker.FORMAT}")
    return None


def _was_store(repairs: Repairs) -> bool:
    """Whether a folder without a marker holds a sound namespace, or nothing that an empty store would not."""
    names = [name for name in os.listdir(repairs.root) if not is_temp(name)]
    return bool(repairs.store.namespaces()) or (DERIVED in names and set(names) <= {DERIVED, FOLDER, TRASH})


def write_marker(repairs: Repairs, wrong: str | None) -> Iterator[Finding]:
    """Write the marker anew if something is ``wrong`` with it."""
    if wrong is None:
        return

    def do() -> None:
        repairs.store.lost.take(repairs.root, marker.NAME, marker.NAME, "marker", marker.NAME)
        marker.write(repairs.root)

    yield repairs.repair("marker", marker.NAME, wrong, "written anew", do)


def walk(repairs: Repairs, parts: Parts) -> Iterator[Finding]:
    """Check everything but ``.kvfs``; each file that may be a part goes through ``parts``."""
    yield from _lost_and_found(repairs)
    yield from check_folder(repairs, repairs.root, TRASH, needed=False)
    spaces = []
    for name in sorted(os.listdir(repairs.root)):
        if is_ns(name):
            spaces.append(name)
        elif is_temp(name):
            yield from check_temp(repairs, repairs.root, name)
        elif name not in (marker.NAME, DERIVED, FOLDER, TRASH, TENANTS):
            yield from _stray(parts, repairs.root, name)
    for name in spaces:
        yield from _namespace(repairs, parts, name)


def _lost_and_found(repairs: Repairs) -> Iterator[Finding]:
    yield from check_folder(repairs, repairs.root, FOLDER, needed=False)
    with opened(repairs.root, FOLDER) as (lost, names):
        for name in names:
            path, remove = f"{FOLDER}/{name}", partial(os.unlink, name, dir_fd=lost)
            if is_temp(name):
                yield from check_temp(repairs, lost, path)
            elif (of := name.removesuffix(".json")) != name and of not in names and _is_note(lost, name):
                yield repairs.repair("note", path, "what it is about is gone", "removed", remove)


def _is_note(lost: int, name: str) -> bool:
    """Whether a file is one that `Quarantine` writes; anybody may have put a .json here."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        note = json.loads(read_small(lost, name))
        return isinstance(note, dict) and {"path", "reason", "time"} <= note.keys()
    return False


def _namespace(repairs: Repairs, parts: Parts, name: str) -> Iterator[Finding]:
    ns, st = bytes.fromhex(name), os.stat(name, dir_fd=repairs.root, follow_symlinks=False)
    if not stat.S_ISDIR(st.st_mode):
        yield repairs.move_away(
            "foreign", name, f"{stat.filemode(st.st_mode)} where a namespace should be", repairs.root
        )
        return
    try:
        repairs.store.manifest(ns)
    except (IdentityError, NamespaceNotFound) as e:
        yield from _without_manifest(repairs, name, st, e)
        return
    except KvfsError as e:
        yield repairs.report("unreadable", name, str(e))
        return
    yield from _mode(repairs, repairs.root, name, st)
    with opened(repairs.root, name) as (folder, names):
        yield from _temps(repairs, parts, folder, name)
        for each in names:
            if is_leaf(each):
                yield from _leaf(repairs, parts, folder, f"{name}/{each}", ns)
            elif each not in (MANIFEST, TEMPS):
                yield from _stray(parts, folder, f"{name}/{each}")


def _without_manifest(repairs: Repairs, name: str, st: os.stat_result, error: Exception) -> Iterator[Finding]:
    """A namespace whose manifest cannot be believed: nobody can say what its parts are."""
    with opened(repairs.root, name) as (_, inside):
        pass
    if isinstance(error, NamespaceNotFound) and set(inside) <= {TEMPS}:
        if repairs.is_old(st.st_mtime):  # it was made, and its maker died before it wrote the manifest

            def do() -> None:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(f"{name}/{TEMPS}", dir_fd=repairs.root)
                os.rmdir(name, dir_fd=repairs.root)

            yield repairs.repair("half-made", name, "an empty namespace without a manifest", "removed", do)
        return
    detail = "no manifest" if isinstance(error, NamespaceNotFound) else str(error)
    yield repairs.move_away("manifest", name, detail, repairs.root)


def _temps(repairs: Repairs, parts: Parts, folder: int, ns: str) -> Iterator[Finding]:
    yield from check_folder(repairs, folder, f"{ns}/{TEMPS}", needed=True)
    with opened(folder, TEMPS) as (temps, names):
        for name in names:
            path = f"{ns}/{TEMPS}/{name}"
            if is_temp(name):
                yield from check_temp(repairs, temps, path)
                with contextlib.suppress(FileNotFoundError):
                    parts.names[os.stat(name, dir_fd=temps, follow_symlinks=False).st_ino] += 1
            else:
                yield from _stray(parts, temps, path)


def _leaf(repairs: Repairs, parts: Parts, folder: int, path: str, ns: bytes) -> Iterator[Finding]:
    yield from check_folder(repairs, folder, path, needed=False)
    leaf = os.path.basename(path)
    with opened(folder, leaf) as (fd, names):
        named = {name: found for name in names if (found := parse_file_name(name)) and leaf_name(found[0]) == leaf}
        for name in names:  # before those in their place, of which they may be second names
            if name not in named:
                yield from _stray(parts, fd, f"{path}/{name}")
        for name, found in named.items():
            yield from parts.settle(fd, f"{path}/{name}", Place(ns, *found))


def _stray(parts: Parts, dir_fd: int, path: str) -> Iterator[Finding]:
    """Something whose name does not belong where it is; perhaps a part all the same."""
    if not os.path.basename(path).startswith(IGNORED):
        yield from parts.settle(dir_fd, path, None)


def check_temp(repairs: Repairs, dir_fd: int, path: str) -> Iterator[Finding]:
    """The last component of ``path`` has the name of a file being written; its writer may have died."""
    name = os.path.basename(path)
    with contextlib.suppress(FileNotFoundError):
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if not stat.S_ISREG(st.st_mode):
            yield repairs.move_away("foreign", path, stat.filemode(st.st_mode), dir_fd)
        elif repairs.is_old(st.st_mtime):
            remove = partial(os.unlink, name, dir_fd=dir_fd)
            yield repairs.repair("temp", path, "its writer is gone", "removed", remove)


def check_folder(repairs: Repairs, dir_fd: int, path: str, needed: bool) -> Iterator[Finding]:
    """See that the last component of ``path``, in the folder ``dir_fd``, is a folder with the right mode; ``needed``:
    make it if it is missing."""
    name = os.path.basename(path)
    try:
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        if needed:
            yield repairs.repair("tmp-folder", path, "missing", "made", partial(make_dir, name, dir_fd))
        return
    if stat.S_ISDIR(st.st_mode):
        yield from _mode(repairs, dir_fd, path, st)
        return

    def do() -> None:
        aside = f"{name}.{secrets.token_hex(4)}"  # `take` may be about to make the folder in question
        os.rename(name, aside, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        repairs.store.lost.take(dir_fd, aside, name, "foreign", path, detail=detail)
        make_dir(name, dir_fd)

    detail = f"{stat.filemode(st.st_mode)} where a folder should be"
    yield repairs.repair("foreign", path, detail, "moved to lost+found", do)


def _mode(repairs: Repairs, dir_fd: int, path: str, st: os.stat_result) -> Iterator[Finding]:
    """A folder of a store is its owner's to use, and nobody's business outside its group."""
    if st.st_mode & 0o007 or st.st_mode & 0o700 != 0o700:

        def do() -> None:
            fd = os.open(os.path.basename(path), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
            try:
                os.chmod(f"/proc/self/fd/{fd}", DIR_MODE)
            finally:
                os.close(fd)

        yield repairs.repair("mode", path, f"mode {st.st_mode & 0o7777:04o}", f"set to {DIR_MODE:04o}", do)


@contextlib.contextmanager
def opened(dir_fd: int, name: str) -> Iterator[tuple[int, list[str]]]:
    """A folder and the names in it, in order; none if it is not a folder, or not ours to read."""
    try:
        fd = os.open(name, OPEN_DIR, dir_fd=dir_fd)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        yield -1, []
        return
    try:
        yield fd, sorted(os.listdir(fd))
    finally:
        os.close(fd)
