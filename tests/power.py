"""Inside a guest: write to two stores, cut the power at a random moment, and look what is there afterwards.

dm-flakey lies under the filesystem. From the cut on it drops what is written and says that all is well, so that
everything that was in memory only is lost, as it is when the machine stops.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from kvfs import chunk
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.errors import ChunkCorrupt, NotAStore
from kvfs.fsck import Fsck
from kvfs.index import Index
from kvfs.metrics import Metrics
from kvfs.names import part_path
from kvfs.store import Store
from tests.guest import call, load
from tests.samples import MANIFEST, payload
from tests.small import NO_FLOOR, NS, SMALL

IMAGE, DISK = Path("/mnt/image"), Path("/mnt/disk")
SIZES: Final = {"ext4": 96, "xfs": 320}
"""MiB of the disk; mkfs.xfs makes none smaller than 300."""
MAKE: Final = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
MODES: Final = ("full", "relaxed")
LIFE: Final = (0.0, 0.4)
"""Seconds from the first acknowledged chunks to the cut: at least, and at most."""
SPACES: Final = (SMALL, MANIFEST)
KEEP: Final = 100
"""Chunks after which a writer removes its oldest, as the disk is small."""


def main(order: dict[str, Any]) -> dict[str, Any]:
    """``{"filesystem", "cuts", "seed"}`` → counts of what was found; ``errors`` must be empty."""
    load("loop", "dm-mod", "dm-flakey")
    found: Counter[str] = Counter()
    errors: list[str] = []
    DISK.mkdir()
    for cut in range(order["cuts"]):
        r = random.Random(order["seed"] + cut)
        one(order["filesystem"], r, found, errors)
        if errors:
            errors.append(f"seed {order['seed'] + cut}")
            break
    return {"found": found, "errors": errors}


def one(filesystem: str, r: random.Random, found: Counter[str], errors: list[str]) -> None:
    """A new disk, writers, a cut, and the same disk after it."""
    with IMAGE.open("wb") as file:
        file.truncate(SIZES[filesystem] << 20)
    loop = call("losetup", "-f", "--show", IMAGE)
    try:
        call(*MAKE[filesystem], loop)
        sectors = call("blockdev", "--getsz", loop)
        call("dmsetup", "create", "disk", "--table", f"0 {sectors} flakey {loop} 0 3600 0")
        call("dmsetup", "mknodes")
        call("mount", "/dev/mapper/disk", DISK)
        for mode in MODES:
            with Store.init(DISK / mode, mode) as store:
                for manifest in SPACES:
                    store.register(manifest)
        os.sync()
        acked = write_until_cut(r, sectors, loop)
        call("umount", DISK)
        call("dmsetup", "remove", "--retry", "disk")
        call("mount", loop, DISK)
        for mode in MODES:
            look(mode, acked[mode], found, errors)
        call("umount", DISK)
    finally:
        call("losetup", "-d", loop)
    found["cuts"] += 1


def write_until_cut(r: random.Random, sectors: str, loop: str) -> dict[str, set[bytes]]:
    """Returns the keys that each writer had acknowledged and not removed when the power went."""
    writers = []
    for mode in MODES:
        log_of(mode).write_bytes(b"")
        pid = os.fork()
        if pid == 0:
            write(mode, r.getrandbits(32))
        writers.append(pid)
    while not all(log_of(mode).stat().st_size for mode in MODES):
        time.sleep(0.01)
    time.sleep(r.uniform(*LIFE))
    for pid in writers:  # what is acknowledged after the cut was acknowledged by nobody
        os.kill(pid, signal.SIGSTOP)
    call("dmsetup", "suspend", "--nolockfs", "disk")
    call("dmsetup", "load", "disk", "--table", f"0 {sectors} flakey {loop} 0 0 3600 1 drop_writes")
    call("dmsetup", "resume", "disk")
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
    for pid in writers:
        os.waitpid(pid, 0)
    acked: dict[str, set[bytes]] = {}
    for mode in MODES:
        raw, keys = log_of(mode).read_bytes(), set()
        for i in range(0, len(raw), 33):
            (keys.add if raw[i] == ord("+") else keys.discard)(raw[i + 1 : i + 33])
        acked[mode] = keys
    return acked


def log_of(mode: str) -> Path:
    """What a writer has acknowledged (+) and removed (-), where no power is cut."""
    return Path(f"/mnt/acks.{mode}")


def space_of(key: bytes) -> Any:
    return SPACES[key[0] % 4 == 0]


def write(mode: str, seed: int) -> None:
    """Chunks through a daemon's catalog, and its snapshots, until killed."""
    r, mine = random.Random(seed), []
    log = os.open(log_of(mode), os.O_WRONLY | os.O_APPEND)
    daemon = Catalog(Store.open(DISK / mode, mode), Config(durability=mode, **NO_FLOOR), Metrics())  # type: ignore[arg-type]
    while True:
        key = r.randbytes(32)
        manifest = space_of(key)
        for part in manifest.parts:
            data = payload(key, part, manifest)
            temp = daemon.reserve(manifest.ns, len(data) + chunk.ALIGNMENT, key)
            chunk.write_part(temp.fd, manifest, chunk.PartMeta(manifest.ns, key, bytes(32), 256, 0, part), data)
            os.close(temp.fd)
            daemon.publish_file(manifest.ns, temp.name, key, part)
        os.write(log, b"+" + key)
        mine.append(key)
        if len(mine) > KEEP:
            old = mine.pop(0)
            os.write(log, b"-" + old)
            daemon.remove_chunk(space_of(old).ns, old)
        if r.random() < 0.05:
            daemon.save()


def look(mode: str, acked: set[bytes], found: Counter[str], errors: list[str]) -> None:
    """``full``: what was acknowledged is there. Either: what is there is whole, or is refused."""
    found[f"{mode} acknowledged"] += len(acked)
    try:
        store = Store.open(DISK / mode)
    except NotAStore:
        errors.append(f"{mode}: the store is gone")
        return
    with store:
        whole: Counter[bytes] = Counter()
        for ns in store.namespaces():
            manifest = SMALL if ns == NS else MANIFEST
            for each in store.scan(ns):
                try:
                    fd = store.open_part(ns, each.key, each.part)
                    with chunk.open_part(fd, manifest, each.key, each.part) as file:
                        if bytes(file.verify()) != payload(each.key, each.part, manifest):
                            errors.append(f"{mode}: wrong bytes under {part_path(each.key, each.part)}")
                    whole[each.key] += 1
                except ChunkCorrupt as e:
                    found[f"{mode} refused"] += 1
                    if mode == "full":
                        errors.append(f"{mode}: {e}")
        kept = {key for key, parts in whole.items() if parts == len(space_of(key).parts)}
        found[f"{mode} kept"] += len(kept & acked)
        if mode == "full" and (lost := acked - kept):
            errors += [f"{mode}: {len(lost)} of {len(acked)} acknowledged chunks are gone"]
        index = Index(store)
        found[f"{mode} snapshots"] += index.load()
        index.reconcile()
        index.check_integrity()
    with Fsck(DISK / mode, data=True) as fsck:
        found[f"{mode} repaired"] += len(list(fsck.run()))
    with Fsck(DISK / mode, data=True) as fsck:
        errors += [f"{mode}: a second fsck finds {each}" for each in fsck.run() if each.is_damage]
