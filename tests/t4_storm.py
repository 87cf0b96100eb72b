"""Whoever is killed, whenever: nothing wrong is read, nothing acknowledged is lost (P1, P2, P3)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tests.mounted import needs_mount
from tests.storm import Order, Report
from tests.torture import SEED, report, size, torture

pytestmark = torture()

KILLS = size("KILLS", 60, 1000)
ROUND = 60
"""Kills of one store; a longer storm goes on in another."""


def storm(folder: Path, seed: int, kills: int, mount: Path | None = None) -> Report:
    logs = folder / "logs"
    logs.mkdir(parents=True)
    order = Order(str(folder / "store"), str(logs), kills, seed, str(mount) if mount else None)
    done = subprocess.run(
        ["timeout", "-k", "5", "300", sys.executable, "-m", "tests.storm", json.dumps(asdict(order))],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Report(**json.loads(done.stdout))


def storms(folder: Path, mount: Path | None) -> None:
    kills = acks = reads = 0
    while kills < KILLS:
        seed = SEED + kills
        told = storm(folder / str(kills), seed, min(ROUND, KILLS - kills), mount)
        assert not told.errors, f"seed {seed}: " + "\n".join(told.errors[:20])
        kills, acks, reads = kills + sum(told.kills.values()), acks + told.acks, reads + told.reads
        report(f"seed {seed}: {told.kills}, {told.acks} acknowledged, {told.reads} read")
    report(f"{kills} kills, {acks} acknowledged, {reads} chunks read: 0 wrong, 0 lost")
    assert acks >= 8 * KILLS
    assert reads >= 500


def test_without_a_daemon(tmp_path: Path) -> None:
    storms(tmp_path, None)


@needs_mount
def test_through_the_daemon(tmp_path: Path, mountpoint: Path) -> None:
    storms(tmp_path, mountpoint)
