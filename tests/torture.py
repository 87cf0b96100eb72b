"""How much of everything: little in every run, much with `make torture`.

A test with a long form asks `size` how often it shall do what it does. ``KVFS_TORTURE=1`` asks for the long form, and
``KVFS_TORTURE_<NAME>=<number>`` for so many of one thing, so that a long form can be run in pieces;
``KVFS_TORTURE_SEED`` is where random choices begin, and is told by whatever fails.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Final

import pytest

LONG: Final = os.environ.get("KVFS_TORTURE", "") not in {"", "0"}
SEED: Final = int(os.environ.get("KVFS_TORTURE_SEED", "0")) or (time.time_ns() & 0xFFFFFFFF if LONG else 20250101)


def size(name: str, short: int, long: int) -> int:
    """How many of ``name`` to do: few in every run, many with `make torture`, or what the environment says."""
    return int(os.environ.get(f"KVFS_TORTURE_{name}") or (long if LONG else short))


def torture(seconds: int = 120, slow: bool = True) -> list[pytest.MarkDecorator]:
    """Marks of a module with a long form, whose short form takes at most so many seconds, or, not ``slow``, a few."""
    marks = [pytest.mark.torture, pytest.mark.timeout(0 if LONG else seconds)]
    return [*marks, pytest.mark.slow] if slow else marks


def report(figures: str) -> None:
    """Tell what was reached: shown with ``-s``, as `make torture` does, and with a failure."""
    sys.stdout.write(f"{figures}\n")
    sys.stdout.flush()
