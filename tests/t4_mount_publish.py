"""Publishing by copying into the mount: hidden until it is closed, checked, then a part like any other; or nothing."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import samples
from tests.mounted import mounted, needs_mount, output, place, processes, run, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_mount

KEY = bytes([7]) * 32
PARTS = samples.MANIFEST.parts
NS = samples.MANIFEST.ns_hex


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Another store, which has the chunk ``KEY``."""
    with samples.new_store(tmp_path / "outside") as store:
        samples.put(store, KEY)
    return tmp_path / "outside"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    samples.new_store(tmp_path / "kv").close()
    return tmp_path / "kv"


@pytest.fixture
def mount(store: Path, mountpoint: Path) -> Iterator[Path]:
    with mounted(store, mountpoint):
        yield mountpoint


def empty(store: Path) -> bool:
    """Whether nothing of a failed copy is left."""
    return not list(store.glob(f"{NS}/tmp/*")) and not list(store.glob(f"{NS}/???/*"))


@pytest.mark.parametrize("options", [[], ["-p"], ["--sparse=always"], ["--reflink=never"]])
def test_cp_publishes(mount: Path, store: Path, outside: Path, options: list[str]) -> None:
    for part in PARTS:
        output("cp", *options, place(outside, KEY, part), place(mount, KEY, part))
        assert place(mount, KEY, part).read_bytes() == place(outside, KEY, part).read_bytes()
    assert place(store, KEY, PARTS[0]).stat().st_mode & 0o777 == 0o440
    assert not list(store.glob(f"{NS}/tmp/*"))
    assert os.getxattr(place(mount, KEY, PARTS[0]), "user.kvfs.tokens") == b"256"
    assert '"chunks": 1,' in (mount / ".kvfs" / "stats.json").read_text()


def test_a_tree_is_copied_in(mount: Path, outside: Path) -> None:
    output("cp", "-r", "--no-target-directory", outside / NS / KEY.hex()[:3], mount / NS / KEY.hex()[:3])
    output("diff", "-r", outside / NS / KEY.hex()[:3], mount / NS / KEY.hex()[:3])
    output("rm", place(mount, KEY, PARTS[0]))
    output("rsync", "-r", "--inplace", f"{outside / NS / KEY.hex()[:3]}/", mount / NS / KEY.hex()[:3])
    output("diff", "-r", outside / NS / KEY.hex()[:3], mount / NS / KEY.hex()[:3])


def test_a_shell_redirects_into_the_mount(mount: Path, outside: Path) -> None:
    source, target = place(outside, KEY, PARTS[0]), place(mount, KEY, PARTS[0])
    output("sh", "-c", f"cat {source} >{target}")
    assert target.read_bytes() == source.read_bytes()


def test_hidden_until_it_is_closed(mount: Path, outside: Path) -> None:
    target, content = place(mount, KEY, PARTS[0]), place(outside, KEY, PARTS[0]).read_bytes()
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(fd, content[:5000])
    assert os.listdir(target.parent) == []
    assert run("cat", target).stderr.endswith("Device or resource busy\n")
    assert run("rm", target).returncode == 1
    os.write(fd, content[5000:])
    assert os.fstat(fd).st_size == len(content)
    os.close(fd)
    assert os.listdir(target.parent) == [target.name]
    assert target.read_bytes() == content


@pytest.mark.parametrize("fault", ["short", "long", "flipped", "other key", "other part", "rubbish"])
def test_a_bad_file_is_refused_at_close_and_leaves_nothing(
    mount: Path, store: Path, outside: Path, tmp_path: Path, fault: str
) -> None:
    content = bytearray(place(outside, KEY, PARTS[0]).read_bytes())
    key, part = KEY, PARTS[0]
    match fault:
        case "short":
            del content[-1:]
        case "long":
            content += b"\0"
        case "flipped":
            content[-77] ^= 1
        case "other key":
            key = bytes([8]) * 32
        case "other part":
            part = PARTS[1]
        case "rubbish":
            content = bytearray(os.urandom(10000))
    (tmp_path / "bad").write_bytes(content)
    done = run("cp", tmp_path / "bad", place(mount, key, part))
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    until(lambda: empty(store))
    assert not place(mount, key, part).exists()
    output("cp", place(outside, KEY, PARTS[0]), place(mount, KEY, PARTS[0]))  # the name is free


