"""The names in the mount, as a closed grammar: what a path stands for, whether or not it is there."""

from __future__ import annotations

import enum
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvfs.identity import PartId
from kvfs.names import is_leaf, is_ns, parse_part_name, part_path
from kvfs.tenants import FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping

MODELS: Final = "by-model"
META: Final = ".kvfs"
SOCKET: Final = f"/{META}/sock"
TENANTS: Final = f"/{FOLDER}"
"""Below it lies the tree of each tenant, in which paths begin anew."""


class What(enum.Enum):
    """Kinds of places in the mount."""

    ROOT = enum.auto()
    META = enum.auto()
    SOCKET = enum.auto()
    STATS = enum.auto()
    CONFIG = enum.auto()
    MODELS = enum.auto()
    MODEL = enum.auto()
    NAMESPACE = enum.auto()
    MANIFEST = enum.auto()
    LEAF = enum.auto()
    PART = enum.auto()


class Place(NamedTuple):
    """What a path stands for. ``name`` is its last component; ``ns``, ``key`` and ``part`` where they apply."""

    what: What
    name: str = ""
    ns: bytes = b""
    key: bytes = b""
    part: PartId = PartId("", 0)


FIXED: Final[Mapping[str, Place]] = {
    "/": Place(What.ROOT),
    f"/{META}": Place(What.META, META),
    SOCKET: Place(What.SOCKET, "sock"),
    f"/{META}/stats.json": Place(What.STATS, "stats.json"),
    f"/{META}/config.toml": Place(What.CONFIG, "config.toml"),
    f"/{MODELS}": Place(What.MODELS, MODELS),
}


@lru_cache(maxsize=4096)
def find(path: str) -> Place | None:
    """What ``path`` stands for; None for a name that cannot be in a mount."""
    if path in FIXED:
        return FIXED[path]
    _, first, *rest = path.split("/")
    if first == MODELS and len(rest) == 1:
        return Place(What.MODEL, rest[0])
    return _find_in(bytes.fromhex(first), first, rest) if is_ns(first) else None


def _find_in(ns: bytes, name: str, rest: list[str]) -> Place | None:
    match rest:
        case []:
            return Place(What.NAMESPACE, name, ns)
        case ["manifest.json"]:
            return Place(What.MANIFEST, "manifest.json", ns)
        case [leaf] if is_leaf(leaf):
            return Place(What.LEAF, leaf, ns)
        case [leaf, name] if is_leaf(leaf) and name.startswith(leaf) and (found := parse_part_name(name)) is not None:
            return Place(What.PART, name, ns, *found)
    return None


def path_of(ns: bytes, key: bytes, part: PartId) -> str:
    """The path of a part in the mount."""
    return f"/{ns.hex()}/{part_path(key, part)}"


def tenant_path(name: str, path: str = "") -> str:
    """Where the path ``path`` of a tenant's own tree lies in the mount."""
    return f"{TENANTS}/{name}{path}"


def model_name(ns: bytes, info: Mapping[str, Any]) -> str:
    """The name of a namespace for people: ``<name>@<revision>-<digest>``, in characters that need no quoting."""
    words = [str(info.get("name") or "unnamed")]
    if info.get("revision"):
        words.append(str(info["revision"])[:8])
    name, *revision = (re.sub(r"[^A-Za-z0-9._+-]", "_", word.replace("/", "--"))[:100] for word in words)
    return "@".join([name, *revision]) + f"-{ns.hex()[:8]}"
