"""The kernel's structures have the sizes that its header gives them."""

from __future__ import annotations

import pytest

from kvfs.daemon.fuse import abi

SIZES = {
    "IN_HEADER": 40,
    "OUT_HEADER": 16,
    "ATTR": 88,
    "ENTRY_OUT": 40,
    "ATTR_OUT": 16,
    "INIT_IN": 64,
    "INIT_OUT": 64,
    "GETATTR_IN": 16,
    "SETATTR_IN": 88,
    "MKNOD_IN": 16,
    "OPEN_IN": 8,
    "CREATE_IN": 16,
    "OPEN_OUT": 16,
    "RELEASE_IN": 24,
    "FLUSH_IN": 24,
    "FSYNC_IN": 16,
    "READ_IN": 40,
    "WRITE_IN": 40,
    "WRITE_OUT": 8,
    "GETXATTR_IN": 8,
    "GETXATTR_OUT": 8,
    "STATFS_OUT": 80,
    "FORGET_IN": 8,
    "BATCH_FORGET_IN": 8,
    "FORGET_ONE": 16,
    "INTERRUPT_IN": 8,
    "DIRENT": 24,
    "DELETE_OUT": 24,
    "BACKING_MAP": 16,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_sizes(name: str, size: int) -> None:
    assert getattr(abi, name).size == size


def test_ioctl_numbers() -> None:
    assert (abi.BACKING_OPEN, abi.BACKING_CLOSE) == (0x4010E501, 0x4004E502)
