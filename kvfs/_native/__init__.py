"""Checksums and copies at memory speed, in C with the GIL released. `_core.pyi` says what each promises."""

from kvfs._native._core import ISAS, CancelToken, gather, isa, load, populate, scatter, sums, use_isa, xxh3_64

__all__ = ["ISAS", "CancelToken", "gather", "isa", "load", "populate", "scatter", "sums", "use_isa", "xxh3_64"]
