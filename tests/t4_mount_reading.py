"""What people and programs see in a mount, on both transports: tree, bytes and figures, and no way to write."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import safetensors

from kvfs import config
from kvfs.daemon.fuse import connection
from tests import samples
from tests.daemons import damage
from tests.mounted import check_log, mounted, needs_mount, output, place, run, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfs.store import Store

pytestmark = needs_mount

KEYS = [bytes([i]) * 32 for i in range(1, 5)]
PARTS = samples.MANIFEST.parts
NS = samples.MANIFEST.ns_hex


@pytest.fixture(scope="module", params=["kernel", "libfuse"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[Path]:
    path = tmp_path_factory.mktemp(transport) / "kv"
    with samples.new_store(path) as store:
        fill(store)
    return path


@pytest.fixture(scope="module")
def mount(store: Path, transport: str) -> Iterator[Path]:
    """One that only reading tests use."""
    point = store.parent / "mnt"
    point.mkdir()
    with mounted(store, point, transport):
        yield point


def fill(store: Store) -> None:
    for key in KEYS:
        samples.put(store, key)


def test_every_part_is_there_and_no_other_name(mount: Path, store: Path) -> None:
    assert sorted(os.listdir(mount)) == sorted([".kvfs", "by-model", NS])
    assert sorted(os.listdir(mount / ".kvfs")) == ["config.toml", "sock", "stats.json"]
    assert sorted(os.listdir(mount / NS)) == [*(key.hex()[:3] for key in KEYS), "manifest.json"]
    found = {p.relative_to(mount) for p in mount.glob(f"{NS}/*/*")}
    assert found == {place(mount, key, part).relative_to(mount) for key in KEYS for part in PARTS}


def test_bytes_and_attributes_are_those_of_the_store(mount: Path, store: Path) -> None:
    for key in KEYS:
        for part in PARTS:
            shown, kept = place(mount, key, part), place(store, key, part)
            assert shown.read_bytes() == kept.read_bytes()
            there, here = shown.stat(), kept.stat()
            for name in ("st_size", "st_mode", "st_uid", "st_gid", "st_nlink", "st_mtime_ns", "st_blocks"):
                assert getattr(there, name) == getattr(here, name), name


def test_safetensors_opens_every_file(mount: Path) -> None:
    for path in mount.glob(f"{NS}/*/*"):
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata()["kvfs.ns"] == NS
            for name in file.keys():  # noqa: SIM118 - not a mapping
                assert file.get_slice(name).get_shape() == [1, 256, 64]


def test_models_are_found_by_name(mount: Path) -> None:
    link = mount / "by-model" / f"sample@r1-{NS[:8]}"
    assert os.listdir(mount / "by-model") == [link.name]
    assert os.readlink(link) == f"../{NS}"
    assert sorted(os.listdir(link)) == sorted(os.listdir(mount / NS))
    assert not os.path.lexists(mount / "by-model" / "other")


def test_the_files_about_the_daemon(mount: Path, store: Path, transport: str) -> None:
    stats = mount / ".kvfs" / "stats.json"
    text = stats.read_text()
    assert json.loads(text)["chunks"] == len(KEYS)
    settings = config.load(mount / ".kvfs" / "config.toml", environ={})
    assert (settings.store, settings.mountpoint, settings.transport) == (store, mount, transport)
    assert json.loads((mount / NS / "manifest.json").read_text())["info"]["name"] == "sample"
    for path in (stats, mount / ".kvfs" / "config.toml"):
        assert path.stat().st_size == len(path.read_bytes())
    assert stat.S_ISSOCK((mount / ".kvfs" / "sock").stat().st_mode)
    assert stat.S_IMODE((mount / ".kvfs" / "sock").stat().st_mode) == 0o660


def test_extended_attributes(mount: Path) -> None:
    path = place(mount, KEYS[0], PARTS[0])
    assert sorted(os.listxattr(path)) == [
        f"user.kvfs.{n}" for n in ("form", "hits", "last_hit", "leases", "pinned", "stored", "tokens")
    ]
    before = int(os.getxattr(path, "user.kvfs.hits"))
    path.read_bytes()
    path.read_bytes()
    assert int(os.getxattr(path, "user.kvfs.hits")) == before + 2
    assert int(os.getxattr(path, "user.kvfs.last_hit")) > 1.7e9
    shown = output("getfattr", "--absolute-names", "-d", "-m", "-", path)
    assert 'user.kvfs.form="raw"' in shown
    assert 'user.kvfs.tokens="256"' in shown
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.kvfs.other")
    assert os.listxattr(mount / NS) == []


def test_the_usual_tools(mount: Path, store: Path, tmp_path: Path) -> None:
    parts = len(KEYS) * len(PARTS)
    assert output("find", mount / NS, "-name", "*.safetensors", "-size", "+1k").count("\n") == parts
    assert output("find", mount, "-type", "l").count("\n") == 1
    assert output("ls", "-lR", mount).count(".safetensors") == parts
    kept, shown = (int(output("du", "-sb", "--apparent-size", root / NS).split()[0]) for root in (store, mount))
    assert kept - 4096 * (len(KEYS) + 2) <= shown <= kept
    assert str(store) in output("df", mount)
    output("rsync", "-r", "--times", f"{mount / NS}/", tmp_path / "copy")
    output("diff", "-r", mount / NS, tmp_path / "copy")
    output("cp", "-r", mount / NS, tmp_path / "second")
    output("diff", "-r", tmp_path / "copy", tmp_path / "second")


def test_nothing_can_be_written_by_root_either(mount: Path) -> None:
    path = place(mount, KEYS[0], PARTS[0])
    before = path.read_bytes()
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        assert error(os.open, path, flags) == errno.EROFS
    calls = [
        (os.truncate, path, 0),
        (os.chmod, path, 0o777),
        (os.chown, path, 1, 1),
        (os.utime, path),
        (os.rename, path, mount / NS / "other"),
        (os.link, path, mount / NS / "other"),
        (os.symlink, "x", mount / "link"),
        (os.mkdir, mount / "folder"),
        (os.rmdir, path.parent),
        (os.mkfifo, mount / "fifo"),
        (os.setxattr, path, "user.x", b"1"),
        (os.removexattr, path, "user.kvfs.form"),
        (os.open, mount / "file", os.O_CREAT | os.O_WRONLY),
        (os.unlink, mount / ".kvfs" / "sock"),
        (os.open, mount / NS / "manifest.json", os.O_WRONLY),
        (os.unlink, mount / NS / "manifest.json"),
    ]
    for call, *args in calls:
        assert error(call, *args) == errno.EROFS, call
    assert error(os.mkdir, mount / NS / "000") == errno.EEXIST  # all leaf folders are there
    assert path.read_bytes() == before


def error(call: object, *args: object) -> int | None:
    """The error of a call that must fail."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is what is asked for
        call(*args)  # type: ignore[operator]
    return caught.value.errno


