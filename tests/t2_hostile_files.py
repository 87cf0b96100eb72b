"""What somebody with write access to a store plants in it: refused with a typed error, soon, and nothing outside the
store is read, written or removed.  Headers that lie are in t1_chunk, damage is in t1_damage."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvfs import chunk
from kvfs.daemon.incoming import Incoming
from kvfs.daemon.tree import Place, What, find
from kvfs.daemon.view import View
from kvfs.errors import KvfsError
from kvfs.identity import PartId
from kvfs.index import Index
from kvfs.names import is_ns, is_temp, parse_part_name, part_name, part_path
from kvfs.store import Store
from tests.daemons import catalog_of
from tests.samples import MANIFEST, new_key, new_store, payload, put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvfs.daemon.catalog import Catalog
    from tests.conftest import Logs

NS = MANIFEST.ns
PART = MANIFEST.parts[0]
KEY = bytes([9]) * 32
SECRET = "the secret of another folder"
HUGE = 1 << 40
SOON = 1.0
ROUNDS = 10_000


def sparse(path: Path, size: int = HUGE) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: it never ends
    except PermissionError:
        pytest.skip("making a device takes root")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(path.parent, os.O_RDONLY)
        try:
            sock.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def setuid(path: Path) -> None:
    path.write_bytes(b"\x7fELF")
    path.chmod(0o6755)


PLANTS: dict[str, Callable[[Path, Path], object]] = {
    "link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "link to a folder": lambda path, outside: path.symlink_to(outside),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "hard link": lambda path, outside: path.hardlink_to(outside / "file"),
    "FIFO": lambda path, _: os.mkfifo(path),
    "socket": lambda path, _: unix_socket(path),
    "device": lambda path, _: device(path),
    "folder": lambda path, _: path.mkdir(),
    "huge and sparse": lambda path, _: sparse(path),
    "setuid": lambda path, _: setuid(path),
}

ns_folder = NS.hex()
PLACES = {
    "part": f"{ns_folder}/{part_path(KEY, PART)}",
    "leaf folder": f"{ns_folder}/{KEY.hex()[:3]}",
    "manifest": f"{ns_folder}/manifest.json",
    "temp folder": f"{ns_folder}/tmp",
    "namespace": ns_folder,
    "lost+found": "lost+found",
    "index": f".kvfs/index.{socket.gethostname()}.snapshot",
    "verified": f".kvfs/verified.{socket.gethostname()}",
    "written": f".kvfs/written.{socket.gethostname()}",
    "derived": ".kvfs",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store that a daemon has used and left."""
    with new_store(tmp_path / "store") as store:
        put(store, KEY)
        put(store, bytes(32))
    with catalog_of(tmp_path / "store") as catalog:
        catalog.save()
        catalog.close()
    return tmp_path / "store"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that is not the store's business; what is in it must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text(SECRET)
    (folder / part_name(KEY, PART)).write_text(SECRET)
    (folder / ("0" * 32)).write_text(SECRET)
    yield folder
    names = {"file", part_name(KEY, PART), "0" * 32}
    assert set(os.listdir(folder)) == names
    assert all((folder / name).read_text() == SECRET for name in names)


def peak() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def bounded(memory: int = 64 << 20) -> Iterator[None]:
    """Neither time nor memory out of proportion."""
    begun, before = time.monotonic(), peak()
    yield
    assert time.monotonic() - begun < SOON
    assert peak() - before < memory


def reply(work: Callable[[], object]) -> bytes:
    """What an operation gave, as bytes; it may refuse with a typed error only."""
    begun = time.monotonic()
    try:
        return repr(work()).encode()
    except KvfsError:
        return b""
    finally:
        assert time.monotonic() - begun < SOON


def reading(catalog: Catalog) -> Iterator[bytes]:
    """Everything that reads or lists, on the daemon's side."""
    for key in (KEY, bytes(32)):
        for part in MANIFEST.parts:
            try:
                fd = catalog.open_part(NS, key, part)
            except KvfsError:
                continue
            yield os.read(fd, 1 << 20)
            os.close(fd)
    store = catalog.store
    yield reply(lambda: [store.masks(NS, [KEY]), store.manifest(NS), store.info(NS)])
    yield reply(lambda: [found.key for found in store.scan(NS)])
    yield reply(store.namespaces)
    yield reply(catalog.reconcile)
    yield reply(catalog.stats)
    view = View(catalog, catalog.config, "")
    for shown in (f"/{ns_folder}/manifest.json", f"/{ns_folder}/{part_path(KEY, PART)}", "/", f"/{ns_folder}"):
        with contextlib.suppress(OSError, KvfsError):  # errors of the kernel are what a filesystem answers
            opened = view.open_file(shown, os.O_RDONLY)
            if isinstance(opened, int):
                yield os.pread(opened, 1 << 20, 0)
                os.close(opened)
            else:
                yield opened
        with contextlib.suppress(OSError, KvfsError):
            yield repr(view.readdir(shown)).encode()


