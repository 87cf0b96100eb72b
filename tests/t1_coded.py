"""Coded part files on disk: names, both forms of a part, decoding into sealed memory, the bounded area."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import safetensors

from kvfs import chunk, codec
from kvfs.client import StoreClient
from kvfs.coded import open_stored
from kvfs.errors import ChunkCorrupt, ChunkNotFound, StoreBusy
from kvfs.files import is_sealed
from kvfs.hydrate import Area
from kvfs.index import Index
from kvfs.names import parse_file_name, parse_part_name, part_name, part_path
from kvfs.reader import Reader
from kvfs.verify import Verifier
from tests.coded import EXACT, LOSSY, PARTS, coded_file, data_of, new_store, put_coded, put_raw
from tests.daemons import damage
from tests.samples import new_key

if TYPE_CHECKING:
    from kvfs.identity import PartId
    from kvfs.store import Store

NS = EXACT.ns
KEY = bytes(range(32))


def path_of(store: Store, key: bytes, part: PartId, coded: bool) -> Path:
    return store.path / EXACT.ns_hex / part_path(key, part, coded)


def reader_of(store: Store, limit: int = 1 << 30) -> tuple[Reader, list[tuple[bytes, bool]]]:
    """A reader, and what it found to be missing or damaged: keys and forms."""
    lost: list[tuple[bytes, bool]] = []
    return Reader(Verifier(store), Area(limit), lambda _ns, key, _part, _e, coded: lost.append((key, coded))), lost


def test_names_of_forms() -> None:
    raw, coded = part_name(KEY, PARTS[0]), part_name(KEY, PARTS[0], coded=True)
    assert coded == raw.replace(".safetensors", ".cachegen.safetensors")
    assert parse_file_name(raw) == (KEY, PARTS[0], False)
    assert parse_file_name(coded) == (KEY, PARTS[0], True)
    assert parse_part_name(raw) == (KEY, PARTS[0])
    assert parse_part_name(coded) is None, "a mount shows raw names only"
    assert parse_file_name(coded.replace(".cachegen", ".cachegem")) is None


def test_a_part_with_both_forms_is_one_part(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, KEY, "lossless", keep_raw=True)
        assert store.masks(NS, [KEY]) == [EXACT.all_parts]
        assert sorted((f.part, f.coded) for f in store.scan(NS)) == [(p, c) for p in PARTS for c in (False, True)]
        store.remove(NS, KEY, PARTS, [False])
        assert store.masks(NS, [KEY]) == [EXACT.all_parts]
        assert store.quarantine(NS, KEY, PARTS[0], "checksum") is False, "there is no raw form"
        assert store.quarantine(NS, KEY, PARTS[0], "checksum", coded=True) is True
        assert [entry.is_part for entry in store.lost.entries()] == [True]
        assert store.masks(NS, [KEY]) == [EXACT.bit(PARTS[1])]
        store.remove(NS, KEY, PARTS)
        assert list(store.scan(NS)) == []


def test_the_index_counts_files_of_both_forms(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, KEY, "lossless", keep_raw=True)
        put_coded(store, EXACT, other := new_key(), "lossless")
        index = Index(store)
        assert index.reconcile() == (4, 0)
        for key in (KEY, other):
            with coded_file(store, EXACT, key, PARTS[0]) as file:
                index.learn(NS, file.header.meta)
        on_disk = {found.entry.path: found.entry.stat().st_size for found in store.scan(NS)}
        assert index.totals(NS) == (2, sum(on_disk.values()))
        coded = sum(size for path, size in on_disk.items() if ".cachegen." in path)
        forms = index.forms(NS)
        assert (forms.raw, forms.coded) == (sum(on_disk.values()) - coded, coded)
        data = sum(chunk.layout(EXACT, part, 256).nbytes for part in PARTS)
        assert forms.saved == data - coded, "one chunk has its raw form still"
        index.save()
        again = Index(store)
        assert again.load()
        assert again.forms(NS) == forms
        store.remove(NS, KEY, PARTS, [False])
        store.remove(NS, other, [PARTS[0]], [True])
        gone = []
        assert again.reconcile(lambda _ns, key, part, appeared: gone.append((key, part, appeared))) == (0, 1)
        assert set(gone) == {(KEY, PARTS[0], False), (KEY, PARTS[1], False), (other, PARTS[0], False)}, "or changed"
        again.check_integrity()
        left = sum(found.entry.stat().st_size for found in store.scan(NS))
        assert abs(again.totals(NS)[1] - left) < 2000, "a part that is gone was of about the mean size"


def test_what_a_part_decodes_to(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT, LOSSY) as store:
        put_coded(store, EXACT, KEY, "lossless", keep_raw=True)
        with coded_file(store, EXACT, KEY, PARTS[0]) as file:
            size = file.raw_size()
            fd = file.decode()
        original = path_of(store, KEY, PARTS[0], False).read_bytes()
        assert Path(f"/proc/self/fd/{fd}").read_bytes() == original
        assert size == len(original)
        assert is_sealed(fd)
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as writable, pytest.raises(PermissionError):
            writable.write(b"x")
        os.close(fd)

        put_coded(store, LOSSY, KEY, "medium")
        with coded_file(store, LOSSY, KEY, PARTS[0]) as file:
            fd = file.decode()
        with safetensors.safe_open(f"/proc/self/fd/{fd}", "np") as shown:
            assert shown.metadata()["kvfs.writer"].endswith("from cachegen-medium"), "the header says what it is"
        with chunk.open_part(fd, LOSSY, KEY, PARTS[0]) as part:
            assert bytes(part.verify()) != data_of(KEY, PARTS[0])


def test_one_decode_for_all_who_wait(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, KEY, "lossless")
        reader, _ = reader_of(store)
        start, got = threading.Barrier(8), []

        def read() -> None:
            start.wait()
            opened = reader.open(NS, KEY, PARTS[0])
            with chunk.open_part(opened.fd, EXACT, KEY, PARTS[0]) as file:
                got.append(bytes(file.verify()))

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert got == [data_of(KEY, PARTS[0])] * 8
        assert reader.area.decoded == reader.area.used == 135168
        reader.area.close()


def test_the_area_is_bounded_by_what_is_in_use(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, KEY, "lossless")
        put_coded(store, EXACT, other := new_key(), "lossless")
        reader, lost = reader_of(store, limit=300_000)  # two parts
        first, second = (reader.open(NS, KEY, part) for part in PARTS)
        with pytest.raises(StoreBusy, match="memory for decoded parts"):
            reader.open(NS, other, PARTS[0])
        os.close(first.fd)
        third = reader.open(NS, other, PARTS[0])
        assert reader.area.used <= 300_000
        os.close(second.fd)
        os.close(third.fd)
        assert lost == []
        os.close(reader.open(NS, KEY, PARTS[1]).fd)
        assert reader.area.decoded == 3 * 135168, "what nobody uses is kept as long as there is room"
        reader.area.close()
        tiny, _ = reader_of(store, limit=1)
        os.close(tiny.open(NS, KEY, PARTS[0]).fd)  # one part is always possible
        tiny.area.close()


@pytest.mark.parametrize(("at", "reason"), [(200, "header"), (-1, "checksum")], ids=["header", "stream"])
def test_a_damaged_stream_is_put_away_and_a_miss(tmp_path: Path, at: int, reason: str) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, KEY, "lossless")
    damage(tmp_path / "s" / EXACT.ns_hex / part_path(KEY, PARTS[0], coded=True), at)
    with StoreClient(tmp_path / "s") as client:
        with pytest.raises(ChunkCorrupt) as failed:
            client.lease(NS, [(KEY, PARTS[0])], 10)
        assert failed.value.reason == reason
        assert client.lookup(NS, [KEY], 10) == [EXACT.bit(PARTS[1])]
        with pytest.raises(ChunkNotFound):
            client.lease(NS, [(KEY, PARTS[0])], 10)
        with client.lease(NS, [(KEY, PARTS[1])], 10) as lease:
            assert (lease.parts[0].form, lease.parts[0].verified) == ("raw", True)


def test_damage_of_one_form_leaves_the_other(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, KEY, "lossless", keep_raw=True)
        damage(path_of(store, KEY, PARTS[0], coded=False))
        verifier = Verifier(store)
        found = verifier.recheck(NS, KEY, PARTS[0])
        assert {coded: e and e.reason for coded, e in found.items()} == {False: "checksum", True: None}
        store.quarantine(NS, KEY, PARTS[0], "checksum")
        with open_stored(store, NS, KEY, PARTS[0]) as file:
            assert file.header.form == "cachegen-lossless"
        assert verifier.recheck(NS, KEY, PARTS[0]) == {True: None}


def test_a_lossy_file_in_an_exact_namespace_is_refused(tmp_path: Path) -> None:
    """Whoever puts one there: its header says lossy, or lies and does not pass."""
    with new_store(tmp_path / "s", EXACT, LOSSY) as store:
        put_coded(store, LOSSY, KEY, "medium")
        blob = (store.path / LOSSY.ns_hex / part_path(KEY, PARTS[0], coded=True)).read_bytes()
        with pytest.raises(ChunkCorrupt, match="wrong-ns"):
            codec.CodedPart.parse(blob, len(blob)).expect(EXACT, KEY, PARTS[0])
        put_raw(store, EXACT, KEY)
        store.remove(NS, KEY, [PARTS[0]])
        path = path_of(store, KEY, PARTS[0], coded=True)
        path.write_bytes(blob)
        reader, lost = reader_of(store)
        for coded in (False, True):
            with pytest.raises(ChunkCorrupt, match="wrong-ns"):
                reader.open(NS, KEY, PARTS[0], coded=coded)
        assert lost == [(KEY, True)] * 2
