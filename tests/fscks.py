"""Checks of stores for the tests: what one must find, and that it changes nothing else."""

from __future__ import annotations

import os
import socket
import stat
import time
from typing import TYPE_CHECKING, Any

from kvfs.fsck import Finding, Fsck
from kvfs.identity import PartId
from kvfs.names import part_path
from tests.samples import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfs.store import Store

NS = MANIFEST.ns
FULL0, FULL1, SWA0 = PartId("full", 0), PartId("full", 1), PartId("swa512", 0)
KEY, OTHER = bytes([1] * 32), bytes([2] * 32)
PAST = float(int(time.time()) - 3600)


def fsck(path: Path, **options: bool) -> list[Finding]:
    with Fsck(path, **options) as check:
        return list(check.run())


def tree(path: Path) -> dict[str, tuple[int, ...]]:
    """Everything there is, except for what only a lock or an access would change."""
    found = {}
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            st = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (st.st_ino, st.st_mode, st.st_nlink, st.st_size, st.st_mtime_ns)
    return found


def check(path: Path, kind: str, where: str, action: str, **options: bool) -> Finding:
    """A dry run tells of exactly one thing and changes nothing; a real one repairs it; then nothing is left."""
    before = tree(path)
    [told] = but_for_the_other_slice(kind, fsck(path, dry_run=True, **options))
    assert tree(path) == before
    [found] = but_for_the_other_slice(kind, fsck(path, **options))
    assert (found.kind, found.path, found.done) == (kind, where, True), found
    assert found.action.startswith(action), found
    assert told == found._replace(done=False)
    assert but_for_the_other_slice(kind, fsck(path, **options)) == []
    return found


def but_for_the_other_slice(kind: str, findings: list[Finding]) -> list[Finding]:
    """Where a part is taken away, the other slice of its kind is of no use either; it has tests of its own."""
    return [each for each in findings if each.kind != "incomplete" or kind == "incomplete"]


def kept(store: Store) -> list[tuple[str, str]]:
    """Reasons and paths of what is in lost+found."""
    return [(entry.reason, entry.path) for entry in store.lost.entries()]


def below(*parts: str) -> str:
    return "/".join([MANIFEST.ns_hex, *parts])


def at(key: bytes, part: PartId = FULL0) -> str:
    return below(part_path(key, part))


def age(path: Path) -> None:
    os.utime(path, (PAST, PAST), follow_symlinks=False)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "file": lambda path: path.write_text("dear"),
    "empty file": lambda path: path.touch(),
    "folder": lambda path: (path / "sub").mkdir(parents=True) or (path / "sub" / "letter").write_text("dear"),
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
    "socket": lambda path: bind(path),  # noqa: PLW0108 - defined below
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)
