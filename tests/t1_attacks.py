"""Hostile input that is bytes (`tests.attacks`): refused with a typed error, at once, without memory to speak of."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from kvfs import _native, chunk, index, verify
from kvfs.chunk import ALIGNMENT
from kvfs.config import Config
from kvfs.daemon import scrub
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.scrub import Scrubber
from kvfs.daemon.wear import Wear
from kvfs.errors import ChunkCorrupt, IdentityError, KvfsError, ProtocolError
from kvfs.files import write_new
from kvfs.index import Index
from kvfs.metrics import Metrics
from kvfs.protocol import check_request, decode
from kvfs.store import Store
from kvfs.verify import Verifier
from tests.attacks import derived, frames, headers, manifests
from tests.attacks.__main__ import KINDS
from tests.samples import MANIFEST, new_store, put
from tests.small import NS, SMALL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Logs

SOON = 0.1
MIB = 1 << 20


@contextlib.contextmanager
def bounded(memory: int = MIB, seconds: float = SOON) -> Iterator[None]:
    """Neither time nor memory out of proportion."""
    tracemalloc.start()
    begun = time.thread_time()
    try:
        yield
        assert time.thread_time() - begun < seconds * 4  # tracing makes it slower
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


def test_there_are_enough_of_them() -> None:
    assert sum(map(len, KINDS.values())) > 130
    assert all(len(attacks) == len({*attacks.values()}) for attacks in KINDS.values())


@pytest.mark.parametrize("name", headers.ATTACKS)
@pytest.mark.parametrize("sealed", [False, True])
def test_headers(name: str, sealed: bool) -> None:
    """Also when the attacker computes the header's checksum as we do."""
    raw = headers.seal(headers.ATTACKS[name]) if sealed else headers.ATTACKS[name]
    with bounded(), pytest.raises(ChunkCorrupt):
        chunk.parse_header(raw, headers.SIZE)


@pytest.mark.parametrize("name", headers.ATTACKS)
def test_headers_in_a_store(tmp_path: Path, name: str, logs: Logs) -> None:
    """As the file of a part, which a daemon shows to nobody and puts away."""
    logs.claim("is damaged")
    key, part = headers.KEY, headers.PART
    with new_store(tmp_path / "store") as store:
        put(store, key, part)
        path = next(tmp_path.glob("store/*/*/*.safetensors"))
        path.chmod(0o640)
        raw = headers.seal(headers.ATTACKS[name])
        path.write_bytes(raw + path.read_bytes()[ALIGNMENT:] if len(raw) == ALIGNMENT else raw)
        catalog = Catalog(store, Config(), Metrics())
        with bounded(), pytest.raises(ChunkCorrupt):
            catalog.open_part(MANIFEST.ns, key, part)
        assert catalog.lookup(MANIFEST.ns, [key]) == [0]
        assert len(store.lost.entries()) == 1


@pytest.mark.parametrize("name", manifests.ATTACKS)
def test_manifests(tmp_path: Path, name: str) -> None:
    """In a store, instead of that of a namespace; what comes by the socket is in t3_hostile_peers."""
    text = manifests.ATTACKS[name]
    new_store(tmp_path / "store").close()
    path = tmp_path / "store" / MANIFEST.ns_hex / "manifest.json"
    path.unlink()
    path.write_text(f'{{"identity":{text},"info":{{}}}}' if name != "nested lists" else text)
    with Store.open(tmp_path / "store") as store, bounded(memory=64 * MIB, seconds=1.0):
        with pytest.raises(IdentityError):
            store.manifest(MANIFEST.ns)
        assert store.namespaces() == []


@pytest.mark.parametrize("name", derived.SNAPSHOTS)
def test_snapshots(tmp_path: Path, name: str) -> None:
    """None of them is believed: the store is listed, and everything is found."""
    with new_store(tmp_path / "store", SMALL) as store:
        for n in range(1, 5):
            put(store, bytes([n]) * 32, manifest=SMALL)
        rows = Index(store)
        rows.snapshot_path.write_bytes(derived.SOUND)
        assert rows.load()
        rows.snapshot_path.write_bytes(derived.SNAPSHOTS[name])
        with bounded(memory=4 * MIB):
            rows = Index(store)
            assert not rows.load()
        rows.reconcile()
        rows.check_integrity()
        assert rows.totals(NS)[0] == 4


@pytest.mark.parametrize("name", [name for name in derived.SNAPSHOTS if name not in derived.ROWS])
def test_states_of_the_scrubber(tmp_path: Path, name: str) -> None:
    """They are maps of columns too; what such a map says is only when something was read."""
    body = derived.SNAPSHOTS[name].removeprefix(index._MAGIC)[8:]
    with new_store(tmp_path / "store", SMALL) as store:
        catalog = Catalog(store, Config(), Metrics())
        path = Scrubber(catalog, MIB)._path
        path.write_bytes(scrub.MAGIC + struct.pack("<Q", _native.xxh3_64(body)) + body)
        with bounded(memory=4 * MIB):  # its window is one
            assert Scrubber(catalog, MIB)._read == {}


@pytest.mark.parametrize("name", derived.CHECKED)
def test_states_of_verification(tmp_path: Path, name: str) -> None:
    body = derived.CHECKED[name]
    path = tmp_path / "verified"
    path.write_bytes(verify._MAGIC + struct.pack("<Q", _native.xxh3_64(body)) + body)
    with new_store(tmp_path / "store") as store, bounded():
        assert not Verifier(store).load(path)


@pytest.mark.parametrize("name", derived.NOTES)
def test_small_documents(tmp_path: Path, name: str) -> None:
    """As a note in lost+found, as what is known of the day's writes, and as the marker of a store."""
    raw = derived.NOTES[name]
    with new_store(tmp_path / "store") as store:
        put(store, headers.KEY)
        store.quarantine(MANIFEST.ns, headers.KEY, headers.PART, "checksum")
        [note] = (tmp_path / "store" / "lost+found").glob("*.json")
        note.unlink()
        note.write_bytes(raw)
        with bounded(memory=16 * MIB, seconds=1.0):
            [entry] = store.lost.entries()
            assert entry.is_part
            json.dumps(entry)
            store.lost.remove(entry.name)
        (tmp_path / "written").write_bytes(raw)
        with bounded(memory=16 * MIB, seconds=1.0):
            assert Wear(tmp_path / "written", None).today() == 0
    marker = tmp_path / "store" / "kvfs-store.json"
    marker.unlink()
    marker.write_bytes(raw)
    with bounded(memory=16 * MIB, seconds=1.0), pytest.raises(KvfsError):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("name", frames.ATTACKS)
def test_frames(name: str) -> None:
    """The body of a frame; how a channel meets its length is in t1_protocol."""
    with bounded(), pytest.raises(ProtocolError):
        check_request(decode(frames.ATTACKS[name][4:]))


def test_a_file_that_the_disk_takes_in_pieces_is_whole(tmp_path: Path) -> None:
    """A manifest is larger than what may be left of a limit; it is there whole, or not at all."""
    import resource
    import signal

    text = b"x" * 100_000
    folder = os.open(tmp_path, os.O_RDONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        with pytest.raises(OSError, match="too large"):
            write_new(folder, "manifest", text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == []
    write_new(folder, "manifest", text)
    os.close(folder)
    assert (tmp_path / "manifest").read_bytes() == text
