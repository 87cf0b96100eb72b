"""An engine over a mount whose daemon is killed, stopped, and goes on: every request is answered in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from kvfs.store import Store
from tests.engines import RESET, SETTLE, cached, can_mount, generate, mounted, prompt, run_engine, texts_of, transfer
from tests.hook_probe import events

if TYPE_CHECKING:
    from pathlib import Path

    from models.build import Models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not can_mount(), reason="mounting takes root and /dev/fuse"),
]

PROMPTS, TOKENS = 6, 700
HIT = TOKENS // 16 * 16


@dataclass
class Told:
    """The answers with the daemon up, killed, back, stopped, and going on."""

    cold: list[dict[str, Any]]
    up: list[dict[str, Any]]
    killed: list[dict[str, Any]]
    back: list[dict[str, Any]]
    stopped: list[dict[str, Any]]
    resumed: list[dict[str, Any]]
    events: Path


@pytest.fixture(scope="module")
def told(models: Models, long_texts: list[str], tmp_path_factory: Any) -> Told:
    folder = tmp_path_factory.mktemp("daemon")
    texts = texts_of(models.llama, long_texts)
    prompts = [generate(prompt(texts.tokens(i, TOKENS), 4)) for i in range(PROMPTS)]
    Store.init(folder / "store").close()
    with mounted(folder / "store", folder / "mnt") as keeper:
        found = run_engine(
            folder,
            "engine",
            models.llama,
            [
                *prompts,
                SETTLE,
                RESET,
                *prompts,
                RESET,
                {"do": "signal", "keeper": keeper, "signal": "SIGKILL"},
                *prompts,
                RESET,
                {"do": "sleep", "seconds": 6},
                *prompts,
                RESET,
                {"do": "signal", "keeper": keeper, "signal": "SIGSTOP", "both": True},
                *prompts,
                RESET,
                {"do": "signal", "keeper": keeper, "signal": "SIGCONT", "both": True},
                {"do": "sleep", "seconds": 6},
                *prompts,
            ],
            transfer(probe=True, mount=str(folder / "mnt"), gate="always", lookup_deadline=0.5),
        )
    rounds = [found[i : i + PROMPTS] for i in (0, 8, 16, 24, 32, 41)]
    return Told(*rounds, events=folder / "engine.events")


def hits(results: list[dict[str, Any]]) -> list[int]:
    return [n for result in results for n in cached(result)]


def test_every_request_is_answered(told: Told) -> None:
    rounds = (told.cold, told.up, told.killed, told.back, told.stopped, told.resumed)
    reasons = [o["reason"] for results in rounds for r in results for o in r["outputs"]]
    assert reasons == ["length"] * len(rounds) * PROMPTS


def test_the_daemon_serves_before_and_after(told: Told) -> None:
    assert hits(told.cold) == [0] * PROMPTS
    assert hits(told.up) == hits(told.back) == hits(told.resumed) == [HIT] * PROMPTS


def test_while_it_is_stopped_requests_miss_and_only_the_first_waits(told: Told) -> None:
    assert set(hits(told.stopped)) <= {0, HIT}
    assert hits(told.stopped)[1:] == [0] * (PROMPTS - 1)
    cold = sum(r["seconds"] for r in told.cold)
    assert sum(r["seconds"] for r in told.stopped) < 2 * cold + 1
    assert all(n in {0, HIT} for n in hits(told.killed))
    assert sum(r["seconds"] for r in told.killed) < 2 * cold + 1


def test_what_was_loaded_is_right_and_nothing_was_reported_twice(told: Told) -> None:
    loads = events(told.events, "load")
    assert len({e["number"] for e in loads}) == len(loads)
    assert all(e["bad"] == [] for e in loads)
