"""The power goes (P4): `full` durability keeps what it acknowledged, `relaxed` serves nothing torn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import guest
from tests.torture import LONG, SEED, report, size, torture

if TYPE_CHECKING:
    from pathlib import Path

LACKS = guest.missing("dmsetup", "insmod", "mkfs.ext4")
pytestmark = [*torture(), pytest.mark.skipif(LACKS is not None, reason=f"{LACKS} is not installed")]

CUTS = size("CUTS", 8, 100)
AT_ONCE = 20
"""Cuts of one guest."""


@pytest.mark.parametrize("filesystem", ["ext4", *(["xfs"] if LONG else [])])
def test_power_cuts(tmp_path: Path, filesystem: str) -> None:
    cuts = 0
    while cuts < CUTS:
        order = {"filesystem": filesystem, "cuts": min(AT_ONCE, CUTS - cuts), "seed": SEED + cuts}
        told = guest.run(tmp_path, "tests.power", order, memory="640M" if filesystem == "ext4" else "1100M")
        assert told["errors"] == []
        cuts += told["found"]["cuts"]
        report(f"{filesystem}: {told['found']}")
        assert told["found"]["full kept"] == told["found"]["full acknowledged"] > 0
        assert told["found"]["relaxed kept"] < told["found"]["relaxed acknowledged"], "the cut has lost nothing"


def test_a_quota_that_is_met(tmp_path: Path) -> None:
    """EDQUOT on a disk that is nearly empty (P6): refused, counted, and room is made within 5 s."""
    told = guest.run(tmp_path, "tests.quota", {"times": 5})
    report(f"quota of 2 MiB: {told}")
    assert told["errors"] == []
    assert told["refused"] >= len(told["waits"]) == 5
    assert told["evicted"]["space"] > 0
    assert max(told["waits"]) < 5.0