# --- tests that change the store have a mount of their own ---


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    with samples.new_store(tmp_path / "kv") as store:
        fill(store)
    return tmp_path / "kv"


def test_rm_removes_the_chunk(fresh: Path, mountpoint: Path, transport: str) -> None:
    with mounted(fresh, mountpoint, transport):
        paths = [place(mountpoint, KEYS[0], part) for part in PARTS]
        held = paths[1].open("rb")
        content = place(fresh, KEYS[0], PARTS[1]).read_bytes()
        output("rm", paths[0])
        for path in paths:
            assert path.name not in os.listdir(path.parent)
            assert not place(fresh, KEYS[0], PARTS[0]).exists()
        with held:
            assert held.read() == content
        assert run("rm", paths[0]).returncode == 1
        assert json.loads((mountpoint / ".kvfs" / "stats.json").read_text())["chunks"] == len(KEYS) - 1


@pytest.mark.parametrize("how", ["flip", "cut", "extend", "rename"])
def test_a_damaged_part_is_an_io_error_and_put_away(fresh: Path, mountpoint: Path, transport: str, how: str) -> None:
    path = place(fresh, KEYS[0], PARTS[0])
    match how:
        case "flip":
            damage(path, -1000)
        case "cut":
            os.truncate(path, path.stat().st_size - 1)
        case "extend":
            with path.open("ab") as file:
                file.write(b"x")
        case "rename":
            path.unlink()
            place(fresh, KEYS[1], PARTS[0]).rename(path)
    with mounted(fresh, mountpoint, transport, logs="damaged|lost.found", scrub_rate=0):
        shown = place(mountpoint, KEYS[0], PARTS[0])
        assert error(os.open, shown, os.O_RDONLY) == errno.EIO
        assert shown.name not in os.listdir(shown.parent)
        assert len(list(fresh.glob("lost+found/*.json"))) == 1
        assert place(mountpoint, KEYS[2], PARTS[0]).read_bytes() == place(fresh, KEYS[2], PARTS[0]).read_bytes()
        counted = json.loads((mountpoint / ".kvfs" / "stats.json").read_text())["quarantined"]
        assert sum(counted.values()) == 1


def test_what_happens_to_the_store_shows(fresh: Path, mountpoint: Path, transport: str) -> None:
    with mounted(fresh, mountpoint, transport):
        shown = place(mountpoint, KEYS[0], PARTS[0])
        assert shown.read_bytes()
        new = samples.new_key()
        with samples.new_store(fresh) as store:
            samples.put(store, new)
        assert place(mountpoint, new, PARTS[0]).read_bytes() == place(fresh, new, PARTS[0]).read_bytes()
        place(fresh, KEYS[0], PARTS[0]).unlink()
        until(lambda: run("cp", shown, "/dev/null").returncode)  # a second later; its bytes are right until then
        with pytest.raises(FileNotFoundError):
            shown.read_bytes()


def test_a_user_without_rights_is_kept_out(fresh: Path, mountpoint: Path, transport: str) -> None:
    with mounted(fresh, mountpoint, transport, allow_other=True):
        path = place(mountpoint, KEYS[0], PARTS[0]).relative_to(mountpoint)
        results = []
        for command in ("ls", f"ls {NS}", f"cat {path}", f"rm -f {path}"):
            done = subprocess.run(
                command.split(),
                cwd=mountpoint,
                user=65534,
                group=65534,
                extra_groups=[],
                capture_output=True,
                text=True,
                check=False,
                timeout=20,
            )
            results.append((done.returncode, "Permission denied" in done.stderr, NS in done.stdout))
        assert results == [(0, False, True), (2, True, False), (1, True, False), (1, True, False)]


def test_a_mount_that_nobody_else_may_use(fresh: Path, mountpoint: Path, transport: str) -> None:
    with mounted(fresh, mountpoint, transport):
        there = connection.mounted_at(mountpoint)
        assert there is not None
        assert (there.fstype, there.source) == ("fuse.kvfs", str(fresh))
        table = Path("/proc/self/mountinfo").read_text().splitlines()
        line = next(line for line in table if f" {mountpoint} " in line)
        assert {"nosuid", "nodev", "noatime"} <= set(line.split()[5].split(","))
        assert "default_permissions" in line
        assert "allow_other" not in line


def test_the_log_of_a_quiet_daemon_is_quiet(mount: Path, store: Path) -> None:
    subprocess.run(["ls", "-lR", mount], check=True, stdout=subprocess.DEVNULL, timeout=20)
    check_log(store)
