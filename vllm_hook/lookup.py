"""Asks the store what it has, in a thread of its own: the scheduler asks again next step until an answer is there.

One question finds the chunks of a text and, inside the first chunk that is missing, the tail that an earlier text may
have left there. A request waits for its answer no longer than the deadline; then it is a miss.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kvfs.errors import DaemonUnavailable, DeadlineExceeded, KvfsError, NamespaceNotFound
from kvfs.identity import Manifest
from kvfs.reach import Need, Tail
from kvfs.vllm_hook.chain import Chain

__all__ = ["Answer", "Found", "Lookups", "Question"]

log = logging.getLogger(__name__)

FRESH = 1.0
"""Seconds for which an answer holds while its request waits to be scheduled."""


@dataclass(frozen=True)
class Found:
    """What one namespace has of a text: a presence mask per full chunk, and tails by their end."""

    chain: Chain
    masks: tuple[int, ...]
    tails: Mapping[int, int]

    def of(self, need: Need) -> int:
        """The presence mask of a chunk or tail."""
        return self.tails.get(need.end, 0) if need.is_tail else self.masks[need.index]


@dataclass(frozen=True)
class Answer:
    """What the namespaces that a request may read have of its text, the preferred one first.

    ``masks``, one for each full chunk, and ``tails`` are what there is to load: where there are several namespaces,
    a kind counts that is whole in one of them.
    """

    found: tuple[Found, ...] = ()
    masks: tuple[int, ...] = ()
    tails: tuple[Tail, ...] = ()

    @classmethod
    def of(cls, found: tuple[Found, ...]) -> Self:
        """Put together what was found."""
        manifest = found[0].chain.manifest
        wholes = [manifest.mask_of(k.name) for k in manifest.kinds]

        def merged(masks: Sequence[int]) -> int:
            if len(masks) == 1:
                return masks[0]
            return sum(whole for whole in wholes if any(whole & m == whole for m in masks))

        ends = sorted({end for f in found for end in f.tails})
        tails = (Tail(end, merged([f.tails.get(end, 0) for f in found])) for end in ends)
        masks = zip(*(f.masks for f in found), strict=True)
        return cls(found, tuple(merged(row) for row in masks), tuple(t for t in tails if t.mask))

    def sources(self, need: Need) -> Iterator[tuple[Chain, tuple[str, ...]]]:
        """Where to load a chunk or tail from: each kind from the first namespace that has all of it."""
        left = list(need.kinds)
        for f in self.found:
            manifest, mask = f.chain.manifest, f.of(need)
            kinds = tuple(k for k in left if (of := manifest.mask_of(k)) & mask == of)
            if kinds:
                yield f.chain, kinds
                left = [k for k in left if k not in kinds]


@dataclass(eq=False)
class Question:
    """One lookup of a request: its ``chains``, one for each namespace it may read, the preferred one first.

    ``answer`` is filled by the thread; ``reason`` says why it is empty (a slug for the metrics).
    """

    chains: Sequence[Chain]
    asked: float = field(default_factory=time.monotonic)
    tokens: int = 0
    answer: Answer | None = None
    reason: str = ""
    handled: threading.Event = field(default_factory=threading.Event)
    """Set when the thread is done with it."""

    def __post_init__(self) -> None:
        self.tokens = len(self.chains[0])

    def holds(self, tokens: int) -> bool:
        """Whether it was asked of a text of so many tokens, lately enough."""
        return tokens == self.tokens and (self.answer is None or time.monotonic() - self.asked < FRESH)


class Lookups:
    """The thread that asks. ``client`` is one of `kvfs.client`, ``deadline`` in seconds.

    ``register`` makes a namespace known again that the store has forgotten: retired while the engine runs.
    """

    def __init__(self, client: Any, deadline: float, register: Callable[[Manifest], None]) -> None:
        self._client, self._deadline, self._register = client, deadline, register
        self._queue: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvfs-lookup", daemon=True)
        self._thread.start()

    def ask(self, chains: Sequence[Chain]) -> Question:
        """Start a lookup. The chains must not shrink; they may grow."""
        question = Question(chains)
        self._queue.put(question)
        return question

    def overdue(self, question: Question) -> bool:
        """Whether an unanswered question is given up: then it is a miss, whatever is answered later."""
        if time.monotonic() - question.asked < self._deadline:
            return False
        question.answer, question.reason = Answer(), "deadline"
        return True

    def close(self) -> None:
        """End the thread; it may be stuck in the store, so nobody waits for it long."""
        self._queue.put(None)
        self._thread.join(1.0)

    def _run(self) -> None:
        while (question := self._queue.get()) is not None:
            if question.answer is not None:
                continue
            try:
                answer = self._look(question.chains)
            except NamespaceNotFound:
                answer = Answer()
                self._restore(question.chains)
            except (KvfsError, OSError) as e:
                answer = Answer()
                question.reason = _slug(e)
                log.debug("lookup failed: %s", e)
            if question.answer is None:
                question.answer = answer
            question.handled.set()

    def _restore(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            try:
                self._register(chain.manifest)
            except (KvfsError, OSError) as e:  # the next lookup tries again
                log.debug("cannot register %s: %s", chain.manifest.ns_hex, e)

    def _look(self, chains: Sequence[Chain]) -> Answer:
        shortest = min(chains, key=len)  # the scheduler may be extending them, one after the other
        count = len(shortest.keys)
        masks = [self._masks(chain, chain.keys[:count]) for chain in chains]
        missing = next((i for i, row in enumerate(zip(*masks, strict=True)) if not any(row)), count)
        ends = shortest.tail_ends(missing)
        tails = [self._masks(chain, [chain.tail_key(end) for end in ends]) for chain in chains]
        return Answer.of(
            tuple(
                Found(chain, tuple(of_chunks), {end: m for end, m in zip(ends, of_tails, strict=True) if m})
                for chain, of_chunks, of_tails in zip(chains, masks, tails, strict=True)
            )
        )

    def _masks(self, chain: Chain, keys: list[bytes]) -> list[int]:
        masks: list[int] = self._client.lookup(chain.manifest.ns, keys, timeout=self._deadline) if keys else []
        return masks


def _slug(error: Exception) -> str:
    if isinstance(error, DaemonUnavailable):
        return "unavailable"
    return "deadline" if isinstance(error, DeadlineExceeded) else "error"
