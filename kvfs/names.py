"""The closed grammar of names in a store: part files, their leaf folders, namespaces, temp files."""

import re
from typing import NamedTuple

from kvfs.identity import PartId

__all__ = [
    "CODED",
    "SUFFIX",
    "FileName",
    "is_derived",
    "is_leaf",
    "is_ns",
    "is_temp",
    "leaf_name",
    "parse_file_name",
    "parse_part_name",
    "part_name",
    "part_path",
]

SUFFIX = ".safetensors"
CODED = ".cachegen"
"""What stands before the suffix in the name of a coded form."""

_NS = re.compile(r"[0-9a-f]{64}")
_LEAF = re.compile(r"[0-9a-f]{3}")
_TEMP = re.compile(r"[0-9a-f]{32}")
_DERIVED = re.compile(r"(?:bulletin|daemon|index|janitor|quality|scrub|verified|written)\..+", re.DOTALL)
_NAME = re.compile(
    r"([0-9a-f]{64})\.((?:full|mla|(?:swa|chunked)[1-9][0-9]{0,6})\.h(?:[0-9]|[1-5][0-9]|6[0-3]))"
    r"(\.cachegen)?\.safetensors"
)


class FileName(NamedTuple):
    """What the name of a part's file says; ``coded``: it holds the coded form, not the raw one."""

    key: bytes
    part: PartId
    coded: bool


def part_name(key: bytes, part: PartId, coded: bool = False) -> str:
    """The file name of a part inside its leaf folder: ``<key hex>.<kind>.h<slice>.safetensors``, or that of its coded
    form: ``<key hex>.<kind>.h<slice>.cachegen.safetensors``."""
    return f"{key.hex()}.{part}{CODED if coded else ''}{SUFFIX}"


def leaf_name(key: bytes) -> str:
    """The folder of a chunk: 4096 of them in a namespace."""
    return key.hex()[:3]


def part_path(key: bytes, part: PartId, coded: bool = False) -> str:
    """The path of a part, or of its coded form, inside its namespace."""
    return f"{leaf_name(key)}/{part_name(key, part, coded)}"


def parse_file_name(name: str) -> FileName | None:
    """The inverse of `part_name`; None for any other name."""
    m = _NAME.fullmatch(name)
    return FileName(bytes.fromhex(m[1]), PartId.parse(m[2]), bool(m[3])) if m else None


def parse_part_name(name: str) -> tuple[bytes, PartId] | None:
    """Key and part, if it is the name of a raw form: the only form that a mount shows."""
    found = parse_file_name(name)
    return found[:2] if found and not found.coded else None


def is_ns(name: str) -> bool:
    """Whether a folder name is that of a namespace: 64 hexadecimal digits."""
    return _NS.fullmatch(name) is not None


def is_leaf(name: str) -> bool:
    """Whether a folder name inside a namespace is that of a leaf folder."""
    return _LEAF.fullmatch(name) is not None


def is_temp(name: str) -> bool:
    """Whether a name is one that `Store.reserve` gives out."""
    return _TEMP.fullmatch(name) is not None


def is_derived(name: str) -> bool:
    """Whether a name is one of a file that daemons keep in ``.kvfs``."""
    return _DERIVED.fullmatch(name) is not None
