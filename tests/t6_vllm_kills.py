"""Two engines over one mount whose worker is killed again and again: every request is answered, with the right KV."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvfs.store import Store
from tests.engines import SETTLE, cached, can_mount, generate, mounted, prompt, run_engine, texts_of, transfer
from tests.hook_probe import events
from tests.mounted import processes, until
from tests.torture import LONG, SEED, report, size

if TYPE_CHECKING:
    from pathlib import Path

    from models.build import Models

pytestmark = [
    pytest.mark.torture,
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not LONG, reason="minutes: make torture"),
    pytest.mark.skipif(not can_mount(), reason="mounting takes root and /dev/fuse"),
]

KILLS = size("ENGINE_KILLS", 100, 100)
PROMPTS, TOKENS = 4, 700
ENGINES = ("one", "two")
QUIET = (0.0, 1.0)
"""Seconds between two kills, at least and at most, beside what the next worker takes to start."""


def test_killed_under_two_engines(models: Models, long_texts: list[str], tmp_path: Path) -> None:
    texts = texts_of(models.llama, long_texts)
    prompts = [prompt(texts.tokens(i, TOKENS), 4) for i in range(PROMPTS)]
    stop = tmp_path / "stop"
    ops = [*(generate(each) for each in prompts), SETTLE, {"do": "repeat", "prompts": prompts, "until": str(stop)}]
    connector = transfer(probe=True, mount=str(tmp_path / "mnt"), gate="always", lookup_deadline=0.5)
    told: dict[str, list[dict[str, Any]]] = {}
    Store.init(tmp_path / "store").close()
    with mounted(tmp_path / "store", tmp_path / "mnt"):

        def run(name: str) -> None:
            told[name] = run_engine(tmp_path, name, models.llama, ops, connector)

        threads = [threading.Thread(target=run, args=(name,)) for name in ENGINES]
        for thread in threads:
            thread.start()
        try:
            until(lambda: all(repeating(tmp_path, name) for name in ENGINES) or not all_alive(threads), limit=300)
            kills = kill(tmp_path / "store", threads)
        finally:
            stop.touch()
            for thread in threads:
                thread.join()
    assert told.keys() == set(ENGINES), "an engine failed; its log says why"
    repeated = [told[name][-1] for name in ENGINES]
    loads = [event for name in ENGINES for event in events(tmp_path / f"{name}.events", "load")]
    report(f"{kills} kills under two engines: {repeated}, {len(loads)} loads")
    assert kills == KILLS
    for each in repeated:
        assert each["reasons"] == {"length": each["requests"]}
        assert each["requests"] >= KILLS
    assert any(each["hits"] for each in repeated)  # either may miss while the daemon is away
    assert all(event["bad"] == [] for event in loads)
    assert hits_before(told)


def repeating(folder: Path, name: str) -> bool:
    """Whether an engine has come to its last operation: every one before it has told its result."""
    out = folder / f"{name}.out"
    return out.exists() and out.read_text().count("\n") >= 2 + PROMPTS + 1


def all_alive(threads: list[threading.Thread]) -> bool:
    return all(thread.is_alive() for thread in threads)


def kill(store: Path, threads: list[threading.Thread]) -> int:
    """Kill one worker after the other while both engines run."""
    r, kills = random.Random(SEED), 0
    while kills < KILLS and all_alive(threads):
        worker = processes(store)["worker"]
        os.kill(worker, signal.SIGKILL)
        kills += 1
        until(lambda worker=worker: processes(store).get("worker", worker) != worker)
        time.sleep(1.0 + r.uniform(*QUIET))
    return kills


def hits_before(told: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether the engines' first, cold, round was answered."""
    return all(len(cached(result)) == 1 for results in told.values() for result in results[:PROMPTS])
