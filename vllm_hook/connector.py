"""The class vLLM loads. It only divides the calls between the two halves, and lets nothing out of them.

Any exception out of a connector kills the engine and all its requests, so every method is guarded: what goes wrong is
logged, counted, and answered with what costs least (a miss, a failed load, a dropped store).
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.version import __version_tuple__ as vllm_version

from kvfs import config
from kvfs.client import connect
from kvfs.errors import ConfigError, Unsupported
from kvfs.identity import Manifest, Salts
from kvfs.store import Store
from kvfs.vllm_hook.fingerprint import Namespaces
from kvfs.vllm_hook.gate import Gate
from kvfs.vllm_hook.jobs import Load, StepJobs
from kvfs.vllm_hook.lookup import Lookups
from kvfs.vllm_hook.scheduler import SchedulerHalf
from kvfs.vllm_hook.settings import Settings
from kvfs.vllm_hook.stats import Counts, HookMetrics, HookStats
from kvfs.vllm_hook.worker import Greeting, WorkerHalf

__all__ = ["KvfsConnector"]

log = logging.getLogger(__name__)

OLDEST = (0, 30)
"""First vLLM with results per request and block tables of a step."""
QUIET = 30.0
"""Seconds between two log lines about the same method."""

F = TypeVar("F", bound=Callable[..., Any])


def guarded(fallback: Callable[..., Any]) -> Callable[[F], F]:
    """Make a method that never raises: what it would have raised is answered by ``fallback``, called alike."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def wrapper(self: "KvfsConnector", *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as e:  # noqa: BLE001 - the hook's outer boundary
                self.caught(method.__name__, e)
                return fallback(self, *args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def nothing(*_: Any, **__: Any) -> None:
    """The answer of a method that has none to give."""


class KvfsConnector(base.KVConnectorBase_V1, base.SupportsHMA):
    """kvfs for vLLM. ``kv_connector_extra_config`` is described by `kvfs.vllm_hook.settings.Settings`.

    Raises ConfigError for settings that cannot be meant; an engine that kvfs cannot serve is told so in one warning,
    and runs on without it.
    """

    worker_class = WorkerHalf

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = self._kv_transfer_config
        check_vllm(vllm_version, transfer)
        self.settings = Settings.parse(transfer.kv_connector_extra_config)
        self.counts = Counts()
        self.client = connect(
            mount=self.settings.mount, store=self.settings.store, upkeep=config.load() if self.settings.store else None
        )
        self._logged: dict[str, float] = {}
        self._greeting = Greeting(None, "its KV cache was never registered")
        self._lost: set[str] = set()
        self._worker: WorkerHalf | None = None
        self._scheduler: SchedulerHalf | None = None
        if role == base.KVConnectorRole.SCHEDULER:
            namespaces = Namespaces(vllm_config, self.settings.chunk_tokens, self.settings.fidelity, self._register)
            self._scheduler = SchedulerHalf(
                namespaces,
                Lookups(self.client, self.settings.lookup_deadline, namespaces.register),
                Gate(self.settings.gate, vllm_config.parallel_config.tensor_parallel_size),
                self.counts,
                self.settings.interval_tokens,
                reads=transfer.is_kv_consumer,
                writes=transfer.is_kv_producer,
            )

    def _register(self, manifest: Manifest, info: dict[str, Any]) -> Salts:
        if self.settings.store:
            Store.init(self.settings.store).close()
        self.client.register(manifest, info)
        return self.client.salts()

    def caught(self, where: str, error: Exception) -> None:
        """Count an exception, and log it unless one of the same method was logged just now."""
        self.counts.add("errors", 1, where)
        now = time.monotonic()
        if now - self._logged.get(where, -QUIET) >= QUIET:
            self._logged[where] = now
            log.error("kvfs: %s failed; the engine goes on without it", where, exc_info=error)

    # --- both roles ---

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a dropped save is only a later miss."""
        return False

    @guarded(nothing)
    def shutdown(self) -> None:
        """End the threads and the connection to the store."""
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
        self.client.close()

    @guarded(nothing)
    def get_kv_connector_stats(self) -> HookStats | None:
        """What was counted since the last call."""
        return self.counts.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HookStats:
        """Counts as they arrive in the process that logs them."""
        return HookStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> HookMetrics:
        """The same counts on the engine's /metrics page."""
        return HookMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- scheduler ---

    def set_xfer_handshake_metadata(self, metadata: dict[int, Greeting]) -> None:
        """The workers have told what their layers are."""
        self._greeted(list(metadata.values()))

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Greeting]) -> None:
        """The same, of ranks by pipeline stage."""
        self._greeted(list(metadata.values()))

    @guarded(nothing)
    def _greeted(self, greetings: list[Greeting]) -> None:
        """Begin, or stay off if one of the workers cannot work."""
        if self._scheduler is None:
            return
        for greeting in greetings:
            if greeting.geometry is None:
                log.warning("kvfs is off for this engine: not supported: %s", greeting.refusal)
                self._scheduler.close()
                self._scheduler = None
                return
        if greetings and greetings[0].geometry is not None:
            self._scheduler.start(greetings[0].geometry)

    @guarded(nothing)
    def on_new_request(self, request: Any) -> None:
        """A request has arrived: ask the store at once."""
        if self._scheduler is not None:
            self._scheduler.track(request)

    @guarded(lambda *_: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those computed, always asynchronously; None: not known yet."""
        return (0, False) if self._scheduler is None else self._scheduler.matched(request, num_computed_tokens)

    def _doom(self, request: Any, _: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.doom(request, num_external_tokens)

    @guarded(_doom)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has its blocks."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepJobs:
        """The jobs of this step. Its loads are promised, so nothing that goes wrong with saves may lose them."""
        if self._scheduler is None:
            return StepJobs()
        jobs = self._scheduler.take_step()
        jobs.idle = not scheduler_output.num_scheduled_tokens
        self._add_saves(jobs, scheduler_output)
        return jobs

    @guarded(nothing)
    def _add_saves(self, jobs: StepJobs, scheduler_output: Any) -> None:
        if self._scheduler is None or not scheduler_output.num_scheduled_tokens:
            return
        cached = scheduler_output.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        tables = scheduler_output.kv_connector_block_state.get_block_ids
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            self._scheduler.scheduled(jobs, request_id, before[request_id], count, tables)

    @guarded(nothing)
    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have reported."""
        if self._scheduler is None:
            return
        self._scheduler.received(connector_output.finished_recving or set(), connector_output.failed_recving or set())
        stats = connector_output.kv_connector_stats
        if stats is not None and (seconds := stats.data.get("load_seconds")):
            self._scheduler.measured(stats.data.get("load_bytes", 0), seconds)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """As `request_finished_all_groups`, of an engine with one group."""
        return self.request_finished_all_groups(request, (block_ids,))

    @guarded(lambda *_: (False, None))
    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        """A request has ended; True: keep its blocks until its last tail is gathered."""
        return self._scheduler is not None and self._scheduler.finished(request, block_ids), None

    @guarded(lambda *_: False)
    def reset_cache(self) -> bool:
        """The engine's KV is void (its weights may have changed): use a fresh private namespace from now on."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # --- worker ---

    @guarded(nothing)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The engine has allocated its KV cache."""
        self._greeting = Greeting(None, "an error while looking at its KV cache")
        try:
            self._worker = self.worker_class(
                self.settings, self.client, self.counts, self._vllm_config, self._kv_cache_config, kv_caches
            )
        except Unsupported as e:
            self._greeting = Greeting(None, str(e.args[0]))
        else:
            self._greeting = Greeting(self._worker.geometry)

    def get_handshake_metadata(self) -> Greeting:
        """What the scheduler half has to know of this rank."""
        return self._greeting

    @guarded(nothing)
    def handle_preemptions(self, kv_connector_metadata: StepJobs) -> None:  # noqa: ARG002 - all gathers, whatever is named
        """A step is about to write to blocks that were freed."""
        if self._worker is not None:
            self._worker.order()

    def bind_connector_metadata(self, connector_metadata: StepJobs) -> None:
        """A step begins: each of its loads has to be reported once, whatever happens."""
        super().bind_connector_metadata(connector_metadata)
        self._begin(connector_metadata)
        for load in connector_metadata.loads:
            self._submit(load)

    @guarded(nothing)
    def _begin(self, jobs: StepJobs) -> None:
        if self._worker is not None:
            self._worker.begin(jobs)

    def _lose(self, load: Load) -> None:
        if self._worker is None:
            self._lost.add(load.request)
        else:
            self._worker.loader.fail(load.request, "error")

    @guarded(_lose)
    def _submit(self, load: Load) -> None:
        if self._worker is None:
            self._lose(load)
        else:
            self._worker.submit(load)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads began with the step."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: what is loaded is not used before it is reported."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole parts are gathered at the end of the step."""

    @guarded(nothing)
    def wait_for_save(self) -> None:
        """The forward pass is done, or launched: take what is to be stored."""
        jobs = self._get_connector_metadata()
        if self._worker is not None and jobs.saves:
            self._worker.end(jobs)

    @guarded(lambda *_: base.KVConnectorTransferResults())
    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:  # noqa: ARG002 - blocks are held by request
        """What has ended since the last call."""
        lost, self._lost = self._lost, set()
        sent, done, failed = self._worker.results() if self._worker is not None else (set(), set(), set())
        return base.KVConnectorTransferResults(sent, done | lost, failed | lost)


def check_vllm(version: tuple[Any, ...], transfer: Any) -> None:
    """Refuse to start where a failed load would fail requests. ConfigError with the line to write."""
    if version[:2] < OLDEST and version[:2] != (0, 0):
        raise ConfigError(f"vLLM {version[0]}.{version[1]} is too old for kvfs; it needs 0.{OLDEST[1]} or newer")
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f'kv_load_failure_policy is "{transfer.kv_load_failure_policy}", so a chunk that has gone would fail a '
            'request; write "kv_load_failure_policy": "recompute" into --kv-transfer-config'
        )