def publish(catalog: Catalog) -> None:
    """A part of a new chunk in the leaf folder of `KEY`."""
    key = KEY[:2] + os.urandom(30)
    temp = catalog.reserve(NS, 1 << 16)
    try:
        meta = chunk.PartMeta(NS, key, bytes(32), 256, 0, PART)
        chunk.write_part(temp.fd, MANIFEST, meta, payload(key, PART))
    finally:
        os.close(temp.fd)
    catalog.publish_file(NS, temp.name, key, PART)


def writing(catalog: Catalog) -> Iterator[bytes]:
    """Everything that makes, moves or removes."""
    yield reply(lambda: publish(catalog))
    yield reply(lambda: catalog.register(MANIFEST, {}))
    yield reply(lambda: catalog.discard(NS, "0" * 32))
    yield reply(lambda: catalog.store.reap_temps(NS, -1.0))
    yield reply(lambda: catalog.remove_chunk(NS, KEY))
    yield reply(lambda: catalog.damaged(NS, bytes(32), PART, "checksum"))
    catalog.save()  # a failure is logged
    yield reply(catalog.close)


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("place", PLACES)
def test_planted_files(path: Path, outside: Path, place: str, plant: str, logs: Logs) -> None:
    """Before a daemon starts, with the rights of the store's owner."""
    target = path / PLACES[place]
    if target.exists() or target.is_symlink():
        target.rename(path.parent / "taken away")
    PLANTS[plant](target, outside)
    with bounded(), contextlib.suppress(KvfsError), catalog_of(path) as catalog:
        for answer in (*reading(catalog), *writing(catalog)):
            assert SECRET.encode() not in answer
    forget_warnings(logs)


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("place", ["part", "leaf folder", "temp folder", "namespace", "lost+found", "derived"])
def test_files_planted_under_a_daemon(path: Path, outside: Path, place: str, plant: str, logs: Logs) -> None:
    """It knows the store already, and holds folders open."""
    with bounded(), catalog_of(path) as catalog:
        catalog.reconcile()
        os.close(catalog.open_part(NS, KEY, PART))
        publish(catalog)
        target = path / PLACES[place]
        if target.exists():
            target.rename(path.parent / "taken away")
        PLANTS[plant](target, outside)
        for answer in (*reading(catalog), *writing(catalog)):
            assert SECRET.encode() not in answer
    forget_warnings(logs)


def forget_warnings(logs: Logs) -> None:
    """Here a warning is as good as silence: what counts is what was done."""
    logs.records.clear()


def test_the_marker_is_a_small_file(path: Path, outside: Path) -> None:
    for plant in PLANTS.values():
        (path / "kvfs-store.json").unlink()
        plant(path / "kvfs-store.json", outside)
        with bounded(), pytest.raises(KvfsError):
            Store.open(path)
        if (path / "kvfs-store.json").is_dir() and not (path / "kvfs-store.json").is_symlink():
            (path / "kvfs-store.json").rmdir()
            (path / "kvfs-store.json").touch()


def test_a_part_of_a_tebibyte_takes_no_memory(path: Path, logs: Logs) -> None:
    """Its header is that of a part, its size is a lie; as a part, and as what a writer offers."""
    whole = path / PLACES["part"]
    whole.chmod(0o640)
    os.truncate(whole, HUGE)
    with catalog_of(path) as catalog, bounded(8 << 20):
        with pytest.raises(KvfsError):
            catalog.open_part(NS, KEY, PART)
        temp = catalog.reserve(NS, 1 << 16)
        os.ftruncate(temp.fd, HUGE)
        os.close(temp.fd)
        with pytest.raises(KvfsError):
            catalog.publish_file(NS, temp.name, KEY, PART)
    logs.claim("is damaged")


def test_a_snapshot_that_claims_much_takes_no_memory(path: Path) -> None:
    target = path / PLACES["index"]
    for head in (b"", target.read_bytes()[:20]):
        with target.open("wb") as file:
            file.write(head)
            file.truncate(HUGE)
        with bounded(8 << 20), Store.open(path) as store:
            assert not Index(store).load()


