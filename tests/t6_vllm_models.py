"""Real models in real engines: what one engine stored, a fresh one loads, and answers as if it had computed it.

For each model one engine stores (over a mount). Others, fresh ones, load from the folder and over the mount, compare
their blocks with the files, and answer the same prompts from their own prefix cache too: at the same number of cached
tokens the greedy answers have to be the same.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from kvfs.store import Store
from tests.engines import (
    RESET,
    SETTLE,
    answers,
    cached,
    can_mount,
    generate,
    mounted,
    prompt,
    run_engine,
    texts_of,
    transfer,
)
from tests.hook_probe import events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from models.build import Models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = 20
CHUNK = 256
PATIENT = {"lookup_deadline": 2.0, "stall_deadline": 5.0, "load_deadline": 10.0, "gate": "always"}
"""These tests are of what is right, on machines that may be busy; t6_vllm_faults is of what is in time."""
NO_WRITE = {"kvfs.skip_write": True}
ONLY_LOCAL = {"kvfs.skip_read": True, **NO_WRITE}
LONG, TALK, ANSWER = 2009, 700, 45


@dataclass
class Told:
    """What a second engine has answered, and how many tokens of each prompt are in stored chunks."""

    chunks: list[int]
    cold: list[dict[str, Any]]
    loaded: list[dict[str, Any]]
    local: list[dict[str, Any]]
    again: dict[str, Any]
    turn: dict[str, Any]
    salted: dict[str, Any]
    events: Path


@dataclass
class Stored:
    """What the first engine has left behind, and the prompts of both."""

    folder: Path
    model: Path
    documents: list[list[int]]
    asked: list[int]
    other: list[int]
    whole: list[int]
    turn: list[int]
    cold: list[dict[str, Any]]
    local: list[dict[str, Any]] | None = None
    """The answers from an engine's own cache, once one has given them."""


@contextmanager
def reached(folder: Path, mode: str) -> Iterator[dict[str, str]]:
    """How an engine reaches the store of ``folder``: as a folder, or over a mount."""
    if mode == "store":
        yield {"store": str(folder / "store")}
    else:
        with mounted(folder / "store", folder / "mnt"):
            yield {"mount": str(folder / "mnt")}
        (folder / "mnt").rmdir()


@pytest.fixture(scope="module")
def writers(models: Models, long_texts: list[str], tmp_path_factory: Any) -> Callable[[str], Stored]:
    """What the first engine of each model has stored, computed once."""

    @functools.cache
    def stored(name: str) -> Stored:
        return write(tmp_path_factory.mktemp(name), getattr(models, name), long_texts)

    return stored


def write(folder: Path, model: Path, long_texts: list[str]) -> Stored:
    texts = texts_of(model, long_texts)
    documents = [texts.tokens(i, CHUNK * (2 if i % 4 == 3 else 1)) for i in range(PROMPTS)]
    asked, other = texts.more("\n\nWhat is it about?"), texts.more("Summarize it, please, in one sentence:")
    whole, talk = texts.tokens(21, LONG), texts.tokens(22, TALK)
    Store.init(folder / "store").close()
    with reached(folder, "mount" if can_mount() else "store") as way:
        # One at a time: what is computed beside others in one batch differs in its last bits.
        first = run_engine(
            folder,
            "first",
            model,
            [
                *(generate(prompt(d + asked, 1)) for d in documents),
                generate(prompt(whole, 1)),
                generate(prompt(talk, ANSWER)),
                SETTLE,
            ],
            transfer(**way),
        )
    turn = [*talk, *answers(first[-2])[0], *texts.more("\nAnd then?")]
    return Stored(folder, model, documents, asked, other, whole, turn, first[:PROMPTS])


RUNS = [f"{model}-{mode}" for model in ("llama", "smollm2", "gemma") for mode in ("store", "mount")]


@pytest.fixture(scope="module", params=RUNS)
def told(request: pytest.FixtureRequest, writers: Callable[[str], Stored]) -> Told:
    model, mode = request.param.split("-")
    if mode == "mount" and not can_mount():
        pytest.skip("mounting takes root and /dev/fuse")
    stored = writers(model)
    folder, documents, name = stored.folder, stored.documents, f"second-{mode}"
    quiet = {"params": NO_WRITE}  # the next engine has to find the same
    own_cache = (
        []
        if stored.local
        else [
            *(generate(prompt(d + stored.asked, 1, params=ONLY_LOCAL)) for d in documents),
            *(generate(prompt(d + stored.other, 8, params=ONLY_LOCAL)) for d in documents),
        ]
    )
    with reached(folder, mode) as way:
        second = run_engine(
            folder,
            name,
            stored.model,
            [
                *(generate(prompt(d + stored.other, 8, **quiet)) for d in documents),
                RESET,
                *own_cache,
                RESET,
                generate(prompt(stored.whole, 4, **quiet)),
                RESET,
                generate(prompt(stored.turn, 4, **quiet)),
                RESET,
                generate(prompt(stored.whole, 4, salt="mine", **quiet)),
            ],
            transfer(probe=True, **PATIENT, **way),
            apart=False,
        )
    stored.local = stored.local or second[2 * PROMPTS + 1 : 3 * PROMPTS + 1]
    return Told(
        [len(d) for d in documents],
        cold=stored.cold,
        loaded=second[:PROMPTS],
        local=stored.local,
        again=second[-5],
        turn=second[-3],
        salted=second[-1],
        events=folder / f"{name}.events",
    )


def hits(results: list[dict[str, Any]]) -> list[int]:
    return [n for result in results for n in cached(result)]


def test_nothing_was_there_before(told: Told) -> None:
    assert hits(told.cold) == [0] * PROMPTS


def test_other_questions_hit_to_the_last_full_chunk_of_their_document(told: Told) -> None:
    assert hits(told.loaded) == told.chunks


def test_every_load_put_the_stored_bits_into_the_blocks(told: Told) -> None:
    loads = events(told.events, "load")
    assert len(loads) == PROMPTS + 2
    assert [(e["reason"], e["bad"]) for e in loads] == [(None, [])] * len(loads)
    assert all(e["bytes"] > 0 for e in loads)


def test_answers_equal_those_of_the_engines_own_cache_at_the_same_hit(told: Told) -> None:
    assert hits(told.local) == told.chunks
    assert [answers(r) for r in told.loaded] == [answers(r) for r in told.local]


def test_the_same_prompt_hits_to_its_tail(told: Told) -> None:
    assert cached(told.again) == [LONG // 16 * 16]


def test_a_conversation_goes_on_from_its_last_multiple_of_16(told: Told) -> None:
    known = TALK + ANSWER - 1  # the last token was never fed back
    assert cached(told.turn) == [known // 16 * 16]


def test_a_salt_shares_with_nobody(told: Told) -> None:
    assert cached(told.salted) == [0]


def test_counts_arrive(told: Told) -> None:
    total: dict[str, float] = {}
    for event in events(told.events, "stats"):
        for key, value in event.items():
            if isinstance(value, (int, float)):
                total[key] = total.get(key, 0) + value
    assert total["hit_tokens"] >= sum(told.chunks)
    assert total["loads"] >= PROMPTS + 2
    assert "errors" not in {key.partition(":")[0] for key in total}
