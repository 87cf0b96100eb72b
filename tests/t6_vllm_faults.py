"""A real engine whose loads fail, hang, or are aborted: every request is answered, none waits past its deadline, and a
read that comes back late writes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines import RESET, SETTLE, answers, cached, generate, prompt, run_engine, texts_of, transfer
from tests.hook_probe import HANG, events

if TYPE_CHECKING:
    from pathlib import Path

    from models.build import Models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS, TOKENS = 12, 500
HIT = TOKENS // 16 * 16
FAIL, HANGS = [4, 15, 24], [7, 20, 25]
"""Of the loads: 1 to 12 come one at a time, 13 to 24 all at once, 25 is aborted."""
ABORTED = 25
STALL = 0.5


@dataclass
class Told:
    """What the engine has answered, op by op."""

    cold: list[dict[str, Any]]
    single: list[dict[str, Any]]
    together: dict[str, Any]
    after_abort: dict[str, Any]
    emptied: dict[str, Any]
    events: Path

    def loads(self) -> dict[int, dict[str, Any]]:
        """The end of each load, by its number."""
        ends = events(self.events, "load")
        assert len({e["number"] for e in ends}) == len(ends), "a load was reported twice"
        return {e["number"]: e for e in ends}


@pytest.fixture(scope="module")
def told(models: Models, long_texts: list[str], tmp_path_factory: Any) -> Told:
    folder = tmp_path_factory.mktemp("faults")
    texts = texts_of(models.gemma, long_texts)
    prompts = [prompt(texts.tokens(i, TOKENS), 4) for i in range(PROMPTS)]
    found = run_engine(
        folder,
        "faults",
        models.gemma,
        [
            *(generate(p) for p in prompts),
            SETTLE,
            RESET,
            *(generate(p) for p in prompts),
            RESET,
            generate(*prompts),
            RESET,
            {"do": "abort", "name": "99999", "ids": prompts[0]["ids"], "seconds": 0.2},
            {"do": "sleep", "seconds": HANG + 2},
            generate(prompts[1]),
            RESET,
        ],
        transfer(probe=True, store=str(folder / "store"), gate="always"),
        env={"KVFS_PROBE_FAULTS": json.dumps({"fail": FAIL, "hang": HANGS})},
    )
    return Told(
        found[:PROMPTS],
        found[PROMPTS + 2 : 2 * PROMPTS + 2],
        found[2 * PROMPTS + 3],
        found[-2],
        found[-1],
        folder / "faults.events",
    )


def test_every_request_is_answered(told: Told) -> None:
    outputs = [o for r in (*told.cold, *told.single, told.together, told.after_abort) for o in r["outputs"]]
    assert [(len(o["ids"]), o["reason"]) for o in outputs] == [(4, "length")] * (3 * PROMPTS + 1)


def test_just_the_broken_loads_failed_and_each_was_reported_once(told: Told) -> None:
    loads = told.loads()
    assert sorted(loads) == list(range(1, ABORTED + 2))
    assert {n for n, e in loads.items() if e["reason"]} == {*FAIL, *HANGS}
    assert {loads[n]["reason"] for n in FAIL} == {"error"}
    assert {loads[n]["reason"] for n in HANGS} == {"stall"}
    assert all(e["bad"] == [] for e in loads.values())


def test_failed_requests_are_computed_and_the_others_loaded(told: Told) -> None:
    expected = [0 if n in {*FAIL, *HANGS} else HIT for n in range(1, PROMPTS + 1)]
    assert [n for r in told.single for n in cached(r)] == expected
    together = cached(told.together)
    assert sorted(together) == sorted(0 if n in {*FAIL, *HANGS} else HIT for n in range(PROMPTS + 1, 2 * PROMPTS + 1))


def test_nobody_waits_past_the_deadline(told: Told) -> None:
    for result, cold in zip(told.single, told.cold, strict=True):
        assert result["seconds"] < STALL + 2 * cold["seconds"] + 3  # of the machine; what hangs does so for ten
    assert told.together["seconds"] < HANG / 2


def test_late_reads_write_nothing(told: Told) -> None:
    woken = events(told.events, "woke")
    assert {e["number"] for e in woken} == set(HANGS)
    assert [e["late_bytes"] for e in woken] == [0] * len(woken)
    assert all(told.loads()[n]["seconds"] < STALL + 0.5 for n in HANGS)


def test_the_engine_goes_on_after_an_aborted_load(told: Told) -> None:
    assert cached(told.after_abort) == [HIT]
    assert answers(told.after_abort) == answers(told.cold[1])
    assert told.emptied["ok"], "blocks of the aborted request are still held"
