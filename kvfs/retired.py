"""Namespaces and tenants on their way out: moved into ``.kvfs`` at once, under new names, and deleted at leisure."""

import os
import secrets
import shutil
from pathlib import Path

__all__ = ["clear", "is_retired", "name_for"]

_PREFIX = "retired-"


def name_for(what: str) -> str:
    """A new name for a folder that goes; ``what`` tells people which it was."""
    return f"{_PREFIX}{what}-{secrets.token_hex(8)}"


def is_retired(name: str) -> bool:
    """Whether a folder in ``.kvfs`` is a namespace that somebody began to delete."""
    return name.startswith(_PREFIX)


def clear(derived: Path) -> int:
    """Delete what is left of namespaces whose removal was cut short, or goes on elsewhere; returns how many.

    Links are not followed; what cannot be deleted stays for `kvfs fsck` to tell of.
    """
    left = [each for each in os.scandir(derived) if is_retired(each.name) and each.is_dir(follow_symlinks=False)]
    for each in left:
        shutil.rmtree(each.path, ignore_errors=True)
    return len(left)
