"""The file that makes a folder a store: its format, and an id."""

import json
import os
import secrets

from kvfs.files import read_small, write_new
from kvfs.identity import canonical_json
from kvfs.names import is_temp

__all__ = ["FORMAT", "NAME", "found", "is_free", "write"]

NAME = "kvfs-store.json"
FORMAT = "kvfs-store/1"


def is_free(root: int) -> bool:
    """Whether a folder holds nothing but what making a store that was cut short leaves."""
    return all(name == ".kvfs" or is_temp(name) for name in os.listdir(root))


def write(root: int) -> None:
    """Make a marker in the open folder ``root``, or leave the one that is there."""
    write_new(root, NAME, canonical_json({"format": FORMAT, "id": secrets.token_hex(16)}) + b"\n")


def found(root: int) -> str:
    """The format that the marker states.  FileNotFoundError; ValueError for one that is damaged; OSError."""
    try:
        return str(json.loads(read_small(root, NAME))["format"])
    except (KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"no format in it: {e}") from None
