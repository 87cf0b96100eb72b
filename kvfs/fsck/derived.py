"""What lies in ``.kvfs``: the locks of daemons, snapshots, and namespaces on their way out.  All of it can be lost."""

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from functools import partial

from kvfs.errors import StoreBusy
from kvfs.files import OPEN_FILE, make_dir
from kvfs.fsck.findings import Finding, Repairs
from kvfs.fsck.folders import DERIVED, IGNORED, check_folder, check_temp, opened
from kvfs.index import Index
from kvfs.names import is_derived, is_temp
from kvfs.retired import is_retired
from kvfs.verify import read_state

__all__ = ["Snapshot", "check", "take_locks"]

_LOCK = re.compile(r"daemon\..*\.lock", re.DOTALL)
_HALF_WRITTEN = re.compile(r".*\.[0-9a-f]{16}\.tmp", re.DOTALL)


def take_locks(repairs: Repairs, held: list[int]) -> Iterator[Finding]:
    """Keep daemons away while the store is checked; StoreBusy if one serves it.

    Takes the lock of this host's daemon, unless it is a dry run, and a share of every lock that is there, which goes to
    ``held``: on a shared volume other hosts' daemons have theirs beside ours.
    """
    yield from check_folder(repairs, repairs.root, DERIVED, needed=False)
    if not repairs.dry_run:
        make_dir(DERIVED, repairs.root)
    with opened(repairs.root, DERIVED) as (folder, everything):
        names = [name for name in everything if _LOCK.fullmatch(name)]
        for name in names:
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                yield repairs.move_away("foreign", f"{DERIVED}/{name}", f"{stat.filemode(mode)} for a lock", folder)
        owners = {name: owner for name in names if (owner := _owner(folder, name)) is not None}
        me = f"kvfs fsck (pid {os.getpid()}, {secrets.token_hex(4)})"
        if not repairs.dry_run:
            repairs.store.lock_daemon(me)
        for name, owner in owners.items():
            _share(repairs, folder, name, me, held)
            if owner:
                free = partial(_clear, folder, name, me)
                yield repairs.repair("stale-lock", f"{DERIVED}/{name}", f"left by {owner}", "emptied", free)


def _owner(folder: int, name: str) -> str | None:
    """Who wrote a lock file; nothing if its last holder let go of it in peace, None if it is no file."""
    try:
        fd = os.open(name, OPEN_FILE, dir_fd=folder)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(4096).decode(errors="replace").strip() if stat.S_ISREG(os.fstat(fd).st_mode) else None


def _share(repairs: Repairs, folder: int, name: str, me: str, held: list[int]) -> None:
    """Take a share of a lock that is not our own.  StoreBusy if a daemon has it."""
    fd = os.open(name, OPEN_FILE, dir_fd=folder)
    held.append(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(folder, name)
        if owner != me:
            what_to_do = "stop it, or check through its mount: kvfs fsck --at MOUNT"
            raise StoreBusy(repairs.store.path, f"{owner or 'a daemon'}; {what_to_do}") from None


def _clear(folder: int, name: str, me: str) -> None:
    if _owner(folder, name) != me:  # ours is emptied when we let go of it
        fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)


class Snapshot:
    """The index that the last daemon of this host left."""

    def __init__(self, repairs: Repairs) -> None:
        self._repairs = repairs
        self._index = Index(repairs.store)
        self._loaded = self._index.load()

    def compare(self) -> Iterator[Finding]:
        """Compare it with the tree as it is before repairs; a damaged one is met by `check`."""
        found, gone = self._index.reconcile() if self._loaded else (0, 0)
        if found or gone:
            path, detail = f"{DERIVED}/{self._index.snapshot_path.name}", f"{found} parts unknown to it, {gone} gone"
            yield self._repairs.repair("stale-index", path, detail, "written anew", self._index.save)

    def update(self) -> None:
        """Write it anew if repairs have changed what is there."""
        if self._loaded and not self._repairs.dry_run and self._index.reconcile() != (0, 0):
            self._index.save()


def check(repairs: Repairs) -> Iterator[Finding]:
    """Check everything in ``.kvfs`` but locks and the truth of the snapshot."""
    with opened(repairs.root, DERIVED) as (folder, names):
        for name in (each for each in names if not each.startswith(IGNORED)):
            path, remove = f"{DERIVED}/{name}", partial(os.unlink, name, dir_fd=folder)
            st = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if is_retired(name) and stat.S_ISDIR(st.st_mode):
                clear = partial(shutil.rmtree, name, dir_fd=folder)
                yield repairs.repair("retired", path, "a namespace whose removal was cut short", "removed", clear)
            elif is_temp(name) or _HALF_WRITTEN.fullmatch(name):
                yield from check_temp(repairs, folder, path)
            elif not stat.S_ISREG(st.st_mode) or not is_derived(name):
                yield repairs.move_away("foreign", path, stat.filemode(st.st_mode), folder)
            elif (wrong := _wrong(repairs, name)) is not None:
                yield repairs.repair(wrong, path, "cannot be read", "removed", remove)


def _wrong(repairs: Repairs, name: str) -> str | None:
    """What is the matter with a derived file, if we can tell."""
    index = Index(repairs.store)
    if name == index.snapshot_path.name and not index.load():
        return "index"
    if name.startswith("verified.") and read_state(repairs.store.derived / name) is None:
        return "verified"
    return None
