"""A kill storm: writers, readers and a daemon, one of which is killed every moment, and what must be true all along.

Run as ``python -m tests.storm ORDER`` with a JSON order (`Order`); prints a JSON report. One process supervises: it
forks the others, so that a replacement costs no imports, kills one of them after the other, and has the store checked
after each kill. They share files: ``acks`` and ``errors``, to which each appends in one go.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvfs import chunk
from kvfs.client import Client, connect
from kvfs.config import Amount, Config
from kvfs.daemon import keeper
from kvfs.daemon.fuse import connection
from kvfs.errors import (
    ChunkNotFound,
    DaemonUnavailable,
    DeadlineExceeded,
    KvfsError,
    NamespaceNotFound,
    StoreBusy,
    StoreFull,
)
from kvfs.fsck import Fsck
from kvfs.identity import GroupKind, Manifest
from kvfs.index import Index
from kvfs.names import part_path
from kvfs.store import Store
from kvfs.upkeep.evict import Evictor
from kvfs.upkeep.leases import Leases
from kvfs.upkeep.policy import POLICIES
from tests.mounted import processes, until
from tests.samples import MANIFEST, payload
from tests.small import NO_FLOOR, SMALL

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE: Final = Manifest(
    weights="ef" * 32,
    config={"model_type": "large"},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", tuple(range(32)), 1, 128, 128),),
)
"""Parts of 4 MiB."""
SPACES: Final = (SMALL, MANIFEST, LARGE)
"""What is evicted is of the second and third; of the first, everything acknowledged has to stay."""
OFTEN: Final = (92, 7, 1)
BOUNDS: Final = (0, 12 << 20, 40 << 20)
"""Bytes that the second and the third may take."""
COMMON: Final = [bytes([0x55, n]) * 16 for n in range(64)]
"""Keys that several writers store at once."""
PATIENCE: Final = 30.0
AWAY: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV})
"""What a mount says whose keeper is gone."""
PACE: Final = (0.0, 0.1)
"""Seconds between two chunks of a writer: a check reads every header."""
REST: Final = (0.0, 0.01)
"""Seconds between two reads of a reader."""
CALM: Final = (0.01, 0.12)
"""Seconds between two kills: at least, and at most."""


@dataclass
class Order:
    """Where, how many, how long. Without ``mount`` there is no daemon."""

    store: str
    logs: str
    kills: int
    seed: int
    mount: str | None = None
    writers: int = 8
    readers: int = 4


@dataclass
class Report:
    """What came of it; ``errors`` must be empty."""

    kills: dict[str, int] = field(default_factory=dict)
    acks: int = 0
    reads: int = 0
    checks: int = 0
    errors: list[str] = field(default_factory=list)


def space_of(key: bytes) -> Manifest:
    """The namespace that a key is used in."""
    return SPACES[min(key[31] % 100 // 92 + (key[31] % 100 == 99), 2)]


class Storm:
    """The supervisor, and what its children do."""

    def __init__(self, order: Order) -> None:
        self.order, self.path = order, Path(order.store)
        self.random = random.Random(order.seed)
        self._files = {name: self._log(name) for name in ("acks", "reads", "errors")}
        self.children: dict[int, Callable[[int], None]] = {}
        self.kills: Counter[str] = Counter()
        self.checks = 0

    def _log(self, name: str) -> int:
        return os.open(Path(self.order.logs) / name, os.O_CREAT | os.O_RDWR | os.O_APPEND)

    def tell(self, name: str, what: bytes) -> None:
        """Append to a shared file, all or nothing."""
        os.write(self._files[name], what)

    def wrong(self, what: str) -> None:
        """Something that must not be."""
        self.tell("errors", what.replace("\n", " ").encode() + b"\n")

    def client(self) -> Client:
        """As an engine has it."""
        return connect(mount=self.order.mount) if self.order.mount else connect(store=self.path)

    # --- children ---

    def start(self, role: Callable[[int], None]) -> None:
        """Fork a process of a role."""
        seed = self.random.getrandbits(32)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                role(seed)
                code = 0
            except BaseException as e:  # noqa: BLE001 - whatever it is, it must not be
                self.wrong(f"{role.__name__}: {type(e).__name__}: {e}")
            os._exit(code)
        self.children[pid] = role

    def write(self, seed: int) -> None:
        """Store chunk after chunk; a key is acknowledged when all parts of its chunk are."""
        r = random.Random(seed)
        with self.client() as client:
            while True:
                key = r.choice(COMMON) if r.random() < 0.05 else r.randbytes(32)
                try:
                    self._put(client, key)
                except (DaemonUnavailable, DeadlineExceeded, StoreFull):
                    time.sleep(0.005)
                else:
                    self.tell("acks", key)
                time.sleep(r.uniform(*PACE))

    def _put(self, client: Client, key: bytes) -> None:
        manifest = space_of(key)
        for part in manifest.parts:
            data = payload(key, part, manifest)
            with client.reserve(manifest.ns, len(data) + chunk.ALIGNMENT, timeout=PATIENCE, key=key) as reservation:
                meta = chunk.PartMeta(manifest.ns, key, bytes(32), 256, 0, part)
                chunk.write_part(reservation.fd, manifest, meta, data)
                client.publish(manifest.ns, reservation, key, part, timeout=PATIENCE)

    def read(self, seed: int) -> None:
        """Read what has been acknowledged, by a lease and by its name in the mount."""
        r = random.Random(seed)
        with self.client() as client:
            while True:
                count = os.fstat(self._files["acks"]).st_size // 32
                if not count:
                    time.sleep(0.01)
                    continue
                key = os.pread(self._files["acks"], 32, 32 * r.randrange(max(0, count - 2000), count))
                try:
                    by_name = self.order.mount is not None and r.random() < 0.3
                    self._by_name(client, key) if by_name else self._by_lease(client, key)
                except (DaemonUnavailable, DeadlineExceeded):
                    time.sleep(0.005)
                except ChunkNotFound:
                    if space_of(key) is SMALL:
                        self.wrong(f"phantom: {key.hex()} was acknowledged and is not there")
                else:
                    self.tell("reads", b".")
                time.sleep(r.uniform(*REST))

    def _by_lease(self, client: Client, key: bytes) -> None:
        manifest = space_of(key)
        with client.lease(manifest.ns, [(key, part) for part in manifest.parts], timeout=PATIENCE) as lease:
            for leased in lease.parts:
                with chunk.open_part(os.dup(leased.fd), manifest, key, leased.part) as file:
                    if bytes(file.verify()) != payload(key, leased.part, manifest):
                        self.wrong(f"wrong bytes: {key.hex()}.{leased.part}")

    def _by_name(self, client: Client, key: bytes) -> None:
        manifest = space_of(key)
        part = manifest.parts[-1]
        try:
            raw = (Path(self.order.mount or "") / manifest.ns_hex / part_path(key, part)).read_bytes()
        except FileNotFoundError:  # perhaps there is just no mount
            self._by_lease(client, key)
            return
        except OSError as e:
            if e.errno in AWAY:
                raise DaemonUnavailable(self.order.mount, e.strerror) from None
            raise
        if not raw.endswith(payload(key, part, manifest)):
            self.wrong(f"wrong bytes in the mount: {key.hex()}.{part}")

    def evict(self, _seed: int) -> None:
        """Where there is no daemon: keep the two namespaces small, as `kvfs evict` does."""
        with Store.open(self.path) as store:
            index = Index(store, POLICIES["gdsf"])
            config = Config(budget=Amount(1 << 40, 0.0), **NO_FLOOR)  # type: ignore[arg-type]
            evictor = Evictor(store, index, Leases(), config, lambda *_: None, lambda *_: None)
            while True:
                index.reconcile()
                for manifest, bound in zip(SPACES[1:], BOUNDS[1:], strict=True):
                    with contextlib.suppress(NamespaceNotFound):
                        evictor.evict([manifest.ns], index.totals(manifest.ns)[1] - bound, "request")
                time.sleep(0.05)

    def check(self, _seed: int) -> None:
        """An operator's check, while everything else goes on."""
        if self.order.mount:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    with connect(mount=self.order.mount) as client:
                        client.reconcile(timeout=PATIENCE)
                    return
                except (DaemonUnavailable, DeadlineExceeded):
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
        self._fsck()

    # --- the supervisor ---

    def mount(self) -> None:
        """Start the daemon."""
        config = Config(
            write_budget=None,
            namespace_budgets=tuple((m.ns_hex, Amount(b, 0.0)) for m, b in zip(SPACES[1:], BOUNDS[1:], strict=True)),
            snapshot_interval=1.0,
            **NO_FLOOR,  # type: ignore[arg-type]
        )
        keeper.mount(self.path, Path(self.order.mount or ""), config=config, transport="kernel")

    def run(self) -> Report:
        """All of it."""
        with Store.init(self.path) as store:
            for manifest in SPACES:
                store.register(manifest, {"name": manifest.config["model_type"]})
        roles = [self.write] * self.order.writers + [self.read] * self.order.readers
        if self.order.mount:
            self.mount()
        else:
            roles.append(self.evict)
        try:
            for role in roles:
                self.start(role)
            while sum(self.kills.values()) < self.order.kills and not self._failed():
                time.sleep(self.random.uniform(*CALM))
                self.kill()
                self._check()
            self._end()
        finally:
            for pid in self.children:
                os.kill(pid, signal.SIGKILL)
            if self.order.mount and connection.mounted_at(Path(self.order.mount)) is not None:
                keeper.umount(Path(self.order.mount), lazy=True)
        self._last_words()
        acks = os.fstat(self._files["acks"]).st_size // 32
        reads = os.fstat(self._files["reads"]).st_size
        errors = os.pread(self._files["errors"], 1 << 20, 0).decode().splitlines()
        return Report(dict(self.kills), acks, reads, self.checks, errors)

    def _failed(self) -> bool:
        return os.fstat(self._files["errors"]).st_size > 0

    def kill(self) -> None:
        """Kill one of them, and start another."""
        daemon = processes(self.path) if self.order.mount else {}
        pids = [*self.children, *([daemon["worker"]] * 3 if "worker" in daemon else [])]
        victim = self.random.choice(pids)
        if victim not in self.children:
            everything = len(daemon) == 2 and self.random.random() < 0.1
            self.kills["daemon" if everything else "worker"] += 1
            if everything:
                self._kill_daemon(daemon)
            else:
                os.kill(victim, signal.SIGKILL)
            return
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        role = self.children.pop(victim)
        self.kills[role.__name__] += 1
        self.start(role)

    def _kill_daemon(self, daemon: dict[str, int]) -> None:
        """Keeper and worker at once; the store is checked while none is there, and another daemon mounts it."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in daemon.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        until(lambda: not processes(self.path))
        until(self._is_free)
        self._fsck()
        self.mount()

    def _is_free(self) -> bool:
        """Whether the dead daemon's lock is gone: a process has no name any more while it still closes its files."""
        with Store.open(self.path) as store:
            try:
                store.lock_daemon("a storm")
            except StoreBusy:
                return False
            return True

    def _fsck(self) -> None:
        with Fsck(self.path) as fsck:
            for finding in fsck.run():
                if finding.is_damage:
                    self.wrong(f"fsck: {finding}")

    def _check(self) -> None:
        self.start(self.check)
        pid = next(reversed(self.children))
        del self.children[pid]
        _, status = os.waitpid(pid, 0)
        self.checks += 1
        if status:
            self.wrong(f"the check ended with {status}")

    def _end(self) -> None:
        for pid in list(self.children):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del self.children[pid]

    def _last_words(self) -> None:
        """Everything acknowledged is there, whole; what is visible is whole; a check finds crumbs and no damage."""
        raw = os.pread(self._files["acks"], os.fstat(self._files["acks"]).st_size, 0)
        acked = {raw[i : i + 32] for i in range(0, len(raw), 32)}
        with Store.open(self.path) as store:
            for manifest in SPACES:
                found = Counter(each.key for each in store.scan(manifest.ns) if self._is_whole(store, manifest, each))
                if manifest is SMALL:
                    lost = {key for key in acked if space_of(key) is SMALL} - found.keys()
                    for key in lost:
                        self.wrong(f"phantom: {key.hex()} was acknowledged and is not there at the end")
            for ns in store.namespaces():
                for name in os.listdir(self.path / ns.hex() / "tmp"):
                    os.utime(self.path / ns.hex() / "tmp" / name, (1, 1))
        for time_ in ("first", "second"):
            with Fsck(self.path, data=True) as fsck:
                found_ = [each for each in fsck.run() if each.is_damage or (each.kind == "temp" and time_ == "second")]
            for each in found_:
                self.wrong(f"{time_} fsck at the end: {each}")
        for ns in SPACES:
            if left := os.listdir(self.path / ns.ns_hex / "tmp"):
                self.wrong(f"temp files after the grace: {left}")

    def _is_whole(self, store: Store, manifest: Manifest, each: object) -> bool:
        key, part = each.key, each.part  # type: ignore[attr-defined]
        try:
            with chunk.open_part(store.open_part(manifest.ns, key, part), manifest, key, part) as file:
                if bytes(file.verify()) == payload(key, part, manifest):
                    return True
            self.wrong(f"wrong bytes at the end: {key.hex()}.{part}")
        except KvfsError as e:
            self.wrong(f"at the end: {e}")
        return False


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(Storm(Order(**json.loads(sys.argv[1]))).run())))
