"""What the hook counts, in vLLM's terms: a payload that travels from every half to the engine's logger and /metrics."""

import threading
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter as PrometheusCounter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["COUNTERS", "Counts", "HookMetrics", "HookStats"]

COUNTERS: dict[str, tuple[str, str]] = {
    "hit_tokens": ("", "Tokens of requests that the store could provide."),
    "missed_tokens": ("", "Tokens of requests that neither the engine nor the store had."),
    "lookup_failures": ("reason", "Lookups without an answer."),
    "gate": ("decision", "Hits that were loaded, and hits that are faster computed: load or recompute."),
    "loads": ("", "Loads that filled an engine's blocks."),
    "load_bytes": ("", "Bytes that loads have put into blocks."),
    "load_seconds": ("", "Time that loads took, on the loader's clock."),
    "compacted_bytes": ("way", "Bytes of KV in compacted parts that loads have read: decoded here, or hydrated."),
    "compacted_seconds": ("way", "Time that took, summed over threads."),
    "load_failures": ("reason", "Loads given up; the engine computed these tokens."),
    "saved_parts": ("", "Parts written to the store."),
    "saved_bytes": ("", "Bytes of the parts written to the store."),
    "parts_present": ("", "Parts that another writer had stored meanwhile."),
    "parts_gone": ("", "Parts not stored because the engine had freed blocks of them."),
    "save_drops": ("reason", "Parts not stored: the queue was full, or the store refused them."),
    "errors": ("where", "Exceptions caught at the hook's boundary."),
}
"""Every counter: the name of its label (none: ""), and what it counts."""


class Counts:
    """Counters of one half, from any thread; ``take`` gives what was counted since the last time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data: dict[str, float] = {}

    def add(self, name: str, value: float, label: str = "") -> None:
        """Count; ``label`` is the value of the counter's label."""
        if value:
            key = f"{name}:{label}" if label else name
            with self._lock:
                self._data[key] = self._data.get(key, 0) + value

    def take(self) -> "HookStats | None":
        """Everything counted since the last call; None if nothing was."""
        with self._lock:
            data, self._data = self._data, {}
        return HookStats(data=data) if data else None


@dataclass
class HookStats(KVConnectorStats):
    """Counts by ``name`` or ``name:label``."""

    def reset(self) -> None:
        """Forget all."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> "HookStats":
        """Add the counts of another rank, half or interval."""
        for key, value in other.data.items():
            self.data[key] = self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The line of an interval in the engine's log."""
        return {k: round(v, 3) for k, v in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class HookMetrics(KVConnectorPromMetrics):
    """The counters as ``kvfs_hook_<name>_total`` on the engine's own /metrics page."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[PrometheusCounter]
        self._counters = {
            name: counter(f"kvfs_hook_{name}", text, [*labelnames, *filter(None, [label])])
            for name, (label, text) in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what one engine has counted."""
        for key, value in transfer_stats_data.items():
            name, _, label = key.partition(":")
            labels = [*self.per_engine_labelvalues[engine_idx], *filter(None, [label])]
            self._counters[name].labels(*labels).inc(value)
