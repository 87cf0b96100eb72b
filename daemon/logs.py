"""Where a daemon process logs: standard error, in the form that a journal or a log file wants."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

JOURNAL_LEVELS: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalFormatter(logging.Formatter):
    """Lines with the priority in front, as systemd's journal reads them; it adds the time itself."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n ")
        return f"<{JOURNAL_LEVELS.get(record.levelno, 6)}>{text}"


def log_to_stderr(level: str) -> None:
    """Send the records of this process to standard error; ``level`` is a word of the configuration."""
    handler = logging.StreamHandler(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("kvfs").setLevel(level.upper())
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it takes being stopped for an error
