"""The metrics: names, the snapshot, and the page on the loopback address."""

from __future__ import annotations

import json
import socket
import urllib.request

import pytest

from kvfs.config import Address
from kvfs.errors import ConfigError
from kvfs.metrics import Metrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_snapshot_has_every_value_and_is_json() -> None:
    metrics = Metrics()
    metrics.chunks.set_function(lambda: 12)
    metrics.bytes.labels("raw").set(4096)
    metrics.lookup.labels("hit").inc(3)
    metrics.fuse_requests.labels("open", "ok").inc()
    metrics.fuse_seconds.labels("open").observe(0.25)
    metrics.verify_seconds.observe(0.5)
    values = json.loads(json.dumps(metrics.snapshot()))
    assert values["kvfs_chunks"] == 12
    assert values["kvfs_bytes"] == {"form=raw": 4096}
    assert values["kvfs_lookup_total"] == {"result=hit": 3}
    assert values["kvfs_fuse_requests_total"] == {"op=open,result=ok": 1}
    assert values["kvfs_fuse_request_seconds_sum"] == {"op=open": 0.25}
    assert values["kvfs_verify_seconds_count"] == 1
    assert not [name for name in values if name.endswith(("_bucket", "_created")) or not name.startswith("kvfs_")]


def test_two_sets_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.leased_bytes.inc(5)
    assert one.snapshot()["kvfs_leased_bytes_total"] == 5
    assert other.snapshot()["kvfs_leased_bytes_total"] == 0


@pytest.mark.timeout(20)
def test_page_is_served_and_the_port_given_back() -> None:
    metrics = Metrics()
    metrics.quarantined.labels("checksum").inc()
    address = Address("127.0.0.1", free_port())
    stop = metrics.serve(address)
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
            assert 'kvfs_quarantined_total{reason="checksum"} 1.0' in page.read().decode()
        with pytest.raises(ConfigError, match=f"{address}.*choose another port"):
            Metrics().serve(address)
    finally:
        stop()
    Metrics().serve(address)()
