"""How far stored chunks carry a prompt: the largest n whose KV every group kind can provide.

Pure arithmetic over presence masks, shared by the engine hook, the CLI's ``explain`` and the tests.
A full-attention kind needs every token below n; a sliding kind only what a query at n can still see,
from the start of the first block that is live (an engine publishes whole blocks, so a half-filled one
would be served to a later request).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvfs.identity import GroupKind, Manifest

__all__ = ["Blocker", "Need", "Reach", "Tail", "first_token", "reach"]


class Tail(NamedTuple):
    """A stored tail: it ends at token ``end`` (not a chunk boundary) and begins at the boundary before."""

    end: int
    mask: int


@dataclass(frozen=True)
class Need:
    """Parts to load: those of ``kinds`` of the chunk at ``index``, which covers tokens [start, end)."""

    index: int
    start: int
    end: int
    kinds: tuple[str, ...]
    is_tail: bool


@dataclass(frozen=True)
class Blocker:
    """Why a reach ends where it does: the first chunk and kind that is missing, and which parts of it."""

    index: int
    kind: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Reach:
    """``n`` tokens can be had (0 if none beyond those computed), from the parts in ``needs``."""

    n: int
    needs: tuple[Need, ...]
    blocker: Blocker | None


def first_token(kind: GroupKind, n: int, align: int) -> int:
    """The first token whose KV of this kind is needed to continue at token n, rounded down to ``align``
    (the engine's block size in tokens)."""
    if kind.window is None:
        return 0
    lo = n // kind.window * kind.window if kind.name.startswith("chunked") else max(0, n - kind.window + 1)
    return lo // align * align


def reach(
    manifest: Manifest, masks: Sequence[int], tails: Sequence[Tail], limit: int, computed: int = 0, align: int = 1
) -> Reach:
    """The largest n in (computed, limit] for which every kind is covered.

    ``masks[i]`` is the presence mask of the text's i-th full chunk, ``tails`` what else was found; ``limit``
    is usually the prompt's length - 1; tokens below ``computed`` are in the engine already.
    """
    chunk = manifest.chunk_tokens
    by_tail = {t.end: t.mask for t in tails}
    blocker: Blocker | None = None
    for end in _ends(len(masks), chunk, by_tail):
        n = min(end, limit)
        if n <= computed:
            break
        needs, found = _needs(manifest, masks, by_tail, n, end, computed, align)
        if found is None:
            return Reach(n, needs, blocker)
        if blocker is None or found.index < blocker.index:
            blocker = found
    return Reach(0, (), blocker)


def _ends(chunks: int, chunk: int, by_tail: dict[int, int]) -> Iterator[int]:
    """Where a reach may end, farthest first."""
    yield from sorted({*by_tail, *((i + 1) * chunk for i in range(chunks))}, reverse=True)


def _needs(
    manifest: Manifest, masks: Sequence[int], by_tail: dict[int, int], n: int, end: int, computed: int, align: int
) -> tuple[tuple[Need, ...], Blocker | None]:
    """The parts for a hit of n tokens that ends with the chunk or tail ending at ``end``, or what is missing."""
    chunk = manifest.chunk_tokens
    kinds: dict[int, list[str]] = {}
    for kind in manifest.kinds:
        want = manifest.mask_of(kind.name)
        for i in range(max(computed, first_token(kind, n, align)) // chunk, -(-n // chunk)):
            has = by_tail[end] if end % chunk and i == end // chunk else masks[i] if i < len(masks) else 0
            if has & want != want:
                missing = tuple(str(p) for p in manifest.parts if p.kind == kind.name and not has & manifest.bit(p))
                return (), Blocker(i, kind.name, missing)
            kinds.setdefault(i, []).append(kind.name)
    needs = []
    for i in sorted(kinds):
        stop = min((i + 1) * chunk, end)
        needs.append(Need(i, i * chunk, stop, tuple(kinds[i]), stop % chunk != 0))
    return tuple(needs), None
