"""The worker is killed again and again, at any moment, under sixteen readers: none of them sees a failure (P3, P7)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from kvfs.client import MountClient
from kvfs.errors import ChunkNotFound, DaemonUnavailable, DeadlineExceeded
from tests import samples
from tests.daemons import read
from tests.mounted import mounted, needs_mount, place, processes, run, until
from tests.torture import LONG, SEED, report, size, torture

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [*torture(), needs_mount]

KILLS = size("WORKER_KILLS", 20, 100)
READERS = 16
KEYS = [bytes([i]) * 32 for i in range(1, 33)]
PARTS = samples.MANIFEST.parts

READER = """
import json, mmap, os, random, sys, time
names, r = json.loads(sys.stdin.readline()), random.Random(int(sys.argv[1]))
content = {name: open(name, "rb").read() for name in r.sample(names, 12)}
held = {name: os.open(name, os.O_RDONLY) for name in content}
maps = {name: mmap.mmap(fd, 0, prot=mmap.PROT_READ) for name, fd in held.items()}
print("ready", flush=True)
done, slowest = 0, 0.0
while not os.path.exists(sys.argv[2]):
    name = r.choice(list(content))
    begun = time.monotonic()
    assert maps[name][:] == content[name]
    at = r.randrange(len(content[name]))
    assert os.pread(held[name], 100, at) == content[name][at:at + 100]
    other = r.choice(names)
    assert os.stat(name).st_size == len(content[name])
    assert os.stat(other).st_size > 30000
    with open(name, "rb") as file:
        assert file.read() == content[name]
    assert os.path.basename(other) in os.listdir(os.path.dirname(other))
    assert os.getxattr(other, "user.kvfs.tokens") == b"256"
    assert os.statvfs(other).f_blocks > 0
    done, slowest = done + 9, max(slowest, time.monotonic() - begun)
    time.sleep(0.02)
print(json.dumps([done, slowest]))
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with samples.new_store(tmp_path / "kv") as store:
        for key in KEYS:
            samples.put(store, key)
    return tmp_path / "kv"


def test_killed_under_sixteen_readers(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    r, stop = random.Random(SEED), tmp_path / "stop"
    with mounted(store, mountpoint, logs="died"), MountClient(mountpoint) as client:
        names = [str(place(mountpoint, key, part)) for key in KEYS for part in PARTS]
        readers = [reader(n, names, stop) for n in range(READERS)]
        for each in readers:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n", each.communicate(timeout=30)
        leases: Counter[str] = Counter()
        outages = []
        for n in range(KILLS):
            outages.append(kill(store, mountpoint, r))
            leases[lease(client, r.choice(KEYS))] += 1
            assert all(each.poll() is None for each in readers), f"seed {SEED}: a reader failed at kill {n}"
        stop.touch()
        told = [each.communicate(timeout=60) for each in readers]
        assert [each.returncode for each in readers] == [0] * READERS, f"seed {SEED}: {told}"
    results = [json.loads(out) for out, _ in told]
    back = sorted(outages)
    report(
        f"{KILLS} kills under {READERS} readers: {sum(done for done, _ in results)} operations, 0 failed; "
        f"slowest round {max(slow for _, slow in results):.2f} s; back after {back[KILLS // 2]:.2f} s "
        f"(median), {back[-1]:.2f} s (most); {dict(leases)}"
    )


def reader(seed: int, names: list[str], stop: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        ["timeout", "-k", "5", "3600" if LONG else "100", sys.executable, "-c", READER, str(seed), str(stop)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(names) + "\n")
    process.stdin.flush()
    return process


def kill(store: Path, mount: Path, r: random.Random) -> float:
    """Kill the worker, now and then the next one as it starts too; returns seconds until the mount answers."""
    begun = time.monotonic()
    for _ in range(1 + (r.random() < 0.2)):
        worker = processes(store)["worker"]
        os.kill(worker, signal.SIGKILL)
        until(lambda worker=worker: processes(store).get("worker", worker) != worker)
        time.sleep(r.uniform(0, 0.2))
    assert run("getfattr", "-n", "user.kvfs.leases", place(mount, r.choice(KEYS), PARTS[0])).returncode == 0
    outage = time.monotonic() - begun
    time.sleep(r.uniform(0, 0.3))
    return outage


def lease(client: MountClient, key: bytes) -> str:
    """What a client gets: its parts, or at worst a miss with a reason, in time."""
    begun = time.monotonic()
    try:
        with client.lease(samples.MANIFEST.ns, [(key, part) for part in PARTS], timeout=0.5) as held:
            assert [read(each.fd, key, each.part) == samples.payload(key, each.part) for each in held.parts] == [
                True
            ] * 4
        return "leased"
    except (DaemonUnavailable, DeadlineExceeded, ChunkNotFound) as e:
        assert time.monotonic() - begun < 2.0
        return type(e).__name__
