"""A mounted store against a dictionary: random operations through its socket and its mount, and behind its back.

Two namespaces: in `free` nothing goes unless somebody removes it, in `bounded` what nobody holds may be evicted at any
time. What is asked of either is what the dictionary says, whoever is killed between two operations.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from kvfs import chunk
from kvfs.client import Lease, MountClient
from kvfs.config import Amount
from kvfs.errors import ChunkCorrupt, ChunkNotFound, StoreBusy, StoreFull
from kvfs.store import Store
from tests.daemons import damage
from tests.model import Bed, Chunk, Space
from tests.mounted import mounted, needs_mount, place, until
from tests.samples import payload, put
from tests.small import NO_FLOOR
from tests.torture import LONG, report, size, torture

if TYPE_CHECKING:
    from pathlib import Path

    from kvfs.identity import PartId

pytestmark = [*torture(300), needs_mount]

OPERATIONS = size("OPERATIONS", 10_000, 1_000_000)
STEPS = 100
"""Operations on one pair of namespaces."""
BOUND = 24
"""Chunks that fit in the bounded one."""
CHUNK = 2 * (4096 + 256 * 8 * 2 * 2)
GONE = {errno.ENOENT, errno.ESTALE}

numbers = st.integers(0, 1 << 16)
spaces = st.sampled_from(["free", "free", "bounded"])


class Machine(RuleBasedStateMachine):
    """Operations and what must come of them."""

    def __init__(self, bed: Bed) -> None:
        super().__init__()
        self.bed, self.client = bed, bed.client
        example = next(bed.examples)
        self.spaces = {name: Space(bed, name, example) for name in ("free", "bounded")}
        self.leases: dict[int, tuple[Space, Lease]] = {}
        for space in self.spaces.values():
            space.register()

    # --- what is known ---

    def held(self, space: Space) -> set[bytes]:
        """What must stay: leased, pinned, and whatever comes before."""
        ends = {leased.key for of, lease in self.leases.values() if of is space for leased in lease.parts}
        ends |= {key for key, known in space.chunks.items() if known.pinned}
        return {key for end in ends for key in space.text(end)}

    def leased(self, space: Space, key: bytes | None = None) -> bool:
        return any(
            of is space and (key is None or key in {leased.key for leased in lease.parts})
            for of, lease in self.leases.values()
        )

    def missed(self, space: Space, key: bytes) -> None:
        """A chunk of the dictionary is not there: evicted, where that may be."""
        assert space.name == "bounded", f"{key.hex()[:12]} is gone"
        assert key not in self.held(space), f"{key.hex()[:12]} is gone though somebody holds it"
        space.drop(key)

    def found(self, space: Space, key: bytes) -> None:
        """The daemon has met damage before a reader did, as it reads headers of what a listing has found: then it is a
        miss already, and nothing else is."""
        for part in set(space.chunks[key].bad):
            space.chunks[key].bad.discard(part)
            space.drop(key, part)
        self.look(space)

    def look(self, space: Space) -> None:
        """What a lookup of everything shows, beside the dictionary."""
        keys = list(space.chunks)
        for key, mask in zip(keys, self.bed.ask(lambda: self.client.lookup(space.ns, keys, 5.0)), strict=True):
            if mask == 0:
                self.missed(space, key)
            else:
                assert mask == space.mask(key)

    def reconcile(self) -> None:
        """Have the daemon notice what was done behind its back."""
        self.bed.ask(self.client.reconcile)

    # --- through the socket ---

    @rule(of=spaces, n=numbers, continues=st.booleans(), whole=st.booleans())
    def put(self, of: str, n: int, continues: bool, whole: bool) -> None:
        space = self.spaces[of]
        parent = (space.pick(n) if continues else None) or bytes(32)
        position = space.chunks[parent].position + 256 if parent in space.chunks else 0
        key = space.new_key()
        known = Chunk(parent, position, set())
        space.chunks[key] = known
        for part in space.parts if whole else space.parts[:1]:
            if self.publish(space, key, part, parent, position):
                known.parts.add(part)
        if not known.parts:
            del space.chunks[key]

    def publish(self, space: Space, key: bytes, part: PartId, parent: bytes, position: int) -> bool:
        data = payload(key, part, space.manifest)
        try:
            reservation = self.bed.ask(lambda: self.client.reserve(space.ns, CHUNK // 2, timeout=5.0, key=key))
        except StoreFull:
            assert space.name == "bounded"
            return False
        with reservation:
            meta = chunk.PartMeta(space.ns, key, parent, 256, position, part)
            chunk.write_part(reservation.fd, space.manifest, meta, data)
            return bool(self.client.publish(space.ns, reservation, key, part))

    @rule(of=spaces, n=numbers)
    def put_again(self, of: str, n: int) -> None:
        space = self.spaces[of]
        if (key := space.pick(n)) is not None:
            known = space.chunks[key]
            for part in space.parts:
                if not known.bad and (of == "free" or key in self.held(space)):
                    is_new = self.publish(space, key, part, known.parent, known.position)
                    assert is_new == (part not in known.parts) or (not is_new and of == "bounded")
                    known.parts |= {part} if is_new else set()

    @rule(of=spaces, n=numbers)
    def get(self, of: str, n: int) -> None:
        space = self.spaces[of]
        if (key := space.pick(n)) is not None:
            try:
                refs = [(key, part) for part in sorted(space.chunks[key].parts)]
                lease = self.bed.ask(lambda: self.client.lease(space.ns, refs, timeout=5.0))
            except ChunkNotFound:
                self.found(space, key) if space.chunks[key].bad else self.missed(space, key)
                return
            with lease:
                self.read(space, lease)

    def read(self, space: Space, lease: Lease) -> None:
        """Check the bytes of a lease as an engine does."""
        for key, part, fd, verified, _ in lease.parts:
            bad = part in space.chunks[key].bad
            assert not (bad and verified)
            try:
                with chunk.open_part(os.dup(fd), space.manifest, key, part) as file:
                    assert bytes(file.verify()) == payload(key, part, space.manifest)
                assert not bad
                self.bed.ask(partial(self.client.report, space.ns, key, part))
            except ChunkCorrupt as e:
                assert bad
                self.bed.ask(partial(self.client.report, space.ns, key, part, e.reason))
                space.chunks[key].bad.discard(part)
                space.drop(key, part)

    @rule(of=spaces, n=numbers)
    def lookup(self, of: str, n: int) -> None:
        self.look(self.spaces[of])
        absent = hashlib.sha256(n.to_bytes(4, "little")).digest()
        assert self.bed.ask(lambda: self.client.lookup(self.spaces[of].ns, [absent], 5.0)) == [0]
        with pytest.raises(ChunkNotFound):
            self.bed.ask(lambda: self.client.lease(self.spaces[of].ns, [(absent, self.spaces[of].parts[0])], 5.0))

    @rule(of=spaces, n=numbers, slot=st.integers(0, 3))
    def lease(self, of: str, n: int, slot: int) -> None:
        space = self.spaces[of]
        key = space.pick(n)
        if slot in self.leases or key is None or space.chunks[key].bad:
            return
        try:
            refs = [(key, part) for part in sorted(space.chunks[key].parts)]
            self.leases[slot] = space, self.bed.ask(lambda: self.client.lease(space.ns, refs, timeout=5.0))
        except ChunkNotFound:
            self.missed(space, key)

    @rule(slot=st.integers(0, 3))
    def release(self, slot: int) -> None:
        if slot in self.leases:
            space, lease = self.leases.pop(slot)
            for key, part, fd, _, _ in lease.parts:
                with chunk.open_part(os.dup(fd), space.manifest, key, part) as file:
                    assert bytes(file.verify()) == payload(key, part, space.manifest)
            lease.release()

    @rule(of=spaces, n=numbers)
    def remove(self, of: str, n: int) -> None:
        space = self.spaces[of]
        if (key := space.pick(n)) is not None:
            try:
                self.bed.ask(lambda: self.client.remove(space.ns, key))
                assert not self.leased(space, key)
                space.drop(key)
            except StoreBusy:
                assert self.leased(space, key) or not self.bed.is_settled

    @rule(of=spaces, n=numbers, pinned=st.booleans())
    def pin(self, of: str, n: int, pinned: bool) -> None:
        space = self.spaces[of]
        key = space.pick(n)
        if key is None or (pinned and sum(known.pinned for known in space.chunks.values()) >= 3):
            return
        try:
            self.bed.ask(lambda: self.client.pin(space.ns, key, pinned))
            space.chunks[key].pinned = pinned
        except ChunkNotFound:
            self.missed(space, key)

    @rule(of=spaces, chunks=st.integers(1, 4))
    def evict(self, of: str, chunks: int) -> None:
        space = self.spaces[of]
        before = {key: (known.parent, len(known.parts)) for key, known in space.chunks.items()}
        went, freed = self.bed.ask(lambda: self.client.evict(space.ns, chunks * CHUNK))
        masks = self.bed.ask(lambda: self.client.lookup(space.ns, list(before), 5.0))
        gone = {key for key, mask in zip(before, masks, strict=True) if not mask}
        assert not gone & self.held(space), "what somebody holds was evicted"
        for key in gone:
            space.drop(key)
        assert not {before[key][0] for key in space.chunks} & gone, "a chunk went before one that continues it"
        if space.name == "free":
            assert went == len(gone)
            assert freed == sum(before[key][1] for key in gone) * CHUNK // 2
            assert freed >= chunks * CHUNK or set(space.chunks) <= self.held(space) or not self.bed.is_settled

    @rule(of=spaces)
    def retire(self, of: str) -> None:
        space = self.spaces[of]
        if sum(map(len, (space.chunks, self.leases))) % 5:  # not too often
            return
        try:
            self.bed.ask(lambda: self.client.retire(space.ns))
            assert not self.leased(space)
            space.chunks.clear()
            space.register()
        except StoreBusy:
            assert self.leased(space) or not self.bed.is_settled

    # --- through the mount ---

    @rule(of=spaces, n=numbers)
    def read_a_file(self, of: str, n: int) -> None:
        space = self.spaces[of]
        if (key := space.pick(n)) is not None:
            for part in sorted(space.chunks[key].parts):
                bad = part in space.chunks[key].bad
                try:
                    raw = place(self.bed.mount, key, part, space.manifest).read_bytes()
                except OSError as e:
                    if bad and e.errno in GONE | {errno.EIO}:
                        space.chunks[key].bad.discard(part)
                        space.drop(key, part)
                    else:
                        assert e.errno in GONE, e
                        self.missed(space, key)
                        return
                else:
                    space.opened.add((key, part))
                    assert not bad
                    assert raw.endswith(payload(key, part, space.manifest))

    @rule(of=spaces, n=numbers)
    def unlink(self, of: str, n: int) -> None:
        space = self.spaces[of]
        if (key := space.pick(n)) is not None:
            part = min(space.chunks[key].parts)
            try:
                place(self.bed.mount, key, part, space.manifest).unlink()
                assert not self.leased(space, key)
                space.drop(key)
            except OSError as e:
                if e.errno in GONE:
                    self.missed(space, key)
                else:
                    assert e.errno == errno.EBUSY
                    assert self.leased(space, key) or not self.bed.is_settled

    @rule(of=spaces, n=numbers, spoilt=st.booleans())
    def copy_in(self, of: str, n: int, spoilt: bool) -> None:
        space = self.spaces[of]
        key, part = space.new_key(), space.parts[n % 2]
        raw = bytearray(space.raw(key, part, bytes(32), 0))
        raw[-1 - n % 8000] ^= spoilt
        try:
            with place(self.bed.mount, key, part, space.manifest).open("wb", buffering=0) as file:
                file.write(raw)
        except OSError as e:
            assert spoilt or (of == "bounded" and e.errno == errno.ENOSPC), e
            assert e.errno in {errno.EIO, errno.ENOSPC}
            assert not place(self.bed.store, key, part, space.manifest).exists()
        else:
            assert not spoilt
            space.chunks[key] = Chunk(bytes(32), 0, {part})

    # --- behind its back ---

    @rule(of=spaces, n=numbers)
    def somebody_deletes(self, of: str, n: int) -> None:
        space = self.spaces[of]
        if (key := space.pick(n)) is not None and not self.leased(space, key):
            part = min(space.chunks[key].parts)
            with contextlib.suppress(FileNotFoundError):
                place(self.bed.store, key, part, space.manifest).unlink()
            with pytest.raises(ChunkNotFound):
                self.bed.ask(lambda: self.client.lease(space.ns, [(key, part)], 5.0))
            self.reconcile()
            space.chunks[key].bad.discard(part)
            space.drop(key, part)

    @rule(of=spaces)
    def somebody_adds(self, of: str) -> None:
        space = self.spaces[of]
        key = space.new_key()
        with Store.open(self.bed.store) as store:
            put(store, key, manifest=space.manifest)
        space.chunks[key] = Chunk(bytes(32), 0, set(space.parts))
        self.reconcile()

    @rule(of=spaces, n=numbers, at=st.integers(0, CHUNK // 2 - 1))
    def somebody_damages(self, of: str, n: int, at: int) -> None:
        space = self.spaces[of]
        if of == "free" and (key := space.pick(n)) is not None and not self.leased(space, key):
            part = min(space.chunks[key].parts)
            if part not in space.chunks[key].bad:
                damage(place(self.bed.store, key, part, space.manifest), at)
                space.chunks[key].bad.add(part)
                by_name = at % 2 and (key, part) not in space.opened  # the mount promises that of the first open
                self.read_a_file(of, n) if by_name else self.get(of, n)
                if key in space.chunks:
                    assert part not in space.chunks[key].parts

    @rule(n=st.integers(0, 999))
    def accident(self, n: int) -> None:
        """Now and then the worker is killed, or replaced."""
        if 500 <= n < 530:
            self.bed.replace_worker(kill=n % 3 > 0)

    # --- the end ---

    def teardown(self) -> None:
        self.bed.done += STEPS
        try:
            self.reconcile()
            for space in self.spaces.values():
                self.look(space)
            free = self.spaces["free"]
            on_disk = {path.name.split(".")[0] for path in (self.bed.store / free.manifest.ns_hex).glob("???/*")}
            assert on_disk == {key.hex() for key in free.chunks}
            if self.bed.is_settled:
                until(self.is_within_budget, limit=10)
        finally:
            for _, lease in self.leases.values():
                lease.release()
            self.bed.retire(*self.spaces.values())

    def is_within_budget(self) -> bool:
        stats = self.bed.ask(self.client.stats)
        used = sum(each["bytes"] for each in stats["namespaces"] if each["name"] == "bounded")
        return used <= BOUND * CHUNK * 1.01 or set(self.spaces["bounded"].chunks) <= self.held(self.spaces["bounded"])


def test_a_mounted_store_is_a_dictionary(tmp_path: Path, mountpoint: Path) -> None:
    Store.init(tmp_path / "kv").close()
    config = {
        "namespace_budgets": (("bounded", Amount(BOUND * CHUNK, 0.0)),),
        "write_budget": None,
        "snapshot_interval": 1.0,
        "scrub_rate": 0,
        **NO_FLOOR,
    }
    with mounted(tmp_path / "kv", mountpoint, logs="died|damaged", **config), MountClient(mountpoint) as client:
        bed = Bed(tmp_path / "kv", mountpoint, client)
        how = settings(
            max_examples=OPERATIONS // STEPS,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate] if LONG else [Phase.generate, Phase.shrink],
            database=None,
        )
        run_state_machine_as_test(lambda: Machine(bed), settings=how)
        bed.replace_worker(kill=True)  # at least once, however few operations there are
    report(f"{bed.done} operations, {bed.accidents} workers replaced: 0 divergences")