def test_names_that_are_no_parts_are_refused(mount: Path, store: Path, outside: Path) -> None:
    source = place(outside, KEY, PARTS[0])
    leaf = mount / NS / KEY.hex()[:3]
    names = [source.name + ".tmp", "x", f"{KEY.hex()}.full.h9.safetensors", f"{KEY.hex()}.mla.h0.safetensors"]
    for target in [*(leaf / name for name in names), mount / NS / source.name, mount / NS / "000" / source.name]:
        done = run("cp", source, target)
        assert done.returncode == 1
        assert "Read-only file system" in done.stderr or "Invalid argument" in done.stderr
    until(lambda: empty(store))


def test_an_existing_part_is_not_replaced(mount: Path, outside: Path) -> None:
    source, target = place(outside, KEY, PARTS[0]), place(mount, KEY, PARTS[0])
    output("cp", source, target)
    assert "Read-only file system" in run("cp", source, target).stderr
    with pytest.raises(FileExistsError):
        os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    output("cp", "-n", source, target)
    assert target.read_bytes() == source.read_bytes()


def test_a_part_published_meanwhile_is_success(mount: Path, store: Path, outside: Path) -> None:
    source, target = place(outside, KEY, PARTS[0]), place(mount, KEY, PARTS[0])
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(fd, source.read_bytes())
    with samples.new_store(store) as other:
        samples.put(other, KEY, PARTS[0])
    inode = place(store, KEY, PARTS[0]).stat().st_ino
    os.close(fd)
    assert place(store, KEY, PARTS[0]).stat().st_ino == inode
    assert target.read_bytes() == source.read_bytes()
    assert not list(store.glob(f"{NS}/tmp/*"))


def test_what_is_abandoned_leaves_nothing(mount: Path, store: Path, outside: Path) -> None:
    target = place(mount, KEY, PARTS[0])
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT))
    until(lambda: empty(store))
    assert not target.exists()
    writer = f"import os, signal; f = os.open({str(target)!r}, os.O_WRONLY | os.O_CREAT); os.write(f, b'x' * 99)"
    assert run("python3", "-c", f"{writer}; os.kill(os.getpid(), signal.SIGKILL)").returncode != 0
    until(lambda: empty(store))
    output("cp", place(outside, KEY, PARTS[0]), target)


def test_a_copy_fails_at_close_if_the_worker_dies(store: Path, mountpoint: Path, outside: Path) -> None:
    source, target = place(outside, KEY, PARTS[0]), place(mountpoint, KEY, PARTS[0])
    with mounted(store, mountpoint, logs="died"):
        fd = os.open(target, os.O_WRONLY | os.O_CREAT)
        os.write(fd, source.read_bytes())
        os.kill(processes(store)["worker"], signal.SIGKILL)
        with pytest.raises(OSError, match="Input/output error") as caught:
            os.close(fd)
        assert caught.value.errno == errno.EIO
        assert not target.exists()
        output("cp", source, target)


def test_a_read_only_daemon_takes_nothing(store: Path, mountpoint: Path, outside: Path) -> None:
    with samples.new_store(store) as other:
        samples.put(other, KEY, PARTS[1])
    with mounted(store, mountpoint, read_only=True):
        assert "Read-only" in run("cp", place(outside, KEY, PARTS[0]), place(mountpoint, KEY, PARTS[0])).stderr
        assert "Read-only" in run("rm", place(mountpoint, KEY, PARTS[1])).stderr
        assert place(mountpoint, KEY, PARTS[1]).read_bytes() == place(outside, KEY, PARTS[1]).read_bytes()


def test_copies_run_side_by_side(mount: Path, outside: Path) -> None:
    commands = "".join(f"cp {place(outside, KEY, part)} {place(mount, KEY, part)} & " for part in PARTS)
    output("bash", "-c", f"{commands} wait")
    for part in PARTS:
        assert Path(place(mount, KEY, part)).read_bytes() == place(outside, KEY, part).read_bytes()
