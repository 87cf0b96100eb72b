"""All damage is found, and nothing sound is called damaged: every bit of a header, bits of the payload, every cut.

The parts are small, so that tens of thousands of flips take seconds; each is made in a file, which is then read as any
reader reads it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvfs import _native, chunk
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.errors import ChunkCorrupt, ChunkNotFound
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.metrics import Metrics
from kvfs.verify import Verifier
from tests.samples import new_key, new_store, payload, put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvfs.store import Store
    from tests.conftest import Logs

SMALL = Manifest(
    weights="ab" * 32,
    config={},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", (0, 1), 2, 16, 16), GroupKind("swa512", (2,), 2, 16, 16)),
)
NS = SMALL.ns
PART, TOKENS = PartId("full", 0), 64
KEY, OTHER = bytes([7] * 32), bytes([9] * 32)
SEED = 20250101
PAYLOAD_FLIPS = 10_000
READS = 100_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store", SMALL) as made:
        for key in (KEY, OTHER):
            put(made, key, manifest=SMALL, tokens=TOKENS)
        yield made


def place(store: Store, key: bytes = KEY, part: PartId = PART) -> Path:
    return store.path / SMALL.ns_hex / key.hex()[:3] / f"{key.hex()}.{part}.safetensors"


@pytest.fixture(params=["always", "first-open"])
def read(request: pytest.FixtureRequest, store: Store) -> Callable[[], None]:
    """One read as a mount does it, raising ChunkCorrupt.

    With ``always`` each file was found whole just before, in the very state it is in: what rots below the filesystem
    changes no time. The default promises the first open only, so there nothing is known yet.
    """
    verifier = Verifier(store, always=request.param == "always")

    def once() -> None:
        if request.param == "always":
            verifier.mark(place(store).stat())
        opened = verifier.open(NS, KEY, PART)
        try:
            assert not opened.verified
            verifier.check(opened.fd, NS, KEY, PART)
        finally:
            os.close(opened.fd)

    return once


def reason(read: Callable[[], None]) -> str | None:
    """Why a read was refused; None if it was not."""
    try:
        read()
    except ChunkCorrupt as e:
        return e.reason
    return None


def missed(store: Store, read: Callable[[], None], bits: Iterator[int]) -> list[int]:
    """Flip each bit in turn, in place, and name those that a read did not notice."""
    path = place(store)
    path.chmod(0o640)
    found = []
    fd = os.open(path, os.O_RDWR)
    for bit in bits:
        [was] = os.pread(fd, 1, bit // 8)
        os.pwrite(fd, bytes([was ^ 1 << bit % 8]), bit // 8)
        if reason(read) is None:
            found.append(bit)
        os.pwrite(fd, bytes([was]), bit // 8)
    os.close(fd)
    assert reason(read) is None  # as it was
    return found


def data_start(store: Store) -> int:
    with chunk.open_part(store.open_part(NS, KEY, PART), SMALL, KEY, PART) as file:
        return file.header.data_start


def test_every_bit_of_the_header(store: Store, read: Callable[[], None]) -> None:
    assert missed(store, read, iter(range(data_start(store) * 8))) == []


def test_ten_thousand_bits_of_the_payload(store: Store, read: Callable[[], None]) -> None:
    start, size = data_start(store) * 8, place(store).stat().st_size * 8
    bits = np.random.default_rng(SEED).choice(np.arange(start, size), PAYLOAD_FLIPS, replace=False)
    assert missed(store, read, iter(bits.tolist())) == []


def test_the_engines_own_reader_finds_the_same(store: Store) -> None:
    """It compares sums while it copies, so that an unverified part is not read twice."""
    with chunk.open_part(store.open_part(NS, KEY, PART), SMALL, KEY, PART) as file:
        layout, sums, data = file.header.layout, file.header.sums, file.read()
    for bit in np.random.default_rng(SEED).choice(len(data) * 8, PAYLOAD_FLIPS, replace=False).tolist():
        data[bit // 8] ^= 1 << bit % 8
        piece = int(np.searchsorted(layout.bounds, bit // 8, side="right")) - 1
        found = np.frombuffer(_native.sums(data, layout.bounds), "<u8") != np.frombuffer(sums, "<u8")
        assert np.flatnonzero(found).tolist() == [piece]
        data[bit // 8] ^= 1 << bit % 8


def test_every_cut_and_growth(store: Store, read: Callable[[], None]) -> None:
    path = place(store)
    whole = path.read_bytes()
    path.chmod(0o640)
    cuts = {*range(0, len(whole), 4096), *(n + d for n in range(0, len(whole), 4096) for d in (-1, 1)), 7, 8, 9}
    for size in [*sorted(cuts & set(range(len(whole)))), len(whole) - 1]:
        os.truncate(path, size)
        assert reason(read) in {"truncated", "header", "size"}, size
        path.write_bytes(whole)
    for more in (b"\0", b"x", b"\0" * 4096, whole, whole[:-1]):
        path.write_bytes(whole + more)
        assert reason(read) == "size"
    os.truncate(path, 1 << 40)  # sparse
    assert reason(read) == "size"
    for at in range(0, len(whole), 4096):  # a page that was never written
        path.write_bytes(whole[:at] + bytes(4096) + whole[at + 4096 :])
        assert reason(read) in {"header", "checksum"}, at
    path.write_bytes(whole)
    assert reason(read) is None


def test_pages_that_changed_places(store: Store, read: Callable[[], None]) -> None:
    path = place(store)
    whole = path.read_bytes()
    path.chmod(0o640)
    pages = [whole[at : at + 4096] for at in range(0, len(whole), 4096)]
    for i in range(len(pages)):
        for j in range(i):
            swapped = [*pages]
            swapped[i], swapped[j] = swapped[j], swapped[i]
            path.write_bytes(b"".join(swapped))
            assert reason(read) in {"header", "checksum"}, (i, j)


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ((OTHER, PART), "wrong-key"),
        ((KEY, PartId("full", 1)), "wrong-part"),
        ((KEY, PartId("swa512", 0)), "wrong-part"),
    ],
)
def test_names_that_changed_places(
    store: Store, read: Callable[[], None], of: tuple[bytes, PartId], says: str, tmp_path: Path
) -> None:
    mine, theirs = place(store), place(store, *of)
    mine.rename(tmp_path / "aside")
    theirs.rename(mine)
    (tmp_path / "aside").rename(theirs)
    assert reason(read) == says


def test_a_part_of_another_namespace(store: Store, read: Callable[[], None], tmp_path: Path) -> None:
    """Same shape, same key: only the namespace in the header tells."""
    alien = dataclasses.replace(SMALL, weights="cd" * 32)
    with new_store(tmp_path / "other", alien) as other:
        put(other, KEY, manifest=alien, tokens=TOKENS)
        path = other.path / alien.ns_hex / KEY.hex()[:3] / place(store).name
        place(store).unlink()
        shutil.copy(path, place(store))
    assert reason(read) == "wrong-ns"


@pytest.mark.parametrize("verify", ["always", "first-open"])
def test_through_the_daemon_damage_is_a_miss_and_in_quarantine(store: Store, verify: str, logs: Logs) -> None:
    """The whole way of a sample: an open is refused, the part is no longer shown, its file and reason are kept."""
    logs.claim("is damaged")
    catalog = Catalog(store, Config(verify=verify), Metrics())
    size = place(store).stat().st_size
    rng = np.random.default_rng(SEED)
    reasons = []
    for bit in rng.choice(size * 8, 50, replace=False).tolist():
        key = new_key()
        put(store, key, PART, manifest=SMALL, tokens=TOKENS)
        catalog.refresh(NS, key, PART)
        path = place(store, key)
        if verify == "always":
            os.close(catalog.open_part(NS, key, PART))
        path.chmod(0o640)
        raw = bytearray(path.read_bytes())
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(ChunkCorrupt) as e:
            catalog.open_part(NS, key, PART)
        reasons.append(e.value.reason)
        assert catalog.lookup(NS, [key]) == [0]
        with pytest.raises(ChunkNotFound):
            catalog.open_part(NS, key, PART)
    assert sorted(entry.reason for entry in store.lost.entries()) == sorted(reasons)


@pytest.mark.parametrize("verify", ["always", "first-open"])
def test_nothing_sound_is_called_damaged(store: Store, verify: str) -> None:
    catalog = Catalog(store, Config(verify=verify), Metrics())
    expected = {(key, part): payload(key, part, SMALL, TOKENS) for key in (KEY, OTHER) for part in SMALL.parts}
    start = data_start(store)
    refs = list(expected)
    for n in range(READS // 2):
        key, part = refs[n % len(refs)]
        fd = catalog.open_part(NS, key, part)
        if n % 97 == 0:
            assert os.pread(fd, 1 << 20, start) == expected[key, part]
        os.close(fd)
    assert catalog.stats()["quarantined"] == {}
    assert store.lost.entries() == []
