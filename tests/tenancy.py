"""Tenants for the tests: a store with some, and processes that live in a container or as a user of the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvfs import tenants
from kvfs.kinds import Amount
from tests import samples

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1 << 20
UIDS: Mapping[str, int] = {"a": 41001, "b": 41002, "public": 0}


def new_store(path: Path, budgets: Mapping[str, int]) -> Path:
    """A store with these tenants."""
    samples.new_store(path).close()
    for name, budget in budgets.items():
        mode = 0o700 if name == tenants.PUBLIC else 0o750
        tenants.add(path, tenants.Tenant(name, UIDS[name], UIDS[name], mode, Amount(budget, 0.0)))
    return path


ACT = """
import ctypes, os, socket, subprocess, sys, time
from pathlib import Path
from kvfs import chunk
from kvfs.client import MountClient
from kvfs.errors import *
from kvfs.identity import PartId
from kvfs.protocol import Channel, Deadline, join_keys
from tests import daemons, samples
NS, PARTS = samples.MANIFEST.ns, samples.MANIFEST.parts
role, host, where = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
inside = where
if role == "container":
    inside = Path(sys.argv[4])
    for words in (["--bind", where, inside], ["-t", "tmpfs", "none", host]):  # of the host it sees no more
        subprocess.run(["mount", *words], check=True)
else:
    os.setgroups([])
    os.setresgid(int(role), int(role), int(role))
    os.setresuid(int(role), int(role), int(role))

client = MountClient(inside)
def key(n): return bytes([n]) * 32
def put(n): return daemons.put(client, key(n))
def look(*numbers): return client.lookup(NS, [key(n) for n in numbers], timeout=5)
def lease(n, part=PARTS[0]):
    with client.lease(NS, [(key(n), part)], timeout=5) as lease:
        return daemons.read(lease.parts[0].fd, key(n), part) == samples.payload(key(n), part)
def path(n, part=PARTS[0]): return daemons.file_of(inside, key(n), part)
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(inside / ".kvfs" / "sock"))
    return sock

print("ready", flush=True)
for line in sys.stdin:
    try:
        try:
            answer = eval(line)
        except SyntaxError:
            exec(line)
            answer = None
        print(repr(answer), flush=True)
    except Exception as e:
        print(f"{type(e).__name__}: {e}".replace(chr(10), " "), flush=True)
client.close()
"""


class Actor:
    """A process that evaluates what it is told: as root of a container that binds a subtree, or as a user of the host.

    ``client`` is connected to the subtree; ``put``, ``look``, ``lease`` and ``path`` take the number of a chunk.
    """

    def __init__(self, host: Path, where: Path, role: str = "container", inside: Path | None = None) -> None:
        unshare = ["unshare", "--mount", "--propagation", "private"] if role == "container" else []
        words = [*unshare, sys.executable, "-c", ACT, role, str(host), str(where), *([str(inside)] if inside else [])]
        self.process = subprocess.Popen(
            ["timeout", "-k", "5", "100", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        assert self._hear() == "ready"

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __call__(self, expression: str) -> str:
        """What an expression gives there, as text; or the exception."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self._hear()

    def close(self) -> None:
        self.process.communicate(timeout=20)
        assert self.process.returncode == 0
