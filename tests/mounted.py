"""Mounts for the tests: real daemons in the background, and commands that cannot hang the run."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs.config import Config
from kvfs.daemon import keeper
from kvfs.daemon.fuse import connection
from kvfs.names import part_path
from tests import samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvfs.identity import Manifest, PartId

needs_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(connection.DEVICE, os.W_OK), reason="mounting takes root and /dev/fuse"
)
PROGRAM = re.compile(r"-m\0kvfs\.daemon\.(keeper|worker)\0")


@contextlib.contextmanager
def mounted(store: Path, point: Path, transport: str = "kernel", logs: str = "", **settings: object) -> Iterator[Path]:
    """A store mounted by a daemon of its own, whose log may show only warnings that match ``logs``, at least one."""
    keeper.mount(store, point, config=Config(**settings), transport=transport)  # type: ignore[arg-type]
    try:
        yield point
    finally:
        if connection.mounted_at(point) is not None:
            keeper.umount(point, lazy=True)
    check_log(store, logs)


def check_log(store: Path, expected: str = "") -> None:
    """Fail on a warning of the daemon that was not expected, and on an expected one that is not there."""
    text = next((store / ".kvfs").glob("daemon.*.log")).read_text()
    found = [line for line in text.splitlines() if re.search(r" (WARNING|ERROR|CRITICAL) |Traceback", line)]
    stray = [line for line in found if not expected or not re.search(expected, line)]
    assert not stray, "\n".join(stray)
    assert bool(found) == bool(expected), text


def processes(store: Path) -> dict[str, int]:
    """The pids of the daemon of a store, by ``keeper`` and ``worker``."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            program = PROGRAM.search(words)
            is_coder = Path(f"/proc/{pid}/comm").read_text() == "kvfs-coder\n"
            if program and f"\0{store}\0" in words and not is_coder:
                found[program[1]] = int(pid)
    return found


def run(*words: object, limit: float = 20) -> subprocess.CompletedProcess[str]:
    """A command, ended hard when it hangs."""
    command = ["timeout", "-k", "5", str(limit), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})


def output(*words: object) -> str:
    """What a command prints; it must succeed and complain of nothing."""
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def until(true: Callable[[], object], limit: float = 20.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def place(root: Path, key: bytes, part: PartId, manifest: Manifest = samples.MANIFEST) -> Path:
    """Where a part lies, below a store or a mount."""
    return root / manifest.ns_hex / part_path(key, part)
