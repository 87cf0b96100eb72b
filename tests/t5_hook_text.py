"""Whole texts through the hook, on a toy engine: what hits how far, with the right bits, and nothing beside them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from vllm.v1.request import RequestStatus

from tests.toy import BLOCK, CHUNK, HYBRID, PLAIN, WINDOW, Toy, engine, wait_until  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfs.vllm_hook.geometry import Geometry


def text(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]


@pytest.mark.parametrize("geometry", [HYBRID, PLAIN], ids=["hybrid", "plain"])
@pytest.mark.parametrize("batch", [10_000, 150, 64])
def test_the_same_prompt_hits_as_far_as_it_can(engine: Callable[..., Toy], geometry: Geometry, batch: int) -> None:
    first, second = engine(geometry=geometry), engine(geometry=geometry)
    for seed, n in enumerate([15, 16, 63, 64, 65, 129, 200, 255, 256, 257, 300, 511, 640]):
        tokens = text(seed, n)
        assert first.answer(tokens, batch=batch) == 0
        expected = min(n - 1, n // 16 * 16)
        assert second.answer(tokens) == expected, n


def test_conversation_goes_on_from_the_last_multiple_of_16(engine: Callable[..., Toy]) -> None:
    a, b = engine(), engine()
    tokens = text(1, 333)
    output = text(2, 70)
    assert a.answer(tokens, output) == 0
    shared = tokens + output[:-1]  # the KV of the last token was never computed
    for seed, toy in enumerate((b, engine())):
        assert toy.answer(shared + text(seed, 40), text(4, 9)) == len(shared) // 16 * 16


@pytest.mark.parametrize("question", [3, 60, 100])
def test_other_question_hits_the_last_full_chunk_of_the_document(engine: Callable[..., Toy], question: int) -> None:
    document = text(5, 520)
    a, b = engine(), engine()
    a.answer(document + text(6, question))
    assert b.answer(document + text(7, 30)) == 520 // CHUNK * CHUNK


def test_windows_at_intervals_serve_a_shorter_document(engine: Callable[..., Toy]) -> None:
    document = text(8, 1500)
    engine(interval=256).answer(document)
    b = engine()
    assert b.answer(document[:1000] + text(9, 20)) == 768  # the last multiple of 256 whose window was kept


def test_only_tokens_between_the_local_hit_and_n_are_written(engine: Callable[..., Toy]) -> None:
    tokens = text(10, 500)
    engine().answer(tokens)
    b = engine()
    local = 30 * BLOCK
    run = b.admit(tokens, local=local)
    assert run.hit == 496
    b.check(run, 496)  # below the local hit what "its own prefill" wrote, above it what came from the store
    b.finish(run)
    run = b.admit(tokens[:490])
    assert run.hit == 448
    b._allocate(run, 480, 0)
    assert b.untouched(run, 448, 480)


def test_a_window_that_begins_inside_a_block_fills_it_from_its_first_token(engine: Callable[..., Toy]) -> None:
    """A later local hit that ends one block earlier reads tokens from before this request's window."""
    tokens = text(12, 601)
    engine().answer(tokens)
    b = engine()
    run = b.admit(tokens)
    assert (run.hit - WINDOW + 1) % BLOCK
    b.check(run, run.hit)  # compares whole blocks


def test_several_ranks_share_with_one(engine: Callable[..., Toy]) -> None:
    for seed, (writer, reader) in enumerate([(1, 2), (2, 1), (4, 2), (2, 4)]):
        tokens = text(20 + seed, 300)
        assert engine(ranks=writer).answer(tokens) == 0
        assert engine(ranks=reader).answer(tokens) == 288


def test_a_part_missing_on_one_rank_is_a_miss_on_all(engine: Callable[..., Toy], tmp_path: Path) -> None:
    tokens = text(30, 200)
    toy = engine(ranks=2)
    toy.answer(tokens)
    for path in (tmp_path / "store").glob("*/*/*.full.h3.safetensors"):
        path.unlink()
    assert engine(ranks=2).answer(tokens) == 0
    assert engine(ranks=1).answer(tokens, params={"kvfs.skip_write": True}) == 200 - 200 % 16


def test_requests_may_refuse_to_read_or_to_write(engine: Callable[..., Toy]) -> None:
    tokens = text(31, 200)
    a = engine()
    a.answer(tokens, params={"kvfs.skip_write": True})
    assert a.answer(tokens) == 0
    assert a.answer(tokens, params={"kvfs.skip_read": True}) == 0
    assert a.answer(tokens) == 192


def test_salts_and_models_do_not_share(engine: Callable[..., Toy]) -> None:
    tokens = text(32, 200)
    assert engine().answer(tokens) == 0
    assert engine().answer(tokens, cache_salt="mine") == 0
    assert engine().answer(tokens, cache_salt="mine") == 192
    assert engine(weights=1).answer(tokens) == 0
    assert engine().answer(tokens) == 192


def test_reset_moves_to_a_private_namespace(engine: Callable[..., Toy]) -> None:
    tokens = text(33, 200)
    a = engine()
    a.answer(tokens)
    running = a.admit(text(34, 100))
    a.half.reset()
    a.prefill(running)
    a.finish(running)
    wait_until(lambda: a.namespaces.get(None) is not None)
    assert a.answer(tokens) == 0
    assert a.answer(tokens) == 192
    assert engine().answer(tokens) == 192
    assert engine().answer(text(34, 100)) == 0


def test_an_aborted_request_stores_no_tail(engine: Callable[..., Toy]) -> None:
    tokens, output = text(35, 300), text(36, 40)
    a = engine()
    run = a.admit(tokens)
    a.prefill(run, 100)
    a.decode(run, output)
    a.finish(run, RequestStatus.FINISHED_ABORTED)
    a.flush()
    assert engine().answer(tokens + output) == 320  # the chunk that ended while decoding; no tail at 336


def test_random_conversations(engine: Callable[..., Toy]) -> None:
    rng = random.Random(99)
    engines = [engine() for _ in range(3)]
    for conversation in range(6):
        history = text(100 + conversation, rng.randrange(20, 300))
        known = 0
        for turn in range(4):
            toy = rng.choice(engines)
            output = text(1000 * conversation + turn, rng.randrange(1, 120))
            hit = toy.answer(history, output, batch=rng.choice([64, 150, 999]))
            assert hit == min(known // 16 * 16, len(history) - 1)
            known = len(history) + len(output) - 1
            history = history + output + text(2000 * conversation + turn, rng.randrange(1, 80))
