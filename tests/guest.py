"""Machines of our own: a program of the tests as the only one on a user-mode Linux kernel, whose disks may fail.

The guest sees the host's files, read-only, so it needs no image; it writes to memory. It is root there, has no network,
and is gone when the program ends. What the host's kernel lacks (device mapper, quotas) it has.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

KERNEL: Final = "linux.uml"
MODULES: Final = Path("/usr/lib/uml/modules")
LIMIT: Final = 100
"""Seconds that a guest may take, if nothing else is said."""
ANSWER: Final = "answer of the guest: "
_POWER_OFF: Final = 0x4321FEDC

needs_guest = pytest.mark.skipif(
    not (shutil.which(KERNEL) and MODULES.exists() and shutil.which("dmsetup")),
    reason="user-mode-linux or dmsetup is not installed",
)

INIT: Final = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={root}
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run; mount -t tmpfs -o size=75% mnt /mnt
mount -t devtmpfs dev /dev; mkdir -p /dev/shm; mount -t tmpfs shm /dev/shm
cd {root}; exec {python} -m tests.guest {module} '{order}'
"""


def run(folder: Path, module: str, order: dict[str, Any], memory: str = "512M", limit: float = LIMIT) -> Any:
    """Run ``module.main(order)`` in a guest; returns what that returned, or fails with what it printed."""
    root, init = Path(__file__).parent.parent, folder / "init"
    init.write_text(INIT.format(root=root, python=sys.executable, module=module, order=json.dumps(order)))
    init.chmod(0o755)
    command = [
        *("timeout", "-k", "5", str(limit), KERNEL, f"mem={memory}", "root=/dev/root", "rootfstype=hostfs"),
        *("rootflags=/", "ro", "quiet", f"init={init}", f"uml_dir={folder}/", "con=null", "con0=fd:0,fd:1"),
    ]
    environment = os.environ | {"TMPDIR": "/dev/shm", "HOME": str(folder)}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    answers = [line.partition(ANSWER)[2] for line in done.stdout.splitlines() if ANSWER in line]
    if not answers:
        pytest.fail(f"the guest ended with {done.returncode}:\n{done.stdout[-6000:]}", pytrace=False)
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
    import importlib
    import traceback

    try:
        answer = importlib.import_module(sys.argv[1]).main(json.loads(sys.argv[2]))
        sys.stdout.write(ANSWER + json.dumps(answer) + "\n")
    except BaseException:  # noqa: BLE001 - it is all that the host will know
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
    ctypes.CDLL(None).reboot(_POWER_OFF)


if __name__ == "__main__":
    main()
