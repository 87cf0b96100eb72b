"""What every test gets: silent logs or a failure, nothing left behind or a failure, short paths, real models.

Tests are named ``t<layer>_<topic>.py`` and run from the pure logic (t0) up to whole engines (t6), so that the first
failure is the most basic one.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing.resource_tracker
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from models import build, texts

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN_MARK = "KVFS_TEST_RUN"
"""Environment variable inherited by every process that a test starts; how leftovers are told from strangers."""

GRACE = 5.0
"""Seconds that a process may take to go after the test that started it."""

LIBRARY_TEMP = re.compile(r"torchinductor_|\.triton|__numba|pymp-|\.nv")
"""Caches that libraries keep in the temporary folder on purpose."""

BASE = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a short folder of its own: a socket path may have 107 bytes, and /tmp belongs to others too."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    base = Path(config.option.basetemp or tempfile.mkdtemp(prefix="kvfs-", dir="/tmp")).resolve()
    config.option.basetemp = base / "t"
    config.stash[BASE] = base
    (base / "tmp").mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(base / "tmp")
    os.environ[RUN_MARK] = uuid.uuid4().hex


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Remove the folder of a run that passed; keep the evidence of one that did not."""
    base = config.stash[BASE]
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"files of this run: {base}")
    else:
        shutil.rmtree(base, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def has_cuda() -> bool:
    """Tell whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------------------- logs


@dataclass
class Logs(logging.Handler):
    """The WARNING and higher records of ``kvfs.*`` during one test; each must be claimed, each claim must be met."""

    records: list[logging.LogRecord] = field(default_factory=list)
    claims: list[tuple[re.Pattern[str], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.WARNING)

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def claim(self, pattern: str, level: int = logging.WARNING) -> None:
        """Expect at least one record of exactly ``level`` whose message matches ``pattern``, before or after now."""
        self.claims.append((re.compile(pattern), level))

    def verify(self) -> None:
        """Fail the test on a record that nobody claimed and on a claim that nothing met."""
        unmet = dict.fromkeys(self.claims, True)
        stray = []
        for record in self.records:
            hits = [c for c in self.claims if record.levelno == c[1] and c[0].search(record.getMessage())]
            unmet.update(dict.fromkeys(hits, False))
            if not hits:
                stray.append(f"{record.levelname} {record.name}: {record.getMessage()}")
        if stray:
            pytest.fail("log records nobody claimed:\n  " + "\n  ".join(stray), pytrace=False)
        if missing := [f"{logging.getLevelName(level)} /{p.pattern}/" for (p, level), left in unmet.items() if left]:
            pytest.fail("log records expected, never written:\n  " + "\n  ".join(missing), pytrace=False)


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    """Fail the test on a stray warning of kvfs; ``logs.claim(pattern, level)`` expects one."""
    handler = Logs()
    logger = logging.getLogger("kvfs")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    handler.verify()


# --------------------------------------------------------------------------------------------------------- leaks


def mounts_under(base: Path) -> dict[str, str]:
    """Map each mount point below ``base`` to the minor number of its device, innermost first."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        columns = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), columns[4])
        if point.startswith(f"{base}/"):
            found[point] = columns[2].split(":")[1]
    return dict(reversed(found.items()))


def detach(point: str, minor: str) -> None:
    """Take a mount away without asking its server: abort the FUSE connection, then unmount lazily."""
    abort = Path(f"/sys/fs/fuse/connections/{minor}/abort")
    if abort.exists():
        abort.write_text("1")
    subprocess.run(["umount", "-l", point], check=False, timeout=10, stderr=subprocess.DEVNULL)


def own_processes() -> dict[int, str]:
    """Map the pid of each live process of this run, except this one, to its name."""
    mark = f"{RUN_MARK}={os.environ[RUN_MARK]}".encode()
    tracker = getattr(multiprocessing.resource_tracker._resource_tracker, "_pid", None)
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid in {os.getpid(), tracker}:
            continue
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:  # gone meanwhile, or not ours
            continue
    return found


def temp_files() -> set[str]:
    """List what lies in the temporary folder, and kvfs' own files in shared memory."""
    names = {str(p) for p in Path(tempfile.gettempdir()).iterdir() if not LIBRARY_TEMP.match(p.name)}
    return names | {str(p) for p in Path("/dev/shm").glob("kvfs*")}


@dataclass
class Leftovers:
    """What existed before; ``check`` fails the test on what was added, and takes it away."""

    base: Path

    def __post_init__(self) -> None:
        self.mounts = mounts_under(self.base)
        self.processes = own_processes()
        self.files = temp_files()

    def check(self) -> None:
        left = []
        # Mounts first: a process stuck on a dead mount can block whoever reads its /proc files.
        for point, minor in mounts_under(self.base).items():
            if point not in self.mounts:
                detach(point, minor)
                left.append(f"mount {point}")
        deadline = time.monotonic() + GRACE
        while (extra := own_processes().keys() - self.processes.keys()) and time.monotonic() < deadline:
            time.sleep(0.02)
        names = own_processes()
        for pid in extra & names.keys():
            left.append(f"process {pid} ({names[pid]})")
            os.kill(pid, signal.SIGKILL)
        left += [f"file {name}" for name in sorted(temp_files() - self.files)]
        if left:
            pytest.fail("left behind: " + ", ".join(left), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _clean_session(pytestconfig: pytest.Config) -> Iterator[None]:
    """Whatever fixtures of wider scope started must be gone at the end."""
    leftovers = Leftovers(pytestconfig.stash[BASE])
    yield
    leftovers.check()


@pytest.fixture(autouse=True)
def _clean_test(pytestconfig: pytest.Config, _clean_session: None) -> Iterator[None]:
    """Set up after the fixtures of wider scope, torn down after the test's own: what is new then was leaked."""
    leftovers = Leftovers(pytestconfig.stash[BASE])
    yield
    leftovers.check()


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Yield an empty folder to mount on; whatever is mounted there at the end is detached, however stuck it is."""
    point = tmp_path / "mnt"
    point.mkdir()
    yield point
    for path, minor in mounts_under(tmp_path).items():
        detach(path, minor)


# -------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="session")
def models() -> build.Models:
    """Give the folders of the real models; they must have been built."""
    found = build.Models.at(build.cache_dir())
    if missing := found.missing():
        pytest.fail(f"models not built: {', '.join(missing)}; run `make models`", pytrace=False)
    return found


@pytest.fixture(scope="session")
def long_texts() -> list[str]:
    """Give long real English texts, each of 40,000 characters or more."""
    return texts.long_texts()
