"""The scheduler half: keys, lookups, what to load and what to store. It moves no bytes and waits for `BRIEF` at most.

vLLM calls it between steps. For one request: ``matched`` again and again while it is queued; ``allocated`` when it is
admitted, and once more when a load has ended; ``scheduled`` in every step that computes some of it; ``finished``.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvfs.chunk import layout
from kvfs.identity import PartId
from kvfs.reach import Reach, first_token, reach
from kvfs.vllm_hook.chain import Chain
from kvfs.vllm_hook.fingerprint import Adapter, Namespaces
from kvfs.vllm_hook.gate import Gate
from kvfs.vllm_hook.geometry import Geometry, Group
from kvfs.vllm_hook.jobs import Load, LoadPart, Save, SavePart, StepJobs
from kvfs.vllm_hook.lookup import Answer, Lookups, Question
from kvfs.vllm_hook.saving import Retention, live, tail_end
from kvfs.vllm_hook.stats import Counts

__all__ = ["SchedulerHalf"]

Tables = Sequence[Sequence[int]]
"""A request's block ids, one list per group of the engine."""

BRIEF = 0.003
"""Seconds that the questions of one step are waited for, all together. An engine that has nothing else to run asks
again and again without a pause, and would keep the interpreter from the thread that answers; and requests that came
together start together only if their answers do."""

_UNFIT_TO_STORE = frozenset({"FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED"})


@dataclass(frozen=True)
class Plan:
    """What a hit promised to the engine consists of; ``computed`` tokens it has already."""

    answer: Answer
    computed: int
    reach: Reach
    nbytes: int


@dataclass(eq=False)
class Tracked:
    """One live request.

    ``chains`` are its keys in each namespace it reads, the first being the one it writes; empty while that is not
    known. ``plan`` is the hit last found, and ``planned`` for what. ``hit`` is the number of tokens it had when it was
    last admitted, ``stored`` the index of the first chunk not handled since (-1: see ``hit``), ``tail`` the end of the
    last tail stored. ``began`` is when its prefill began, and at which token.
    """

    request: Any
    reads: bool
    writes: bool
    chains: tuple[Chain, ...] = ()
    question: Question | None = None
    plan: Plan | None = None
    planned: tuple[Question, int] | None = None
    loading: bool = False
    hit: int | None = None
    stored: int = 0
    tail: int = 0
    began: tuple[float, int] | None = None
    counted: bool = False

    @property
    def answer(self) -> Answer | None:
        """What the store is known to have of this text in the namespace it writes."""
        return self.question.answers[0] if self.question and self.question.answers else None

    def missing(self, index: int, kinds: Sequence[str]) -> tuple[str, ...]:
        """Those of ``kinds`` that the store was not known to have of a full chunk."""
        masks, manifest = self.answer.masks if self.answer else (), self.chains[0].manifest
        mask = masks[index] if index < len(masks) else 0
        return tuple(k for k in kinds if (of := manifest.mask_of(k)) & mask != of)


