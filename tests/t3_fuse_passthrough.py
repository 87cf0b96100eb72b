"""The keeper lends the kernel only what is fit, open for reading only: regular files of the store, of one name, and
sealed files in memory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs.daemon.fuse import connection
from kvfs.daemon.fuse.abi import Init
from kvfs.daemon.fuse.passthrough import Borrower, Lender
from tests.mounted import needs_mount

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_mount


@pytest.fixture
def borrower(tmp_path: Path, mountpoint: Path) -> Iterator[Borrower]:
    """One whose lender has a mount that nobody serves."""
    fd = connection.mount(mountpoint, tmp_path, ["nosuid", "nodev", "default_permissions"])
    try:
        if Init.PASSTHROUGH not in connection.negotiate(fd):
            pytest.skip("this kernel passes no files through")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lender = threading.Thread(target=Lender(fd, tmp_path).serve, args=(theirs,))
        lender.start()
        with ours:
            yield Borrower(ours)
        lender.join()
    finally:
        os.close(fd)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    path = tmp_path / "part"
    path.write_bytes(b"x" * 4096)
    return path


def refusal(borrower: Borrower, path: Path, flags: int = os.O_RDONLY) -> int | None:
    """The error of borrowing a file, if it is refused."""
    fd = os.open(path, flags)
    try:
        borrower.close(borrower.open(fd))
    except OSError as e:
        return e.errno
    finally:
        os.close(fd)
    return None


def test_a_fit_file_is_lent_again_and_again(borrower: Borrower, part: Path) -> None:
    assert [refusal(borrower, part) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_APPEND])
def test_writable_descriptors_are_refused(borrower: Borrower, part: Path, flags: int) -> None:
    assert refusal(borrower, part, flags) == errno.EACCES


def test_other_kinds_of_files_are_refused(borrower: Borrower, part: Path, tmp_path: Path) -> None:
    os.link(part, tmp_path / "second name")
    assert refusal(borrower, part) == errno.EACCES
    os.unlink(tmp_path / "second name")
    assert refusal(borrower, part) is None
    assert refusal(borrower, tmp_path) == errno.EACCES
    os.mkfifo(tmp_path / "fifo")
    assert refusal(borrower, tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK) == errno.EACCES


def test_files_of_others_and_of_other_filesystems_are_refused(borrower: Borrower, part: Path) -> None:
    os.chown(part, 12345, -1)
    assert refusal(borrower, part) == errno.EACCES
    fd = os.memfd_create("elsewhere")
    try:
        with pytest.raises(PermissionError):
            borrower.open(fd)
    finally:
        os.close(fd)


def test_closing_an_unknown_id_does_no_harm(borrower: Borrower, part: Path) -> None:
    borrower.close(4711)
    assert refusal(borrower, part) is None


def test_a_file_in_memory_is_lent_once_it_can_never_change(borrower: Borrower) -> None:
    fd = os.memfd_create("decoded", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, b"x" * 4096)
        path = Path(f"/proc/self/fd/{fd}")
        for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SEAL):
            assert refusal(borrower, path) == errno.EACCES
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
        assert refusal(borrower, path) is None
        assert refusal(borrower, path, os.O_RDWR) == errno.EACCES
    finally:
        os.close(fd)