def test_a_hole_in_the_mount_cannot_be_made_by_writing_far_away(path: Path) -> None:
    """A sparse file larger than any part, through `cp` into the mount, is refused by the write."""
    with catalog_of(path) as catalog:
        key = new_key()
        incoming = Incoming(catalog, Place(What.PART, part_name(key, PART), NS, key, PART))
        with bounded(8 << 20), pytest.raises(OSError, match="too large"):
            incoming.write(memoryview(b"x"), (1 << 43) - 1)
        incoming.abandon()
        assert os.listdir(path / NS.hex() / "tmp") == []


# ------------------------------------------------------------------------------------------------------------- races


def swapping(stop: threading.Event, target: Path, good: Path, bad: Path) -> None:
    """Put one thing, then the other in the place of ``target``, as fast as can be, each time atomically."""
    while not stop.is_set():
        for source in (bad, good):
            os.rename(source, target)
            os.rename(target, source)


@contextlib.contextmanager
def swapped(target: Path, bad: Path) -> Iterator[None]:
    good = target.with_name("good")
    target.rename(good)
    stop = threading.Event()
    thread = threading.Thread(target=swapping, args=(stop, target, good, bad))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        good.rename(target)


@pytest.mark.parametrize("plant", ["link to a file", "hard link", "FIFO"])
def test_swapping_a_part_while_it_is_opened(path: Path, outside: Path, plant: str) -> None:
    whole = (path / PLACES["part"]).read_bytes()
    bad = path / "bad"
    PLANTS[plant](bad, outside)
    opened = 0
    with Store.open(path) as store, swapped(path / PLACES["part"], bad):
        for _ in range(ROUNDS):
            try:
                fd = store.open_part(NS, KEY, PART)
            except KvfsError:
                continue
            opened += 1
            assert os.pread(fd, 4096, 0) == whole[:4096]
            os.close(fd)
    assert opened


def test_swapping_a_folder_while_a_part_is_opened(path: Path, outside: Path) -> None:
    bad = path / ns_folder / "bad"
    bad.symlink_to(outside)
    opened = 0
    with Store.open(path) as store, swapped(path / PLACES["leaf folder"], bad):
        for _ in range(ROUNDS):
            with contextlib.suppress(KvfsError):
                fd = store.open_part(NS, KEY, PART)
                opened += 1
                assert os.pread(fd, 30, 0) != SECRET[:30].encode()
                os.close(fd)
    assert opened


def test_swapping_folders_while_parts_are_written_and_removed(path: Path, outside: Path) -> None:
    """Nothing appears outside, and nothing vanishes there: the fixture looks."""
    bad = path / ns_folder / "bad"
    bad.symlink_to(outside)
    done = 0
    with Store.open(path) as store, swapped(path / PLACES["temp folder"], bad):
        for _ in range(ROUNDS // 4):
            with contextlib.suppress(KvfsError):
                temp = store.reserve(NS)
                os.close(temp.fd)
                store.discard(NS, temp.name)
                done += 1
    (path / ns_folder / "bad").unlink(missing_ok=True)
    bad.symlink_to(outside)
    with Store.open(path) as store, swapped(path / PLACES["leaf folder"], bad):
        for _ in range(ROUNDS // 4):
            with contextlib.suppress(KvfsError):
                store.remove(NS, KEY, [PART])
                done += 1
    assert done


# ------------------------------------------------------------------------------------------------------------- names

NASTY = st.one_of(
    st.text(max_size=80),
    st.sampled_from(["..", ".", "", "\0", "/", "../" * 20, "a" * 4096, "．．", "tmp", ".kvfs", "manifest.json\n"]),
    st.from_regex(r"[0-9a-fA-F]{60,68}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{64}\.(full|swa[0-9]{1,9}|mla|x)\.h[0-9]{1,3}\.safetensors.?", fullmatch=True),
)


@example("0" * 64 + ".full.h00.safetensors")
@example("0" * 64 + ".full.h64.safetensors")
@given(NASTY)
def test_names_have_a_closed_grammar(name: str) -> None:
    found = parse_part_name(name)
    if found is not None:
        assert part_name(*found) == name
    if is_ns(name) or is_temp(name):
        assert set(name) <= set("0123456789abcdef")
    with contextlib.suppress(KvfsError):
        assert str(PartId.parse(name)) == name


@given(st.lists(NASTY, max_size=4))
def test_paths_in_the_mount_lead_to_named_places_only(names: list[str]) -> None:
    place = find("/" + "/".join(name.replace("/", "") for name in names))
    if place is not None and place.what in {What.PART, What.LEAF, What.NAMESPACE, What.MANIFEST}:
        assert ".." not in place.name
        assert "\0" not in place.name
        assert len(place.ns) == 32
