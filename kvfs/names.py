"""The closed grammar of names in a store: part files, their leaf folders, namespaces, temp files."""

import re

from kvfs.errors import ChunkNotFound
from kvfs.identity import PartId

__all__ = [
    "SUFFIX",
    "is_derived",
    "is_leaf",
    "is_ns",
    "is_temp",
    "leaf_name",
    "parse_part_name",
    "part_name",
    "part_path",
    "temp_name",
]

SUFFIX = ".safetensors"

_NS = re.compile(r"[0-9a-f]{64}")
_LEAF = re.compile(r"[0-9a-f]{3}")
_TEMP = re.compile(r"[0-9a-f]{32}")
_DERIVED = re.compile(r"(?:daemon|index|quality|scrub|verified|written)\..+", re.DOTALL)
_NAME = re.compile(
    r"([0-9a-f]{64})\.((?:full|mla|(?:swa|chunked)[1-9][0-9]{0,6})\.h(?:[0-9]|[1-5][0-9]|6[0-3]))\.safetensors"
)


def part_name(key: bytes, part: PartId) -> str:
    """The file name of a part inside its leaf folder: ``<key hex>.<kind>.h<slice>.safetensors``."""
    return f"{key.hex()}.{part}{SUFFIX}"


def leaf_name(key: bytes) -> str:
    """The folder of a chunk: 4096 of them in a namespace."""
    return key.hex()[:3]


def part_path(key: bytes, part: PartId) -> str:
    """The path of a part inside its namespace."""
    return f"{leaf_name(key)}/{part_name(key, part)}"


def parse_part_name(name: str) -> tuple[bytes, PartId] | None:
    """The inverse of `part_name`; None for any other name."""
    m = _NAME.fullmatch(name)
    return (bytes.fromhex(m[1]), PartId.parse(m[2])) if m else None


def is_ns(name: str) -> bool:
    """Whether a folder name is that of a namespace: 64 hexadecimal digits."""
    return _NS.fullmatch(name) is not None


def is_leaf(name: str) -> bool:
    """Whether a folder name inside a namespace is that of a leaf folder."""
    return _LEAF.fullmatch(name) is not None


def is_temp(name: str) -> bool:
    """Whether a name is one that `Store.reserve` gives out."""
    return _TEMP.fullmatch(name) is not None


def temp_name(name: str) -> str:
    """The name, if it is one that `Store.reserve` gives out; else ChunkNotFound."""
    if not is_temp(name):
        raise ChunkNotFound(f"temp {name!r}")
    return name


def is_derived(name: str) -> bool:
    """Whether a name is one of a file that daemons keep in ``.kvfs``."""
    return _DERIVED.fullmatch(name) is not None
