"""What all streams of one part have in common: element type, tokens, and the sections of a row."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = ["DTYPES", "LANES", "MAX_CHANNELS", "MAX_TOKENS", "SINK", "Kind", "Section", "Shape", "Style"]

LANES = 32
"""Interleaved rANS coders of a stream: the lanes of a GPU's warp."""
MAX_CHANNELS = 1024
"""Channels of a row, over all its sections."""
MAX_TOKENS = 4096
SINK = 4
"""The first tokens of a text attract much of the attention; lossy levels store them as they are."""
DTYPES = {"BF16": (2, 8, 7), "F16": (2, 5, 10), "F8_E4M3": (1, 4, 3), "F8_E5M2": (1, 5, 2), "F32": (4, 8, 23)}
"""Bytes, exponent bits and fraction bits of an element; the order is that of the native codec."""


class Kind(IntEnum):
    """How the step of a lossy section is chosen."""

    BY_CHANNEL = 0
    """A step and a mean for each channel: keys."""
    BY_TOKEN = 1
    """A step for each token: values, and latents."""


class Style(IntEnum):
    """Which channel RoPE pairs with channel i."""

    HALVES = 0
    """i + pairs (GPT-NeoX, Llama)."""
    NEIGHBOURS = 1
    """i + 1 (GPT-J, DeepSeek)."""


@dataclass(frozen=True)
class Section:
    """Adjacent channels of a row that are coded alike.

    ``pitch``: elements from one token to the next in memory.  RoPE turns the channels ``rope_first`` to
    ``rope_first + 2 * rope_pairs``.
    """

    kind: Kind
    channels: int
    pitch: int
    rope_first: int = 0
    rope_pairs: int = 0
    style: Style = Style.HALVES


@dataclass(frozen=True)
class Shape:
    """A stream holds one head of one layer: for each token a row, section after section.

    ``raw_tokens`` rows at the beginning are stored as they are (lossy levels only).
    """

    lossless: bool
    dtype: str
    tokens: int
    raw_tokens: int
    sections: tuple[Section, ...]

    @property
    def rows(self) -> int:
        return self.tokens - self.raw_tokens

    @property
    def channels(self) -> int:
        return sum(s.channels for s in self.sections)

    @property
    def codable(self) -> bool:
        """Whether the codec can code it: 16-bit elements unless lossless, channels in multiples that fit lanes."""
        nbytes, _, _ = DTYPES.get(self.dtype, (0, 0, 0))
        return (
            (nbytes == 2 or (self.lossless and nbytes > 0))
            and 0 <= self.raw_tokens <= (0 if self.lossless else self.tokens)
            and 0 < self.tokens <= MAX_TOKENS
            and all(s.channels > 0 and s.channels % 8 == 0 for s in self.sections)
            and self.channels % LANES == 0
            and self.channels <= MAX_CHANNELS
        )

    def array(self) -> npt.NDArray[np.int64]:
        """As the native codec takes it."""
        head = [self.lossless, list(DTYPES).index(self.dtype), self.tokens, self.raw_tokens]
        for s in self.sections:
            head += [s.kind, s.channels, s.pitch, s.rope_first, s.rope_pairs, s.style]
        return np.array(head, dtype=np.int64)
