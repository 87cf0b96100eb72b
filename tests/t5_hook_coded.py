"""Compacted parts through the hook: the same bits as raw ones, layer by layer, by whichever way is faster."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvfs.vllm_hook.copying import HostCopy
from kvfs.vllm_hook.ways import Ways
from tests.compacting import compact
from tests.t5_hook_text import text
from tests.toy import CANARY, HYBRID, PLAIN, Toy, engine, wait_until  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfs.vllm_hook.geometry import Geometry
    from tests.conftest import Logs

GENEROUS = {"stall": 5.0, "longest": 20.0}
"""Deadlines for tests of what is right, on machines that may be busy."""


def counted(toy: Toy) -> dict[str, float]:
    stats = toy.counts.take()
    return dict(stats.data) if stats else {}


@pytest.mark.parametrize("geometry", [HYBRID, PLAIN], ids=["hybrid", "plain"])
@pytest.mark.parametrize(("writer", "reader"), [(1, 1), (2, 4), (4, 1)])
def test_compacted_chunks_give_the_same_bits(
    engine: Callable[..., Toy], tmp_path: Path, geometry: Geometry, writer: int, reader: int
) -> None:
    texts = [text(seed, n) for seed, n in enumerate([64, 65, 200, 511, 640])]
    first = engine(geometry=geometry, ranks=writer)
    for tokens in texts:
        assert first.answer(tokens) == 0
    assert compact(tmp_path / "store") > 0
    second = engine(geometry=geometry, ranks=reader, **GENEROUS)
    for tokens in texts:
        assert second.answer(tokens) == min(len(tokens) - 1, len(tokens) // 16 * 16)
    found = counted(second)
    assert found["compacted_bytes:decoded"] > 0
    assert "load_failures" not in {key.partition(":")[0] for key in found}


def test_only_tokens_between_the_local_hit_and_n_are_written(engine: Callable[..., Toy], tmp_path: Path) -> None:
    tokens = text(10, 500)
    engine().answer(tokens)
    compact(tmp_path / "store")
    toy = engine(**GENEROUS)
    run = toy.admit(tokens, local=480)
    assert run.hit == 496
    toy.check(run, 496)
    toy.finish(run)
    run = toy.admit(tokens[:490])
    assert run.hit == 448
    toy._allocate(run, 480, 0)
    assert toy.untouched(run, 448, 480)


def test_what_is_slower_decoded_here_is_hydrated(engine: Callable[..., Toy], tmp_path: Path) -> None:
    tokens = text(11, 400)
    engine().answer(tokens)
    compact(tmp_path / "store")
    toy = engine(**GENEROUS)
    toy.ranks[0].loader._ways.speeds.update({True: 1.0, False: 1e15})
    assert toy.answer(tokens) == 399
    found = counted(toy)
    assert found["compacted_bytes:hydrated"] > 0
    assert "compacted_bytes:decoded" not in found


def test_the_faster_way_is_taken_and_the_other_tried_again() -> None:
    ways = Ways()
    assert all(ways.decodes() for _ in range(Ways.TRY - 1))
    ways.took(True, 1000, 1.0)
    assert not ways.decodes()  # tried once
    ways.took(False, 3000, 1.0)
    taken = [ways.decodes() for _ in range(Ways.TRY)]
    assert taken.count(False) == Ways.TRY - 1
    for _ in range(20):
        ways.took(False, 100, 1.0)  # it has become slow
    assert ways.decodes()


def test_a_damaged_stream_fails_the_load_and_is_put_away(
    engine: Callable[..., Toy], tmp_path: Path, logs: Logs
) -> None:
    tokens = text(5, 200)
    engine().answer(tokens)
    compact(tmp_path / "store")
    path = next((tmp_path / "store").glob("*/*/*.full.h1.cachegen.safetensors"))
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.chmod(0o640)
    path.write_bytes(data)
    logs.claim("damaged .checksum")
    toy = engine(**GENEROUS)
    run = toy.admit(tokens)
    assert run.failed
    assert counted(toy)["load_failures:corrupt"] == 1
    toy.prefill(run)
    toy.check(run, 200)
    wait_until(lambda: not path.exists())


class Hanging(HostCopy):
    """Decodes a few parts, then hangs until ``go`` is set."""

    def __init__(self, kv: Any) -> None:
        super().__init__(kv)
        self.go, self.reads = threading.Event(), 0

    def decode(self, *args: Any) -> None:
        self.reads += 1
        if self.reads > 1:
            assert self.go.wait(20)
        super().decode(*args)


def test_a_decode_that_hangs_is_given_up_and_writes_nothing_afterwards(
    engine: Callable[..., Toy], tmp_path: Path, logs: Logs
) -> None:
    tokens = text(1, 500)
    engine().answer(tokens)
    compact(tmp_path / "store")
    logs.claim("given up .stall")
    toy = engine(copy=Hanging, stall=1.5)
    run = toy.admit(tokens)
    assert run.failed
    toy.finish(run)  # the blocks go to somebody else: they are overwritten with the canary
    toy.ranks[0].loader._copy.go.set()
    wait_until(lambda: not toy.ranks[0].loader._stuck)
    for cache in toy.ranks[0].caches.values():
        assert (cache.view(torch.int16) == CANARY).all()
    assert toy.answer(tokens) == 496
