"""kvfs: the KV cache of every text, computed once, as files that every engine can map."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvfs")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
