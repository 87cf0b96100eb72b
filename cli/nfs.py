"""What `kvfs doctor` says of the options with which an NFS volume is mounted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

MOUNTINFO: Final = Path("/proc/self/mountinfo")
ADVICE: Final = "vers=4.2,hard,softreval,lookupcache=pos,nconnect=4"
"""What to mount with; docs/operations.md gives the reasons."""


class Rule(NamedTuple):
    """An option that should not be there (or, ``needed``, one of which should), and why."""

    pattern: str
    needed: bool
    why: str


RULES: Final = (
    Rule(
        r"lookupcache=(pos|none)|noac",
        True,
        "no lookupcache=pos: a part that was looked for once stays invisible for 30 s, until its folder is listed",
    ),
    Rule(
        r"soft|softerr",
        False,
        "soft: a slow server makes reads fail and writes vanish; use hard, the deadlines are kvfs' own",
    ),
    Rule(
        r"nocto",
        False,
        "nocto: what other hosts say (janitor, leases) is read from a cache; the lease of a janitor may be taken twice",
    ),
    Rule(
        r"local_lock=(flock|all)|nolock",
        False,
        "locks are local: a second host of the same name, or a check by fsck, does not see the daemon",
    ),
    Rule(r"vers=[23](\..*)?", False, "an old version of NFS: locks need a service of their own; use 4.2"),
)


def options_of(folder: Path, table: str) -> list[str] | None:
    """Options of the NFS mount that ``folder`` lies on, from the text of a mount table; None if it is no NFS."""
    real, best = os.path.realpath(folder), ("", "", "")
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), before.split(" ")[4])
        below = point.rstrip("/") + "/"
        if (real + "/").startswith(below) and len(point) >= len(best[0]):
            best = (point, after.split(" ")[0], after.split(" ")[-1])
    return best[2].split(",") if best[1].startswith("nfs") else None


def wrong(options: list[str]) -> list[str]:
    """What is wrong with the options of an NFS mount."""
    return [rule.why for rule in RULES if any(re.fullmatch(rule.pattern, o) for o in options) != rule.needed]
