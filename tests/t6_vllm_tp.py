"""What one rank stored serves two, and the other way round (random Llama, 4 KV heads)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines import RESET, SETTLE, answers, cached, generate, prompt, run_engine, texts_of, transfer
from tests.hook_probe import events

if TYPE_CHECKING:
    from pathlib import Path

    from models.build import Models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS, TOKENS = 4, 700
HIT = TOKENS // 16 * 16


@dataclass
class Told:
    """What the engines of one rank, of two, and of one again have answered."""

    one: list[dict[str, Any]]
    two: list[dict[str, Any]]
    back: list[dict[str, Any]]
    folder: Path


@pytest.fixture(scope="module")
def told(models: Models, long_texts: list[str], tmp_path_factory: Any) -> Told:
    folder = tmp_path_factory.mktemp("tp")
    texts = texts_of(models.llama, long_texts)
    ones = [prompt(texts.tokens(i, TOKENS), 8) for i in range(TEXTS)]
    twos = [prompt(texts.tokens(TEXTS + i, TOKENS), 8) for i in range(TEXTS)]
    store = str(folder / "store")
    one = run_engine(folder, "one", models.llama, [*(generate(p) for p in ones), SETTLE], transfer(store=store))
    before = set((folder / "store").glob("*/*/*.safetensors"))
    two = run_engine(
        folder,
        "two",
        models.llama,
        [*(generate(p) for p in ones), *(generate(p) for p in twos), SETTLE],
        transfer(probe=True, store=store),
        tensor_parallel_size=2,
    )
    for path in sorted(set((folder / "store").glob("*/*/*.full.h3.safetensors")) - before)[:1]:
        path.unlink()
    back = run_engine(
        folder, "back", models.llama, [*(generate(p) for p in twos), RESET], transfer(probe=True, store=store)
    )
    return Told(one, two, back, folder)


def test_two_ranks_load_what_one_stored(told: Told, record_property: Any) -> None:
    assert [n for r in told.two[:TEXTS] for n in cached(r)] == [HIT] * TEXTS
    loads = events(told.folder / "two.events", "load")
    assert sorted(e["rank"] for e in loads) == [0] * TEXTS + [2] * TEXTS
    assert [(e["reason"], e["bad"]) for e in loads] == [(None, [])] * 2 * TEXTS
    pairs = zip(told.one[:TEXTS], told.two[:TEXTS], strict=True)
    agreed = sum(answers(a)[0][0] == answers(b)[0][0] for a, b in pairs)
    record_property("top-1 agreement of TP=1 and TP=2", f"{agreed} of {TEXTS}")


def test_one_rank_loads_what_two_stored_but_not_what_is_incomplete(told: Told) -> None:
    """One of the new chunks lost the part of one head slice: its text ends before it."""
    shortest, *others = sorted(n for r in told.back[:TEXTS] for n in cached(r))
    assert others == [HIT] * (TEXTS - 1)
    assert shortest in {0, 256, 512}
    loads = events(told.folder / "back.events", "load")
    assert all((e["reason"], e["bad"]) == (None, []) for e in loads)
