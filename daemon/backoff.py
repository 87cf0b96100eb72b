"""When to start the next worker after one that died, and when to give up."""

from __future__ import annotations

import time
from typing import Final

YOUNG: Final = 60.0
DELAYS: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 5.0)
"""Seconds before the next start, by how many in a row died younger than `YOUNG`; after the last, give up. One
that served and was killed from outside does not count: it could live."""


class Backoff:
    """Counts those in a row that died young."""

    def __init__(self) -> None:
        self.deaths = 0

    def died(self, started: float, outside: bool = False) -> float | None:
        """Seconds to wait after the death of one that was started at that (monotonic) time, by its own fault or from
        ``outside``; None to give up."""
        if outside:
            self.deaths = 0
            return 0.0
        self.deaths = self.deaths + 1 if time.monotonic() - started < YOUNG else 1
        return DELAYS[self.deaths - 1] if self.deaths <= len(DELAYS) else None
