"""Inside a guest: a store whose owner has a quota, on a disk with much more room (EDQUOT, which ENOSPC is not)."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any, Final

from kvfs import chunk
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.errors import StoreFull
from kvfs.fsck import Fsck
from kvfs.metrics import Metrics
from kvfs.store import Store
from tests.guest import call, load
from tests.samples import payload
from tests.small import CHUNK, NO_FLOOR, NS, PART, SMALL

IMAGE, DISK = Path("/mnt/image"), Path("/mnt/disk")
OWNER: Final = 4711
BLOCKS: Final = 2048
"""KiB that the owner may use."""
PATIENCE: Final = 10
"""Seconds without room after which there will be none. How long it takes to fill the disk is no matter."""
_SETQUOTA: Final = 0x800008
_ONLY_LIMITS: Final = 1


def main(order: dict[str, Any]) -> dict[str, Any]:
    """``{"times"}`` that the quota is to be met → counts of what came of it; ``errors`` must be empty."""
    load("loop", "quota_v2")
    with IMAGE.open("wb") as file:
        file.truncate(96 << 20)
    DISK.mkdir()
    loop = call("losetup", "-f", "--show", IMAGE)
    call("mkfs.ext4", "-q", "-F", "-O", "quota", "-E", "quotatype=usrquota", loop)
    call("mount", "-o", "usrquota", loop, DISK)
    os.chmod(DISK, 0o755)
    (DISK / "kv").mkdir()
    os.chown(DISK / "kv", OWNER, OWNER)
    limits = struct.pack("=QQQQQQQQI4x", BLOCKS, 0, 0, 0, 0, 0, 0, 0, _ONLY_LIMITS)
    command = ctypes.c_int(ctypes.c_uint32(_SETQUOTA << 8).value)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.quotactl(command, loop.encode(), OWNER, limits):
        raise OSError(ctypes.get_errno(), "quotactl")
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setgroups([])
        os.setresgid(OWNER, OWNER, OWNER)
        os.setresuid(OWNER, OWNER, OWNER)
        try:
            os.write(writer, json.dumps(use(order["times"])).encode())
        except BaseException:  # noqa: BLE001 - it is all that the parent will know
            os.write(writer, json.dumps({"errors": [traceback.format_exc()]}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told: dict[str, Any] = json.loads(pipe.read())
    subprocess.run(["umount", DISK], check=False)
    return told


def use(times: int) -> dict[str, Any]:
    """Store and be refused, again and again; measure how soon there is room."""
    errors: list[str] = []
    stored = refused = 0
    waits: list[float] = []
    with Store.init(DISK / "kv") as store:
        store.register(SMALL)
        daemon = Catalog(store, Config(write_budget=None, **NO_FLOOR), Metrics())  # type: ignore[arg-type]
        daemon.evictor.start()
        since = 0.0
        while len(waits) < times and not (since and time.monotonic() - since > PATIENCE):
            key = os.urandom(32)
            try:
                put(daemon, key)
                stored += 1
                if since:
                    waits.append(time.monotonic() - since)
                since = 0.0
            except StoreFull:
                refused += 1
                since = since or time.monotonic()
                time.sleep(0.01)
        evicted = daemon.stats()["eviction"]["evicted"]
        daemon.evictor.close()
        if left := os.listdir(DISK / "kv" / SMALL.ns_hex / "tmp"):
            errors.append(f"temp files: {left}")
        if daemon.reconcile() != (0, 0):
            errors.append("the index is not true to the store")
        daemon.close()
    with Fsck(DISK / "kv", data=True) as fsck:
        errors += [str(each) for each in fsck.run() if each.is_damage]
    return {"stored": stored, "refused": refused, "evicted": evicted, "waits": waits, "errors": errors}


def put(daemon: Catalog, key: bytes) -> None:
    """A chunk, as a client of the daemon stores it."""
    temp = daemon.reserve(NS, CHUNK, key)
    try:
        meta = chunk.PartMeta(NS, key, bytes(32), 256, 0, PART)
        chunk.write_part(temp.fd, SMALL, meta, payload(key, PART, SMALL))
    except BaseException:
        os.close(temp.fd)
        daemon.discard(NS, temp.name)
        raise
    os.close(temp.fd)
    daemon.publish_file(NS, temp.name, key, PART)
