"""kvfs: the KV cache of every text, computed once, as files that every engine can map."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfs.cache import TextCache

__all__ = ["__version__", "open"]

try:
    __version__ = version("kvfs")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def open(path: str | os.PathLike[str], model: Any, cache_salt: str | None = None) -> "TextCache":  # noqa: A001
    """The texts of ``model`` in the store at ``path``: see `kvfs.cache.TextCache.open`.  Needs torch."""
    from kvfs.cache import TextCache  # noqa: PLC0415 - torch takes seconds to import, and most of kvfs does without

    return TextCache.open(path, model, cache_salt)
