"""Machines of our own: a program of the tests as the only one on a user-mode Linux kernel, whose disks may fail.

The guest sees the host's files, read-only, so it needs no image; it writes to memory. It is root there, has no network
but what it is given, and is gone when the program ends. What the host's kernel lacks (device mapper, quotas, a second
NFS client) it has.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Final, Self

REPO: Final = Path(__file__).parent.parent
KERNEL: Final = "linux.uml"
MODULES: Final = Path("/usr/lib/uml/modules")
LIMIT: Final = 100
"""Seconds until a guest must have an answer."""
ANSWER: Final = "answer of the guest: "
_POWER_OFF: Final = 0x4321FEDC

INIT: Final = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={repo}
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run; mount -t tmpfs -o size=75% mnt /mnt
mount -t devtmpfs dev /dev; mkdir -p /dev/shm; mount -t tmpfs shm /dev/shm
cd {repo}; exec {python} -m tests.guest {module} '{order}'
"""


def missing(*programs: str) -> str | None:
    """What this host lacks for a guest that uses ``programs``; None if nothing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [word for word in (KERNEL, "setpriv", *programs) if shutil.which(word, path=path) is None]
    return next(iter(absent), None if MODULES.exists() else str(MODULES))


class Guest:
    """A machine that runs ``module.main(order)``. It is gone when that returns, and when the tests are.

    ``folder`` is made if need be, and is its own; ``devices`` are further words for its kernel.
    """

    def __init__(self, folder: Path, module: str, order: dict[str, Any], *devices: str, memory: str = "512M") -> None:
        folder.mkdir(exist_ok=True)
        init, self._console = folder / "init", folder / "console"
        init.write_text(INIT.format(repo=REPO, python=sys.executable, module=module, order=json.dumps(order)))
        init.chmod(0o755)
        command = [
            # In a session of its own it can be ended with all its processes; by this signal it ends them itself.
            *("setpriv", "--pdeathsig", "TERM", KERNEL, f"mem={memory}", "root=/dev/root", "rootfstype=hostfs"),
            *("rootflags=/", "ro", "quiet", f"init={init}", f"uml_dir={folder}/uml/", "con=null", "con0=null,fd:1"),
            *devices,
        ]
        environ = os.environ | {"TMPDIR": "/dev/shm", "HOME": str(folder)}
        with self._console.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ, start_new_session=True
            )

    def console(self) -> str:
        """All that it printed."""
        return self._console.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Cut the power, if it is still on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(folder: Path, module: str, order: dict[str, Any], memory: str = "512M") -> Any:
    """What ``module.main(order)`` returns in a guest; AssertionError with what was printed if that is not to be had."""
    with Guest(folder, module, order, memory=memory) as guest:
        with contextlib.suppress(subprocess.TimeoutExpired):
            guest.process.wait(LIMIT)
        answers = [line.partition(ANSWER)[2] for line in guest.console().splitlines() if ANSWER in line]
        assert answers, f"no answer within {LIMIT} s, ended with {guest.process.poll()}:\n{guest.console()[-6000:]}"
    return json.loads(answers[-1])


# -------------------------------------------------------------------------------------------------- inside the guest


def load(*modules: str) -> None:
    """Load kernel modules with what they need."""
    folder = MODULES / os.uname().release
    lines = (line.split(":") for line in (folder / "modules.dep").read_text().splitlines())
    needs = {Path(path).stem: (path, [Path(other).stem for other in others.split()]) for path, others in lines}

    def one(name: str) -> None:
        path, others = needs[name]
        for other in reversed(others):
            one(other)
        subprocess.run(["insmod", folder / path], check=False, stderr=subprocess.DEVNULL)  # it may be there already

    for name in modules:
        one(name)


def call(*words: object) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def main() -> None:
    """Run what was ordered, print its result, and switch the machine off."""
    try:
        answer = importlib.import_module(sys.argv[1]).main(json.loads(sys.argv[2]))
        sys.stdout.write(ANSWER + json.dumps(answer) + "\n")
    except BaseException:  # noqa: BLE001 - it is all that the host will know
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
    ctypes.CDLL(None).reboot(_POWER_OFF)


if __name__ == "__main__":
    main()
