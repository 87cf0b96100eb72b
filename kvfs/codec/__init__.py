"""The cachegen codec: KV quantised by sensitivity and entropy coded, a fifth of its size, or exact and two thirds.

`encode_part` makes the coded form of a part, `CodedPart` reads it; docs/codec-format.md specifies both.  After
CacheGen (Liu et al., SIGCOMM 2024): quantise by sensitivity, code each channel by its own distribution, choose a level
by budget.  Its anchors and its tables in every chunk are not here: they measured worse.
"""

from kvfs.codec.encode import encode_part
from kvfs.codec.levels import FORMS, LEVELS, Level, level
from kvfs.codec.partfile import MAX_INDEX, CodedPart
from kvfs.codec.rope import Rope, rope_of

__all__ = ["FORMS", "LEVELS", "MAX_INDEX", "CodedPart", "Level", "Rope", "encode_part", "level", "rope_of"]
