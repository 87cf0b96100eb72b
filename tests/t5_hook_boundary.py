"""Nothing gets out of the connector: no exception, no load that is never reported."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvfs.errors import ConfigError
from kvfs.vllm_hook.connector import KvfsConnector
from kvfs.vllm_hook.jobs import Load, StepJobs
from kvfs.vllm_hook.plugin import register
from kvfs.vllm_hook.threads import step_aside
from kvfs.vllm_hook.worker import Greeting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Logs


def config(store: Path, **transfer: Any) -> Any:
    parallel = SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1)
    values = {
        "kv_connector": "KvfsConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": str(store)},
    }
    return SimpleNamespace(parallel_config=parallel, kv_transfer_config=KVTransferConfig(**values | transfer))


@pytest.fixture(params=[KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER], ids=["scheduler", "worker"])
def connector(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KvfsConnector]:
    made = KvfsConnector(config(tmp_path / "store"), request.param, SimpleNamespace(kv_cache_groups=[]))
    yield made
    made.shutdown()


GARBAGE = SimpleNamespace()
CALLS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("on_new_request", (GARBAGE,), None),
    ("get_num_new_matched_tokens", (GARBAGE, 0), (0, False)),
    ("update_state_after_alloc", (GARBAGE, GARBAGE, 0), None),
    ("request_finished_all_groups", (GARBAGE, ()), (False, None)),
    ("request_finished", (GARBAGE, []), (False, None)),
    ("update_connector_output", (GARBAGE,), None),
    ("build_connector_meta", (SimpleNamespace(num_scheduled_tokens={"x": 1}),), StepJobs()),
    ("set_xfer_handshake_metadata", ({0: GARBAGE},), None),
    ("register_kv_caches", ({"layer": torch.zeros(1)},), None),
    ("handle_preemptions", (GARBAGE,), None),
    ("wait_for_save", (), None),
]


@pytest.mark.parametrize(("method", "arguments", "answer"), CALLS, ids=[c[0] for c in CALLS])
def test_whatever_it_is_given_a_hook_method_answers(
    connector: KvfsConnector,
    method: str,
    arguments: tuple[Any, ...],
    answer: Any,
    caplog: pytest.LogCaptureFixture,
    logs: Logs,
) -> None:
    for _ in range(3):
        assert getattr(connector, method)(*arguments) == answer
    errors = [r for r in caplog.records if r.name.startswith("kvfs") and r.levelname == "ERROR"]
    assert len(errors) <= 1, "the same failure is told once"
    if errors:
        logs.claim("failed; the engine goes on", 40)
        stats = connector.get_kv_connector_stats()
        assert stats is not None
        assert sum(v for k, v in stats.data.items() if k.startswith("errors:")) == 3


def test_a_load_with_no_worker_to_do_it_is_reported_once_as_failed(tmp_path: Path) -> None:
    connector = KvfsConnector(config(tmp_path / "s"), KVConnectorRole.WORKER, SimpleNamespace(kv_cache_groups=[]))
    load = Load("r1", 64, {}, (), (), 0, 0.0)
    connector.bind_connector_metadata(StepJobs(loads=[load]))
    results = connector.get_transfer_results(set())
    assert results.finished_recving == results.failed_recving == {"r1"}
    again = connector.get_transfer_results(set())
    assert not again.finished_recving
    assert not again.failed_recving
    connector.shutdown()


def test_an_engine_that_cannot_be_served_is_told_once_and_runs_on(tmp_path: Path, logs: Logs) -> None:
    connector = KvfsConnector(config(tmp_path / "s"), KVConnectorRole.SCHEDULER, SimpleNamespace(kv_cache_groups=[]))
    logs.claim("kvfs is off for this engine: not supported: MambaSpec")
    connector.set_xfer_handshake_metadata({0: Greeting(None, "MambaSpec (layer 3)"), 1: Greeting(None, "the same")})
    assert connector.get_num_new_matched_tokens(GARBAGE, 0) == (0, False)
    assert connector.build_connector_meta(GARBAGE) == StepJobs()
    assert connector.request_finished_all_groups(GARBAGE, ()) == (False, None)
    connector.shutdown()


def test_settings_that_cannot_be_meant_stop_the_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recompute"):
        KvfsConnector(config(tmp_path, kv_load_failure_policy="fail"), KVConnectorRole.WORKER, None)
    with pytest.raises(ConfigError, match="nearest name is store"):
        KvfsConnector(config(tmp_path, kv_connector_extra_config={"stor": "x"}), KVConnectorRole.WORKER, None)


def test_the_plugin_gives_the_short_name() -> None:
    register()
    register()
    assert KVConnectorFactory.get_connector_class_by_name("KvfsConnector") is KvfsConnector


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_transfer_threads_are_not_bound_to_the_core_that_computes() -> None:
    """vLLM binds the thread that starts them to one core."""
    before, found = os.sched_getaffinity(0), []

    def transfer() -> None:
        found.append(os.sched_getaffinity(0))
        step_aside()
        found.append(os.sched_getaffinity(0))

    def engine() -> None:
        os.sched_setaffinity(0, {min(before)})
        each = threading.Thread(target=transfer)
        each.start()
        each.join()

    outer = threading.Thread(target=engine)
    outer.start()
    outer.join()
    assert found == [{min(before)}, before]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_transfer_threads_that_share_work_share_no_core() -> None:
    every, found = os.sched_getaffinity(0), []

    def transfer(which: int) -> None:
        step_aside(which, 2)
        found.append(os.sched_getaffinity(0))

    for which in (0, 1):
        each = threading.Thread(target=transfer, args=(which,))
        each.start()
        each.join()
    assert found[0] | found[1] == every
    assert not found[0] & found[1]
