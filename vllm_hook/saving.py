"""Which chunks of a request a step has completed, and which kinds of them are worth keeping.

A full-attention kind is kept for every token. A sliding kind is read only where a hit may end: before the end of the
prompt (with a margin, so that the same document with another question still finds it), before every multiple of an
interval, and in everything generated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvfs.identity import TAIL_STEP, GroupKind, Manifest
from kvfs.reach import first_token

__all__ = ["Retention", "live", "tail_end"]

MARGIN_CHUNKS = 2
"""Chunks of a sliding kind kept before the window at the prompt's end: the room for another, longer question."""


def tail_end(tokens: int) -> int:
    """Where the tail of a text of so many tokens is cut."""
    return tokens // TAIL_STEP * TAIL_STEP


def live(block_ids: Sequence[int], block_size: int, start: int, end: int) -> bool:
    """Whether a block table still holds every token of [start, end): blocks freed behind a window are null (0)."""
    needed = block_ids[start // block_size : -(-end // block_size)]
    return len(needed) == -(-end // block_size) - start // block_size and 0 not in needed


@dataclass(frozen=True)
class Retention:
    """The rule for one request with a prompt of ``prompt`` tokens; ``align`` is the engine's block size in tokens."""

    manifest: Manifest
    prompt: int
    align: int
    interval: int

    def keeps(self, kind: GroupKind, end: int) -> bool:
        """Whether to store this kind of the full chunk that ends at ``end``."""
        if kind.window is None:
            return True
        chunk = self.manifest.chunk_tokens
        if end > first_token(kind, tail_end(self.prompt), self.align) - MARGIN_CHUNKS * chunk:
            return True
        if not self.interval:
            return False
        step = max(1, self.interval // chunk) * chunk
        return end > first_token(kind, -(-end // step) * step, self.align)

    def completed(self, stored: int, end: int) -> Iterator[tuple[int, tuple[str, ...]]]:
        """The full chunks from index ``stored`` on that end at or before token ``end``, each with the kinds to keep."""
        chunk = self.manifest.chunk_tokens
        for i in range(stored, end // chunk):
            yield i, tuple(k.name for k in self.manifest.kinds if self.keeps(k, (i + 1) * chunk))
