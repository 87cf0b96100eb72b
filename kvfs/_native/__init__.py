"""Checksums, copies and the codec at memory speed, in C with the GIL released. `_core.pyi` says what each promises."""

from kvfs._native._core import (
    ISAS,
    CancelToken,
    codec_decode,
    codec_encode,
    codec_rotation,
    gather,
    isa,
    load,
    load_coded,
    populate,
    sums,
    use_isa,
    xxh3_64,
)

__all__ = [
    "ISAS",
    "CancelToken",
    "codec_decode",
    "codec_encode",
    "codec_rotation",
    "gather",
    "isa",
    "load",
    "load_coded",
    "populate",
    "sums",
    "use_isa",
    "xxh3_64",
]
