"""What one daemon counts, in Prometheus' terms; read as a web page, as ``stats.json`` or by ``kvfs status``.

Every process that counts has its own `Metrics` and registry, so nothing mixes with the metrics of an engine that the
library is loaded into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from kvfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfs.config import Address

REQUEST_BUCKETS = (20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3, 0.25, 1.0, 5.0)
"""Upper bounds in seconds for what should take microseconds."""

BULK_BUCKETS = (0.5e-3, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.25, 1.0, 5.0)
"""Upper bounds in seconds for what reads a whole part."""


class Metrics:
    """The counters, gauges and histograms of one process. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, doc: str, *labels: str) -> Counter:
            return Counter(name, doc, labels, registry=self.registry)

        def gauge(name: str, doc: str, *labels: str) -> Gauge:
            return Gauge(name, doc, labels, registry=self.registry)

        def histogram(name: str, doc: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, doc, labels, registry=self.registry, buckets=buckets)

        self.chunks = gauge("kvfs_chunks", "Chunks in the store.")
        self.bytes = gauge("kvfs_bytes", "Bytes of the parts in the store.", "form")
        self.leases = gauge("kvfs_leases", "Chunks claimed by readers.")
        self.budget = gauge("kvfs_budget_bytes", "Bytes that all chunks may take.")
        self.written = gauge("kvfs_written_day_bytes", "Bytes written in the last 24 hours.")

        self.lookup = counter("kvfs_lookup_total", "Keys asked for, by result: hit or miss.", "result")
        self.leased_bytes = counter("kvfs_leased_bytes_total", "Bytes of the parts handed to readers.")
        self.publish = counter("kvfs_publish_total", "Parts offered, by result: created, exists or refused.", "result")
        self.published_bytes = counter("kvfs_published_bytes_total", "Bytes of the parts created.")
        self.refused = counter(
            "kvfs_refused_total",
            "Parts not taken before they were written, by what is used up: space, budget, namespace, writes.",
            "reason",
        )
        self.evicted = counter("kvfs_evicted_total", "Chunks evicted, by reason.", "reason")
        self.removed = counter("kvfs_removed_total", "Parts removed, by reason.", "reason")
        self.quarantined = counter("kvfs_quarantined_total", "Damaged parts moved to lost+found, by reason.", "reason")
        self.purged = counter("kvfs_quarantine_purged_total", "Damaged parts removed to keep lost+found small.")
        self.lost_bytes = gauge("kvfs_lost_found_bytes", "Bytes of what is in lost+found.")
        self.saved = gauge("kvfs_saved_bytes", "Bytes that coded parts take less than their raw forms would.")
        self.hydrated = gauge("kvfs_hydrated_bytes", "Bytes of memory that decoded parts take.")
        self.compacted = counter("kvfs_compacted_total", "Parts brought to a coded form, by form.", "form")
        self.heated = counter("kvfs_heated_total", "Chunks that got their raw form back as they were used again.")
        self.scrub_bytes = counter("kvfs_scrub_bytes_total", "Bytes read again in search of damage.")
        self.scrub_damaged = counter("kvfs_scrub_damaged_total", "Damaged parts found by that.")
        self.scrub_complete = gauge(
            "kvfs_scrub_complete_since_seconds", "Unix time since which every part has been read; 0 before that."
        )
        self.verify_seconds = histogram("kvfs_verify_seconds", "Time to check one part's checksums.", BULK_BUCKETS)

        self.fuse_requests = counter(
            "kvfs_fuse_requests_total",
            "Requests of the kernel, by result: ok or the name of the error.",
            "op",
            "result",
        )
        self.fuse_seconds = histogram(
            "kvfs_fuse_request_seconds", "Time to answer a request of the kernel.", REQUEST_BUCKETS, "op"
        )
        self.control_requests = counter(
            "kvfs_control_requests_total",
            "Requests on the control socket, by result: ok or the name of the error.",
            "verb",
            "result",
        )
        self.control_seconds = histogram(
            "kvfs_control_request_seconds", "Time to answer a request on the control socket.", REQUEST_BUCKETS, "verb"
        )

    def snapshot(self) -> dict[str, Any]:
        """Return every value by its Prometheus name, ready for JSON.

        A metric without labels is a number; with labels, a map from ``name=value[,…]`` to a number. A histogram shows
        its two series ``_count`` and ``_sum``.
        """
        values: dict[str, Any] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                if sample.labels:
                    label = ",".join(f"{key}={value}" for key, value in sample.labels.items())
                    values.setdefault(sample.name, {})[label] = sample.value
                else:
                    values[sample.name] = sample.value
        return values

    def serve(self, address: Address) -> Callable[[], None]:
        """Answer ``http://address/metrics`` from a thread of its own; return the function that ends it.

        Raises ConfigError if the address cannot be had.
        """
        try:
            server, thread = start_http_server(address.port, address.host, self.registry)
        except OSError as error:
            raise ConfigError(f"metrics_listen = {address}: {error.strerror}; choose another port") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