class SchedulerHalf:
    """All requests of one engine. ``start`` begins its work; until then everything is a miss."""

    def __init__(
        self,
        namespaces: Namespaces,
        lookups: Lookups,
        gate: Gate,
        counts: Counts,
        interval: int,
        reads: bool = True,
        writes: bool = True,
    ) -> None:
        self._namespaces, self._lookups, self._gate, self._counts = namespaces, lookups, gate, counts
        self._interval, self._reads, self._writes = interval, reads, writes
        self._groups: tuple[Group, ...] = ()
        self._align = 1
        self._requests: dict[str, Tracked] = {}
        self._announced: set[bytes] = set()
        self._step = StepJobs()
        self._brief = BRIEF  # what is left of it in this step

    def start(self, geometry: Geometry) -> None:
        """Begin: the workers have told what their layers are."""
        self._groups = geometry.groups
        self._align = math.lcm(*(g.block_size for g in geometry.groups))
        self._namespaces.start(geometry)

    # --- lookups ---

    def track(self, request: Any) -> Tracked:
        """Find or begin the record of a request, and ask the store as soon as its namespace is known."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            params = request.kv_transfer_params or {}
            usable = not request.resumable  # else its tokens may be replaced later
            adapter = adapter_of(request)
            if adapter is not None and request.lora_request.load_inplace:
                self._namespaces.forget(adapter)
            reads = self._reads and usable and not request.skip_reading_prefix_cache
            tracked = self._requests[request.request_id] = Tracked(
                request,
                reads=reads and not params.get("kvfs.skip_read"),
                writes=self._writes and usable and not params.get("kvfs.skip_write"),
            )
        if not tracked.chains and (tracked.reads or tracked.writes):
            manifest = self._namespaces.get(adapter_of(request))
            if manifest is not None:
                read = [m for m in (manifest, self._namespaces.exact_twin(manifest)) if m is not None]
                tracked.chains = tuple(Chain(m, request).extend() for m in read)
                tracked.question = self._lookups.ask(tracked.chains)
        return tracked

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond ``computed`` can be loaded, asynchronously; None: ask again next step."""
        tracked = self.track(request)
        if not tracked.reads or not tracked.chains:
            return 0, False
        question = tracked.question
        if question is None or not question.holds(request.num_tokens):
            question = tracked.question = self._lookups.ask([c.extend() for c in tracked.chains])
        self._wait(question)
        if question.answers is None and not self._lookups.overdue(question):
            return None, False
        if (question, computed) != tracked.planned:  # a queued request is asked for in every step
            plans = [self._plan(answer, computed, request.num_tokens - 1) for answer in question.answers or ()]
            tracked.plan = max(filter(None, plans), key=lambda p: p.reach.n, default=None)
            tracked.planned = (question, computed)
        plan = tracked.plan
        hit = plan.reach.n - computed if plan else 0
        if not tracked.counted:
            tracked.counted = True
            self._counts.add("hit_tokens", hit)
            self._counts.add("missed_tokens", request.num_tokens - computed - hit)
            if question.reason:
                self._counts.add("lookup_failures", 1, question.reason)
        if plan is not None and not self._gate.opens(hit, plan.nbytes):
            self._counts.add("gate", 1, "recompute")
            tracked.reads = False  # the same answer when it is asked again
            return 0, False
        return hit, hit > 0

    def _wait(self, question: Question) -> None:
        if question.answers is None and self._brief > 0:
            began = time.monotonic()
            question.handled.wait(self._brief)
            self._brief -= time.monotonic() - began

    def _plan(self, answer: Answer, computed: int, limit: int) -> Plan | None:
        manifest = answer.chain.manifest
        found = reach(manifest, answer.masks, answer.tails, limit, computed, self._align)
        if found.n <= computed:
            return None
        nbytes = sum(
            layout(manifest, PartId(kind, 0), need.end - need.start).nbytes * manifest.kind(kind).head_slices
            for need in found.needs
            for kind in need.kinds
        )
        return Plan(answer, computed, found, nbytes)

    # --- loads ---

    def allocated(self, request: Any, block_ids: Tables, external: int) -> None:
        """A request got its blocks; ``external`` tokens of them are to be loaded as promised."""
        tracked = self.track(request)
        tracked.hit = None
        if not external:
            return
        plan, tracked.plan, tracked.planned = tracked.plan, None, None
        if plan is None or plan.reach.n - plan.computed != external:
            raise RuntimeError(f"{external} tokens expected that were not promised ({plan})")
        self._step.loads.append(self._load(request.request_id, plan, block_ids))
        tracked.loading = True
        self._counts.add("gate", 1, "load")

    def _load(self, request_id: str, plan: Plan, block_ids: Tables) -> Load:
        n, chain = plan.reach.n, plan.answer.chain
        first = {k.name: max(plan.computed, first_token(k, n, self._align)) for k in chain.manifest.kinds}
        parts = tuple(
            LoadPart(
                chain.tail_key(need.end) if need.is_tail else chain.keys[need.index],
                need.start,
                need.end - need.start,
                need.kinds,
            )
            for need in plan.reach.needs
        )
        self._announce(chain, self._step)
        seconds = self._gate.load_seconds(plan.nbytes)
        return Load(request_id, chain.manifest.ns, n, first, parts, copied(block_ids), plan.nbytes, seconds)

    def doom(self, request: Any, external: int) -> None:
        """`allocated` went wrong. The engine waits for a load all the same, so let there be one that fails."""
        if external:
            self._step.loads.append(Load(request.request_id, b"", 0, {}, (), (), 0, 0.0))

    def received(self, finished: set[str], failed: set[str]) -> None:
        """Loads have ended; a request whose load failed is asked for again, and must not load again."""
        for request_id in finished & self._requests.keys():
            self._requests[request_id].loading = False
        for request_id in failed & self._requests.keys():
            self._requests[request_id].reads = False

    def measured(self, load_bytes: float, load_seconds: float) -> None:
        """The workers have timed loads."""
        self._gate.loaded(load_bytes, load_seconds)

    # --- saves ---

    def take_step(self) -> StepJobs:
        """The jobs gathered since the last step."""
        step, self._step, self._brief = self._step, StepJobs(), BRIEF
        return step

    def scheduled(
        self, step: StepJobs, request_id: str, before: int, count: int, tables: Callable[[str], Tables]
    ) -> None:
        """A request computes ``count`` tokens after ``before`` in this step: add to ``step`` what that completes."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        self._time(tracked, before)
        if tracked.hit is None:
            tracked.hit, tracked.stored = before, -1
        if not tracked.writes or tracked.loading or not self.track(tracked.request).chains:
            return
        request, chain = tracked.request, tracked.chains[0]
        chunk = chain.manifest.chunk_tokens
        if tracked.stored < 0:
            tracked.stored = tracked.hit // chunk
        end = min(before + count, request.num_tokens)  # beyond it are a draft's guesses
        cut = tail_end(request.num_prompt_tokens)
        at_cut = before < cut <= end and cut % chunk != 0
        if end // chunk <= tracked.stored and not at_cut:
            return
        chain.extend()
        block_ids = tables(request_id)
        rule = Retention(chain.manifest, request.num_prompt_tokens, self._align, self._interval)
        parts = []
        for i, kinds in rule.completed(tracked.stored, end):
            parts += self._part(chain, chain.keys[i], i * chunk, chunk, tracked.missing(i, kinds), block_ids)
        tracked.stored = max(tracked.stored, end // chunk)
        if at_cut:
            parts += self._tail(tracked, cut, block_ids)
        self._save(step, request_id, chain, parts, block_ids)

    def finished(self, request: Any, block_ids: Tables) -> bool:
        """A request has ended. True if the engine has to keep its blocks until its last tail is gathered."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None or tracked.loading or tracked.hit is None:
            return False
        self._time(tracked, request.num_computed_tokens)
        if not tracked.writes or not tracked.chains or request.status.name in _UNFIT_TO_STORE:
            return False
        chain = tracked.chains[0]
        end = tail_end(min(request.num_computed_tokens, request.num_tokens - 1))
        if end <= max(tracked.tail, tracked.hit) or end % chain.manifest.chunk_tokens == 0:
            return False
        chain.extend()
        parts = self._tail(tracked, end, block_ids)
        self._save(self._step, request.request_id, chain, parts, block_ids)
        if parts:
            self._step.held.add(request.request_id)
        return bool(parts)

    def _tail(self, tracked: Tracked, end: int, block_ids: Tables) -> list[SavePart]:
        chain, tracked.tail = tracked.chains[0], end
        if tracked.answer and any(t.end == end and t.mask == chain.manifest.all_parts for t in tracked.answer.tails):
            return []
        start = end // chain.manifest.chunk_tokens * chain.manifest.chunk_tokens
        kinds = tuple(k.name for k in chain.manifest.kinds)
        return self._part(chain, chain.tail_key(end), start, end - start, kinds, block_ids)

    def _part(
        self, chain: Chain, key: bytes, start: int, tokens: int, kinds: tuple[str, ...], block_ids: Tables
    ) -> list[SavePart]:
        gone = {
            g.kind
            for g, ids in zip(self._groups, block_ids, strict=True)
            if g.kind in kinds and not live(ids, g.block_size, start, start + tokens)
        }
        if gone:
            self._counts.add("parts_gone", len(gone))
        kept = tuple(k for k in kinds if k not in gone)
        return [SavePart(key, chain.parent(start), start, tokens, kept)] if kept else []

    def _save(self, step: StepJobs, request_id: str, chain: Chain, parts: list[SavePart], block_ids: Tables) -> None:
        if parts:
            self._announce(chain, step)
            step.saves.append(Save(request_id, chain.manifest.ns, tuple(parts), copied(block_ids)))

    # --- the rest ---

    def reset(self) -> None:
        """The engine's KV is void from now on: a fresh private namespace, and nothing more of the live requests."""
        self._namespaces.renew()
        for tracked in self._requests.values():
            tracked.reads = tracked.writes = False

    def close(self) -> None:
        """End the threads."""
        self._lookups.close()
        self._namespaces.close()

    def _announce(self, chain: Chain, step: StepJobs) -> None:
        if chain.manifest.ns not in self._announced:
            self._announced.add(chain.manifest.ns)
            step.manifests.append(chain.manifest)

    def _time(self, tracked: Tracked, computed: int) -> None:
        """Measure the speed of prefill: from the first step of a prompt to the first after its end."""
        prompt = tracked.request.num_prompt_tokens
        if computed < prompt:
            tracked.began = tracked.began or (time.monotonic(), computed)
        elif tracked.began is not None:
            began, at = tracked.began
            tracked.began = None
            self._gate.prefilled(prompt - at, time.monotonic() - began)


def adapter_of(request: Any) -> Adapter | None:
    """The LoRA adapter a request asks for."""
    lora = request.lora_request
    return (lora.lora_int_id, lora.lora_path) if lora else None


def copied(block_ids: Tables) -> tuple[list[int], ...]:
    """Block tables as they are now: the engine goes on changing its own."""
    return tuple(list(ids) for ids in block_ids)
