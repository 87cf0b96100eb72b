"""``lost+found``: what was damaged or out of place, each with the reason, until somebody purges it.

An entry keeps its file or folder as it was; a note beside it says where that lay and what was wrong.  Damaged parts are
copies of what can be computed again: the oldest go by themselves when all take more than a limit.  Anything else may
be somebody's data, and stays.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
from typing import Any, NamedTuple

from kvfs.errors import ChunkNotFound
from kvfs.files import OPEN_DIR, make_dir, read_small, write_new
from kvfs.identity import PartId, canonical_json
from kvfs.names import is_temp, leaf_name, parse_file_name, part_name, part_path

__all__ = ["FOLDER", "LIMIT", "Kept", "Quarantine"]

FOLDER = "lost+found"
LIMIT = 1 << 30
"""Bytes of damaged parts that are kept where nothing else is configured."""
_KEEP = 0.9
"""Of the limit, how much is left after a purge, so that not every new entry needs one."""
_NOTE = ".json"
_LABEL_BYTES = 200
_PART = re.compile(r"[0-9a-f]{12}\.(.+)\.[0-9a-f]{8}")
UNKNOWN = "not recorded"


class Kept(NamedTuple):
    """An entry: its name in ``lost+found``, why it is there, the path in the store where it lay, since when (Unix
    seconds), its bytes, and whether it is a damaged part rather than something that may be anybody's."""

    name: str
    reason: str
    path: str
    time: float
    size: int
    is_part: bool


class Quarantine:
    """The ``lost+found`` of the store whose folder is open as ``root_fd``.  Thread-safe.

    ``limit``: bytes of damaged parts kept.  ``purged``: how many of them this process removed to stay within it.
    """

    def __init__(self, root_fd: int) -> None:
        self._root = root_fd
        self.limit = LIMIT
        self.purged = 0
        self._room = 0
        self._lock = threading.Lock()
        self._totals: tuple[int, tuple[int, int]] = (0, (0, 0))

    def take(self, dir_fd: int, name: str, label: str, reason: str, path: str, **about: str) -> bool:
        """Move ``name`` of the folder ``dir_fd``, which lay at ``path``, here under a name that begins with ``label``.

        False if it is gone already.  OSError if it cannot be moved.
        """
        make_dir(FOLDER, self._root)
        lost = os.open(FOLDER, OPEN_DIR, dir_fd=self._root)
        kept = f"{os.fsdecode(os.fsencode(label)[:_LABEL_BYTES])}.{secrets.token_hex(4)}"
        try:
            try:
                os.rename(name, kept, src_dir_fd=dir_fd, dst_dir_fd=lost)
            except FileNotFoundError:
                return False
            note = {**about, "path": path, "reason": reason, "time": time.time()}
            with contextlib.suppress(OSError):  # a full disk: the file itself is what matters
                write_new(lost, kept + _NOTE, canonical_json(note))
            self._make_room(lost, kept)
        finally:
            os.close(lost)
        return True

    def take_part(self, ns_dir: int, ns: bytes, key: bytes, part: PartId, reason: str, coded: bool = False) -> bool:
        """Move the damaged file of a part here from the folder of its namespace; otherwise as `take`."""
        try:
            leaf = os.open(leaf_name(key), OPEN_DIR, dir_fd=ns_dir)
        except (FileNotFoundError, NotADirectoryError):
            return False
        name, path = part_name(key, part, coded), f"{ns.hex()}/{part_path(key, part, coded)}"
        try:
            about = {"ns": ns.hex(), "key": key.hex(), "part": str(part)}
            return self.take(leaf, name, f"{ns.hex()[:12]}.{name}", reason, path, **about)
        finally:
            os.close(leaf)

    def _make_room(self, lost: int, kept: str) -> None:
        """Purge the oldest damaged parts if there are too many bytes of them."""
        with self._lock:
            self._room -= os.stat(kept, dir_fd=lost, follow_symlinks=False).st_size
            if self._room >= 0:
                return
            parts = [entry for entry in self._entries(lost) if entry.is_part]
            total = sum(entry.size for entry in parts)
            if total > self.limit:
                for entry in parts:
                    if total <= self.limit * _KEEP:
                        break
                    _remove(lost, entry.name)
                    total -= entry.size
                    self.purged += 1
            self._room = self.limit - total

    def entries(self) -> list[Kept]:
        """Everything that is here, the oldest first."""
        try:
            lost = os.open(FOLDER, OPEN_DIR, dir_fd=self._root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        try:
            return self._entries(lost)
        finally:
            os.close(lost)

    def _entries(self, lost: int) -> list[Kept]:
        names = {name for name in os.listdir(lost) if not is_temp(name)}
        found = []
        for name in names:
            if not (name.endswith(_NOTE) and name.removesuffix(_NOTE) in names):
                with contextlib.suppress(FileNotFoundError):
                    found.append(_read(lost, name))
        return sorted(found, key=lambda entry: (entry.time, entry.name))

    def totals(self) -> tuple[int, int]:
        """Entries and their bytes; listed anew only when the folder has changed."""
        try:
            changed = os.stat(FOLDER, dir_fd=self._root, follow_symlinks=False).st_mtime_ns
        except FileNotFoundError:
            return 0, 0
        if self._totals[0] != changed:
            entries = self.entries()
            self._totals = changed, (len(entries), sum(entry.size for entry in entries))
        return self._totals[1]

    def note(self, name: str) -> dict[str, Any]:
        """What was noted of an entry; empty if nothing was."""
        lost = os.open(FOLDER, OPEN_DIR, dir_fd=self._root)
        try:
            return _note(lost, name)
        finally:
            os.close(lost)

    def open(self, name: str) -> int:
        """A read-only descriptor of an entry that is a file.  ChunkNotFound."""
        try:
            return os.open(f"{FOLDER}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._root)
        except FileNotFoundError:
            raise ChunkNotFound(f"{FOLDER}/{name}") from None

    def remove(self, name: str) -> None:
        """Delete an entry for good, with its note; it may be gone already."""
        lost = os.open(FOLDER, OPEN_DIR, dir_fd=self._root)
        try:
            _remove(lost, name)
        finally:
            os.close(lost)


def _read(lost: int, name: str) -> Kept:
    st = os.stat(name, dir_fd=lost, follow_symlinks=False)
    note, named = _note(lost, name), _PART.fullmatch(name)
    since = note.get("time")
    return Kept(
        name,
        str(note.get("reason", UNKNOWN)),
        str(note.get("path", "")),
        since if isinstance(since, float) else st.st_ctime,
        _tree_size(lost, name) if stat.S_ISDIR(st.st_mode) else st.st_size,
        bool(named and parse_file_name(named[1]) and stat.S_ISREG(st.st_mode)),
    )


def _note(lost: int, name: str) -> dict[str, Any]:
    try:
        note = json.loads(read_small(lost, name + _NOTE))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _tree_size(lost: int, name: str) -> int:
    """Bytes of all files in a folder."""
    size = 0
    for _, _, files, fd in os.fwalk(name, dir_fd=lost):
        for each in files:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(each, dir_fd=fd, follow_symlinks=False).st_size
    return size


def _remove(lost: int, name: str) -> None:
    """The entry first: a note without one is a remainder, an entry without a note a riddle."""
    try:
        os.unlink(name, dir_fd=lost)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=lost, ignore_errors=True)
    except FileNotFoundError:
        pass
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name + _NOTE, dir_fd=lost)
