"""Asks the store what it has, in a thread of its own: the scheduler asks again next step until an answer is there.

One question finds the chunks of a text and, inside the first chunk that is missing, the tail that an earlier text may
have left there. A request waits for its answer no longer than the deadline; then it is a miss.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvfs.errors import DaemonUnavailable, DeadlineExceeded, KvfsError, NamespaceNotFound
from kvfs.identity import Manifest
from kvfs.reach import Tail
from kvfs.vllm_hook.chain import Chain

__all__ = ["Answer", "Lookups", "Question"]

log = logging.getLogger(__name__)

FRESH = 1.0
"""Seconds for which an answer holds while its request waits to be scheduled."""


@dataclass(frozen=True)
class Answer:
    """What the store has of one text: a presence mask per full chunk, and tails inside the first missing one."""

    chain: Chain
    masks: tuple[int, ...] = ()
    tails: tuple[Tail, ...] = ()


@dataclass(eq=False)
class Question:
    """One lookup of a request: its ``chains``, one for each namespace it may read.

    ``answers`` is filled by the thread; ``reason`` says why there are none to come (a slug for the metrics).
    """

    chains: Sequence[Chain]
    asked: float = field(default_factory=time.monotonic)
    tokens: int = 0
    answers: tuple[Answer, ...] | None = None
    reason: str = ""
    handled: threading.Event = field(default_factory=threading.Event)
    """Set when the thread is done with it."""

    def __post_init__(self) -> None:
        self.tokens = len(self.chains[0])

    def holds(self, tokens: int) -> bool:
        """Whether it was asked of a text of so many tokens, lately enough."""
        return tokens == self.tokens and (self.answers is None or time.monotonic() - self.asked < FRESH)


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
        question.answers, question.reason = (), "deadline"
        return True

    def close(self) -> None:
        """End the thread; it may be stuck in the store, so nobody waits for it long."""
        self._queue.put(None)
        self._thread.join(1.0)

    def _run(self) -> None:
        while (question := self._queue.get()) is not None:
            if question.answers is not None:
                continue
            try:
                found = tuple(self._look(chain) for chain in question.chains)
            except NamespaceNotFound:
                found = ()
                self._restore(question.chains)
            except (KvfsError, OSError) as e:
                found = ()
                question.reason = _slug(e)
                log.debug("lookup failed: %s", e)
            if question.answers is None:
                question.answers = found
            question.handled.set()

    def _restore(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            try:
                self._register(chain.manifest)
            except (KvfsError, OSError) as e:  # the next lookup tries again
                log.debug("cannot register %s: %s", chain.manifest.ns_hex, e)

    def _look(self, chain: Chain) -> Answer:
        ns, keys = chain.manifest.ns, list(chain.keys)
        masks = self._client.lookup(ns, keys, timeout=self._deadline) if keys else []
        missing = next((i for i, m in enumerate(masks) if not m), len(masks))
        ends = chain.tail_ends(missing)
        if not ends:
            return Answer(chain, tuple(masks))
        found = self._client.lookup(ns, [chain.tail_key(end) for end in ends], timeout=self._deadline)
        return Answer(chain, tuple(masks), tuple(Tail(end, m) for end, m in zip(ends, found, strict=True) if m))


def _slug(error: Exception) -> str:
    if isinstance(error, DaemonUnavailable):
        return "unavailable"
    return "deadline" if isinstance(error, DeadlineExceeded) else "error"
