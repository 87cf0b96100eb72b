"""``trash/`` of a store that several hosts use: what was removed stays readable there until nobody can be reading it.

A network filesystem forgets an unlinked file whatever other hosts have open (ESTALE), and keeps a renamed one.  What is
removed goes to a folder named by the epoch of the janitor that decided it (`kvfs.upkeep.office`).  A later janitor
empties and removes the folders of all before it, and then begins: from there on a renaming of theirs fails, however
long it was under way.  Folder 0 takes what any host removes on request.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import NamedTuple

from kvfs.errors import StoreBusy
from kvfs.files import beneath, make_dir

__all__ = ["FOLDER", "REQUESTS", "Thrown", "Trash"]

FOLDER = "trash"
REQUESTS = 0
"""The epoch of what was asked for, which nobody has to be elected to do."""
_LABEL = re.compile(r"([0-9a-f]{64})(?:\.([0-9a-f]{64})\..+)?\.[0-9a-f]{8}")
_HELD_OPEN = ".nfs"
"""What such names begin with is unlinked already: its last user on this host has it open."""
ROUNDS = 1000
"""Times that the folder of an earlier janitor is emptied before its going on is called a fault."""


class Thrown(NamedTuple):
    """What lies in the trash: its path there, its bytes, and what it was: a part of the chunk ``key``, the whole
    namespace (None), or nothing that anybody could hold (``ns`` is None)."""

    path: str
    size: int
    ns: bytes | None
    key: bytes | None


class Trash:
    """The trash of the store whose folder is open as ``root_fd``."""

    def __init__(self, root_fd: int) -> None:
        self._root = root_fd

    def take(self, ns: bytes, dir_fd: int, name: str, epoch: int = REQUESTS) -> bool:
        """Move ``name``, a part of the namespace or its folder, here from the folder ``dir_fd``; False if it is gone.

        StoreBusy if a later janitor than that of ``epoch`` has taken over.
        """
        label = name if name == ns.hex() else f"{ns.hex()}.{name}"
        try:
            with self._opened(epoch) as folder:
                os.rename(name, f"{label}.{secrets.token_hex(4)}", src_dir_fd=dir_fd, dst_dir_fd=folder)
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            if not os.access(name, os.F_OK, dir_fd=dir_fd, follow_symlinks=False):
                return False
            raise StoreBusy(f"the trash of epoch {epoch}", "a later janitor") from None
        return True

    @contextlib.contextmanager
    def _opened(self, epoch: int) -> Iterator[int]:
        if epoch == REQUESTS:
            self._make(epoch)
        with beneath(self._root, FOLDER) as trash, beneath(trash, str(epoch)) as folder:
            yield folder

    def _make(self, epoch: int) -> None:
        make_dir(FOLDER, self._root)
        with beneath(self._root, FOLDER) as trash:
            make_dir(str(epoch), trash)

    def begin(self, epoch: int) -> None:
        """Have a folder for ``epoch``, and end all earlier ones: what they hold moves here.  StoreBusy, OSError."""
        self._make(epoch)
        with beneath(self._root, FOLDER) as trash, beneath(trash, str(epoch)) as own:
            for name in os.listdir(trash):
                if name.isdecimal() and REQUESTS < int(name) < epoch:
                    _end(trash, name, own)

    def entries(self) -> Iterator[Thrown]:
        """Everything that is here."""
        absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with absent, beneath(self._root, FOLDER) as trash:
            for folder in filter(str.isdecimal, os.listdir(trash)):
                with absent, beneath(trash, folder) as fd:
                    for name in os.listdir(fd):
                        with contextlib.suppress(FileNotFoundError):
                            if not name.startswith(_HELD_OPEN):
                                yield _thrown(fd, folder, name)

    def free(self, thrown: Thrown) -> None:
        """Remove for good; it may be gone already."""
        absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        folder, _, name = thrown.path.partition("/")
        with absent, beneath(self._root, FOLDER) as trash, beneath(trash, folder) as fd:
            try:
                os.unlink(name, dir_fd=fd)
            except (IsADirectoryError, PermissionError):
                shutil.rmtree(name, ignore_errors=True, dir_fd=fd)


def _end(trash: int, name: str, own: int) -> None:
    for _ in range(ROUNDS):
        try:
            os.rmdir(name, dir_fd=trash)
        except FileNotFoundError:
            return
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        with contextlib.suppress(FileNotFoundError), beneath(trash, name) as folder:
            for each in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(each, each, src_dir_fd=folder, dst_dir_fd=own)
    raise StoreBusy(f"trash/{name}", "an earlier janitor, which does not end")


def _thrown(folder_fd: int, folder: str, name: str) -> Thrown:
    st = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    size = _size_of(folder_fd, name) if stat.S_ISDIR(st.st_mode) else st.st_size
    m = _LABEL.fullmatch(name)
    if m is None:
        return Thrown(f"{folder}/{name}", size, None, None)
    return Thrown(f"{folder}/{name}", size, bytes.fromhex(m[1]), bytes.fromhex(m[2]) if m[2] else None)


def _size_of(dir_fd: int, name: str) -> int:
    """Bytes of the files in a folder."""
    size = 0
    with contextlib.suppress(OSError):
        for _, _, files, fd in os.fwalk(name, dir_fd=dir_fd):
            for each in files:
                with contextlib.suppress(FileNotFoundError):
                    size += os.stat(each, dir_fd=fd, follow_symlinks=False).st_size
    return size
