"""Which lossy levels a namespace may be coded at: what ``kvfs quality`` measured, or an operator decided.

Kept in one small file of the store's derived folder.  Without it nothing is coded with loss.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfs import files
from kvfs.codec.levels import LEVELS, Level
from kvfs.errors import ConfigError

__all__ = ["allowed", "record"]

_NAME = "quality.json"


def allowed(derived: Path, ns: bytes) -> tuple[Level, bool]:
    """The coarsest level for a namespace, lossless unless recorded, and whether an operator forced it.

    ``derived``: the store's folder of derived files.
    """
    verdict = _read(derived).get(ns.hex(), {})
    name = verdict.get("level")
    return LEVELS.get(name if isinstance(name, str) else "", LEVELS["lossless"]), bool(verdict.get("forced"))


def record(derived: Path, ns: bytes, level: Level, measured: Mapping[str, Any] | None) -> None:
    """Note the coarsest level for a namespace, with what was measured; None: the operator forced it.

    Raises ConfigError if the file cannot be written."""
    verdicts = _read(derived)
    verdicts[ns.hex()] = {"level": level.name, "forced": measured is None, "measured": measured}
    try:
        derived.mkdir(mode=files.DIR_MODE, exist_ok=True)
        files.replace(derived / _NAME, json.dumps(verdicts, indent=2).encode() + b"\n")
    except OSError as e:
        raise ConfigError(f"{derived / _NAME} cannot be written ({e.strerror})") from e


def _read(derived: Path) -> dict[str, Any]:
    """What is recorded; nothing if the file is missing or not ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        fd = os.open(derived, files.OPEN_DIR)
        try:
            verdicts = json.loads(files.read_small(fd, _NAME))
        finally:
            os.close(fd)
        if isinstance(verdicts, dict) and all(isinstance(v, dict) for v in verdicts.values()):
            return verdicts
    return {}
