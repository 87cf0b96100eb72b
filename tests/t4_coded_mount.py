"""Coded parts through a mount: always plain safetensors of the raw size, whatever happens behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import safetensors

from kvfs import chunk
from kvfs.client import MountClient
from kvfs.errors import ChunkNotFound
from kvfs.names import part_path
from tests.coded import EXACT, LOSSY, PARTS, data_of, new_store, put_coded, put_raw
from tests.daemons import damage
from tests.mounted import mounted, needs_mount, output, place, processes, until
from tests.samples import new_key

pytestmark = needs_mount
NS = EXACT.ns
SIZE = 135168


@pytest.mark.parametrize("transport", ["kernel", "libfuse"])
def test_a_coded_part_reads_as_a_raw_one(tmp_path: Path, mountpoint: Path, transport: str) -> None:
    with new_store(tmp_path / "s", EXACT, LOSSY) as store:
        put_raw(store, EXACT, key := new_key())
        original = place(store.path, key, PARTS[0], EXACT).read_bytes()
        store.remove(NS, key, PARTS)
        put_coded(store, EXACT, key, "lossless")
        put_coded(store, LOSSY, lossy := new_key(), "medium")
    with mounted(tmp_path / "s", mountpoint, transport) as mount:
        shown = place(mount, key, PARTS[0], EXACT)
        assert sorted(os.listdir(shown.parent)) == sorted(place(mount, key, part, EXACT).name for part in PARTS)
        assert output("stat", "-c", "%s %a %h", shown).split() == [str(SIZE), "440", "1"]
        copy = tmp_path / "copy"
        output("cp", shown, copy)
        assert copy.read_bytes() == original
        with safetensors.safe_open(shown, "np") as opened:
            assert opened.metadata()["kvfs.form"] == "raw"
        for name, value in {"form": b"cachegen-lossless", "tokens": b"256"}.items():
            assert os.getxattr(shown, f"user.kvfs.{name}") == value
        assert int(os.getxattr(shown, "user.kvfs.stored")) < SIZE * 0.7
        with safetensors.safe_open(place(mount, lossy, PARTS[0], LOSSY), "np") as opened:
            assert opened.metadata()["kvfs.writer"].endswith("from cachegen-medium")
        with MountClient(mount) as client:
            assert client.stats()["compaction"]["hydrated"]["decoded"] == 2 * SIZE, "each part once"
        output("rm", "-f", shown)
        # The whole chunk goes, in whatever form; the kernel hears of its other parts once it holds the folder no more.
        until(lambda: not os.path.lexists(place(mount, key, PARTS[1], EXACT)))
    assert not [name for name in os.listdir(tmp_path / "s" / EXACT.ns_hex / key.hex()[:3]) if key.hex() in name]


def test_readers_go_on_while_forms_change(tmp_path: Path, mountpoint: Path) -> None:
    """Opens, maps and leases of before read on; what is opened afterwards is the same bytes under another node."""
    with new_store(tmp_path / "s", EXACT) as store:
        keys = [new_key() for _ in range(3)]
        for key in keys:
            put_raw(store, EXACT, key)
        want = {(key, part): place(store.path, key, part, EXACT).read_bytes() for key in keys for part in PARTS}
    with mounted(tmp_path / "s", mountpoint, heat_hits=1000) as mount, MountClient(mount) as client:
        before = {ref: place(mount, *ref, EXACT).open("rb") for ref in want}
        stop, wrong, rounds = threading.Event(), [], []

        def read() -> None:
            while not stop.is_set():
                for ref, data in want.items():
                    try:
                        if place(mount, *ref, EXACT).read_bytes() != data:
                            wrong.append(ref)
                    except OSError as e:
                        wrong.append(e)
                rounds.append(1)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        until(lambda: rounds)
        swept = client.compact(NS, 0, 30)
        assert swept["done"]
        until(lambda: client.compact(NS, 0, 30)["chunks"] == 0 and len(rounds) > 6)
        stop.set()
        for reader in readers:
            reader.join(30)
        assert wrong == []
        assert not list(Path(tmp_path / "s" / EXACT.ns_hex).glob("*/*.h[01].safetensors")), "all are coded now"
        for ref, file in before.items():
            assert file.read() == want[ref]
            assert os.stat(place(mount, *ref, EXACT)).st_ino != os.fstat(file.fileno()).st_ino
            file.close()
        with client.lease(NS, [(keys[0], part) for part in PARTS], 10) as lease:
            for leased in lease.parts:
                with chunk.open_part(os.dup(leased.fd), EXACT, leased.key, leased.part) as part:
                    assert part.verify() == data_of(leased.key, leased.part)
        with client.lease(NS, [(keys[0], part) for part in PARTS], 10, coded=True) as lease:
            assert {leased.form for leased in lease.parts} == {"cachegen-lossless"}


def test_a_worker_without_rights_compacts_and_lends(tmp_path: Path, mountpoint: Path) -> None:
    """Its decoded parts are lent by the keeper, which reads nothing of them."""
    with new_store(tmp_path / "s", EXACT) as store:
        put_raw(store, EXACT, key := new_key())
    for folder in (tmp_path.parent, tmp_path, tmp_path.parent.parent):
        folder.chmod(0o755)
    output("chown", "-R", "65534:65534", tmp_path / "s")
    with mounted(tmp_path / "s", mountpoint, worker_user="65534") as mount, MountClient(mount) as client:
        until(lambda: client.compact(NS, 0, 10)["chunks"] == 1)
        for part in PARTS:
            assert place(mount, key, part, EXACT).read_bytes()[4096:] == data_of(key, part)
        counts = client.stats()["metrics"]["kvfs_fuse_requests_total"]
        assert counts["op=open,result=ok"] == 2
        assert counts.get("op=read,result=ok", 0) == 0, "the kernel reads them by itself"


def test_damage_is_an_error_once_and_then_a_miss(tmp_path: Path, mountpoint: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, key := new_key(), "lossless")
        damage(store.path / EXACT.ns_hex / part_path(key, PARTS[0], coded=True))
        damage(store.path / EXACT.ns_hex / part_path(key, PARTS[1], coded=True), 300)
    with mounted(tmp_path / "s", mountpoint, logs="in lost.found", scrub_rate=0) as mount, MountClient(mount) as client:
        with pytest.raises(OSError, match="Input/output"):
            place(mount, key, PARTS[0], EXACT).read_bytes()
        until(lambda: not os.path.lexists(place(mount, key, PARTS[0], EXACT)))
        with pytest.raises(OSError, match="Input/output"):
            place(mount, key, PARTS[1], EXACT).stat()
        until(lambda: not os.path.lexists(place(mount, key, PARTS[1], EXACT)))
        assert client.lookup(NS, [key], 5) == [0]
        with pytest.raises(ChunkNotFound):
            client.lease(NS, [(key, PARTS[1])], 10)
        assert client.stats()["quarantined"] == {"checksum": 1, "header": 1}


def test_a_worker_dies_and_open_parts_read_on(tmp_path: Path, mountpoint: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        put_coded(store, EXACT, key := new_key(), "lossless")
    with mounted(tmp_path / "s", mountpoint, logs="died .signal 9.") as mount, MountClient(mount) as client:
        with place(mount, key, PARTS[0], EXACT).open("rb") as shown:
            first = shown.read(4096)
            worker = processes(tmp_path / "s")["worker"]
            os.kill(worker, signal.SIGKILL)
            until(lambda: processes(tmp_path / "s").get("worker", worker) != worker)
            rest = shown.read()
        with place(mount, key, PARTS[0], EXACT).open("rb") as again:
            assert again.read() == first + rest
        until(lambda: client.stats(5)["uptime"] < 20)


def test_memory_for_decoded_parts_is_bounded(tmp_path: Path, mountpoint: Path) -> None:
    with new_store(tmp_path / "s", EXACT) as store:
        keys = [new_key() for _ in range(12)]
        for key in keys:
            put_coded(store, EXACT, key, "lossless")
    with mounted(tmp_path / "s", mountpoint, hydrate_limit=8 * SIZE + 1) as mount, MountClient(mount) as client:
        held = [place(mount, keys[0], part, EXACT).open("rb") for part in PARTS]
        for key in keys:
            for part in PARTS:
                assert place(mount, key, part, EXACT).read_bytes()[-SIZE + 4096 :] == data_of(key, part)
            assert client.stats()["compaction"]["hydrated"]["bytes"] <= 8 * SIZE + 1
        more = [place(mount, key, part, EXACT).open("rb") for key in keys[1:4] for part in PARTS]
        with pytest.raises(OSError, match="busy"):
            place(mount, keys[5], PARTS[0], EXACT).open("rb")
        for file in (*held, *more):
            file.close()
        until(lambda: opens(place(mount, keys[5], PARTS[0], EXACT)))


def opens(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True
