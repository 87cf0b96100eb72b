"""Loads that hang, are late, find nothing or find damage; stores that do not keep up. No request waits, none fails, and
no byte goes into blocks that were given back."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvfs.client import StoreClient
from kvfs.errors import DaemonUnavailable
from kvfs.vllm_hook.copying import HostCopy
from kvfs.vllm_hook.loader import MAX_STUCK
from tests.t5_hook_text import text
from tests.toy import CANARY, Toy, engine, wait_until  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Logs

STALL = 0.3


class Hanging(HostCopy):
    """Reads hang, from the ``after``-th on, until ``go`` is set."""

    after = 1

    def __init__(self, kv: Any) -> None:
        super().__init__(kv)
        self.go = threading.Event()
        self.reads = 0

    def load(self, *args: Any) -> int:
        self.reads += 1
        if self.reads > self.after:
            assert self.go.wait(20)
        return super().load(*args)


def counted(toy: Toy) -> dict[str, float]:
    stats = toy.counts.take()
    return dict(stats.data) if stats else {}


def test_a_hanging_read_is_given_up_and_writes_nothing_afterwards(engine: Callable[..., Toy], logs: Logs) -> None:
    tokens = text(1, 500)
    engine().answer(tokens)
    logs.claim("given up .stall")
    toy = engine(copy=Hanging, stall=STALL)
    copy = toy.ranks[0].loader._copy
    run = toy.admit(tokens)
    assert run.failed
    assert STALL <= run.waited < STALL + 0.5
    assert counted(toy)["load_failures:stall"] == 1
    toy.finish(run)  # the blocks go to somebody else: they are overwritten with the canary
    copy.go.set()  # and only now the read comes back
    wait_until(lambda: not toy.ranks[0].loader._stuck)
    for cache in toy.ranks[0].caches.values():
        assert (cache.view(torch.int16) == CANARY).all()
    assert toy.answer(tokens) == 496  # the thread that hung has been replaced


def test_an_idle_step_waits_for_the_end_of_a_load_and_not_for_its_own(engine: Callable[..., Toy]) -> None:
    tokens = text(3, 500)
    engine().answer(tokens)
    toy = engine(copy=Hanging, stall=5.0, longest=20.0)
    loader, reports = toy.ranks[0].loader, []
    assert loader.take(20.0) == (set(), set())  # nothing is under way
    loading = threading.Thread(target=lambda: reports.append(toy.admit(tokens)))
    loading.start()
    wait_until(lambda: loader._copy.reads > Hanging.after)
    began = time.monotonic()
    assert loader.take(0.05) == (set(), set())
    assert 0.05 <= time.monotonic() - began < 2.0
    threading.Timer(0.05, loader._copy.go.set).start()
    loading.join(20)
    assert not reports[0].failed


def test_stuck_threads_are_bounded(engine: Callable[..., Toy], logs: Logs) -> None:
    tokens = text(2, 200)
    engine().answer(tokens)
    logs.claim("given up")
    toy = engine(copy=Hanging, stall=0.1)
    copy = toy.ranks[0].loader._copy
    copy.after = 0
    while len(toy.ranks[0].loader._stuck) < MAX_STUCK:
        assert toy.admit(tokens).failed
    run = toy.admit(tokens)
    assert run.failed
    assert run.waited < 0.05
    assert counted(toy)["load_failures:stuck"] == 1
    copy.go.set()
    wait_until(lambda: not toy.ranks[0].loader._stuck)
    assert toy.answer(tokens) == 192


def test_a_load_that_crawls_ends_at_its_deadline(engine: Callable[..., Toy], logs: Logs) -> None:
    class Crawling(HostCopy):
        def load(self, *args: Any) -> int:
            time.sleep(0.1)
            return super().load(*args)

    tokens = text(3, 900)
    engine().answer(tokens)
    logs.claim("given up .deadline")
    toy = engine(copy=Crawling, stall=STALL, longest=0.6)
    run = toy.admit(tokens)
    assert run.failed
    assert 0.6 <= run.waited < 1.0


def test_a_part_that_went_meanwhile_fails_the_load_alone(engine: Callable[..., Toy], tmp_path: Path) -> None:
    class Late(StoreClient):
        def lease(self, *args: Any, **kwargs: Any) -> Any:
            for path in (tmp_path / "store").glob("*/*/*.full.h1.safetensors"):
                path.unlink(missing_ok=True)  # a load has several threads
            return super().lease(*args, **kwargs)

    tokens = text(4, 200)
    engine().answer(tokens)
    toy = engine(client=Late)
    run = toy.admit(tokens)
    assert run.failed
    assert counted(toy)["load_failures:missing"] == 1
    toy.prefill(run)
    toy.check(run, 200)


def test_a_flipped_bit_is_found_and_the_part_put_away(engine: Callable[..., Toy], tmp_path: Path, logs: Logs) -> None:
    tokens = text(5, 200)
    engine().answer(tokens)
    path = next((tmp_path / "store").glob("*/*/*.full.h1.safetensors"))
    path.chmod(0o640)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    logs.claim("damaged .checksum")
    toy = engine()
    assert toy.admit(tokens).failed
    assert counted(toy)["load_failures:corrupt"] == 1
    wait_until(lambda: not path.exists())
    assert engine().answer(tokens) < 192
    assert engine().answer(tokens) == 192  # the engine that recomputed it has stored it again


def test_a_store_that_does_not_keep_up_drops_saves_and_delays_nobody(engine: Callable[..., Toy]) -> None:
    go = threading.Event()

    class Slow(StoreClient):
        def reserve(self, *args: Any, **kwargs: Any) -> Any:
            assert go.wait(20)
            return super().reserve(*args, **kwargs)

    toy = engine(client=Slow, staging=100_000)
    run = toy.admit(text(6, 2000))
    began = time.monotonic()
    toy.prefill(run, 500)
    assert time.monotonic() - began < 2
    toy.finish(run)
    dropped = counted(toy)["save_drops:queue"]
    assert dropped > 50
    go.set()
    toy.flush()
    assert counted(toy)["saved_parts"] > 0


def test_saves_wait_for_a_daemon_that_restarts(engine: Callable[..., Toy]) -> None:
    back = time.monotonic() + 1.5

    class Away(StoreClient):
        def reserve(self, *args: Any, **kwargs: Any) -> Any:
            if time.monotonic() < back:
                raise DaemonUnavailable("the mount", "restarting")
            return super().reserve(*args, **kwargs)

    toy = engine(client=Away)
    assert toy.answer(text(12, 300)) == 0
    assert "save_drops" not in {key.partition(":")[0] for key in counted(toy)}
    assert engine().answer(text(12, 300)) == 288


def test_a_promise_that_cannot_be_kept_fails_as_a_load_does(engine: Callable[..., Toy]) -> None:
    toy = engine()
    request = toy.request(text(7, 200))
    with pytest.raises(RuntimeError, match="not promised"):
        toy.half.allocated(request, ([1], [2], [3]), 64)
    toy.half.doom(request, 64)
    [job] = toy.half.take_step().loads
    toy.ranks[0].loader.submit(job, {})
    assert toy.ranks[0].loader.take() == ({request.request_id}, {request.request_id})
    assert toy.ranks[0].loader.take() == (set(), set())


def test_a_retired_namespace_is_made_again(engine: Callable[..., Toy]) -> None:
    tokens = text(10, 200)
    toy = engine()
    toy.answer(tokens)
    toy.client.retire(toy.namespaces.get(None).ns)
    assert toy.answer(tokens) == 0
    assert toy.answer(tokens) in {0, 192}
    assert toy.answer(tokens) == 192
