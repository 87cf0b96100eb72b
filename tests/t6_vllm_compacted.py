"""Real engines on compacted stores: exact ones get the bits that were computed, lossy ones stay near them, and neither
gets what is the other's."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bench.quality import probe_texts
from kvfs.store import Store
from tests.engines import RESET, SETTLE, cached, can_mount, generate, prompt, run_engine, texts_of, transfer
from tests.hook_probe import events
from tests.t6_vllm_models import NO_WRITE, PATIENT, reached

if TYPE_CHECKING:
    from pathlib import Path

    from models.build import Models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PREFIX, CONTINUATION, TOP = 1024, 224, 512
BOUND = 1.25
"""How far next-token distributions may be from those with raw KV: so many times as far as with KIVI's int4 cache."""


# --- lossy: near what was computed ---


def divergence(p: Any, q: Any) -> np.ndarray:
    """KL(p || q) of each position, from the most likely tokens of both: those that both name, and all others as one.

    Never more than the true divergence, and close to it as the named tokens have nearly all of the mass.
    """
    out, unnamed = [], []
    for p_ids, p_log, q_ids, q_log in zip(*p, *q, strict=True):
        ours, theirs = dict(zip(p_ids, p_log, strict=True)), dict(zip(q_ids, q_log, strict=True))
        both = [t for t in ours if t in theirs]
        a, b = np.exp([ours[t] for t in both]), np.exp([theirs[t] for t in both])
        a, b = (np.append(x, max(1e-9, 1 - x.sum())) for x in (a, b))
        unnamed.append(a[-1])
        out.append(float((a * np.log(a / b)).sum()))
    assert np.mean(unnamed) < 0.1
    return np.array(out)


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_a_store_compacted_to_medium_stays_within_the_bound(name: str, models: Models, tmp_path: Path) -> None:
    model = getattr(models, name)
    texts = texts_of(model, list(probe_texts().values()))
    prompts = [texts.tokens(i, PREFIX + CONTINUATION) for i in range(len(texts.texts))]
    store, raw = str(tmp_path / "store"), str(tmp_path / "raw")

    def score(out: str) -> list[dict[str, Any]]:
        scored = {"prompts": prompts, "after": PREFIX, "top": TOP, "out": str(tmp_path / f"{out}.npz")}
        return [RESET, {"do": "distributions", **scored}]

    found = run_engine(
        tmp_path,
        "lossy",
        model,
        [
            *(generate(prompt(ids[:PREFIX], 1)) for ids in prompts),
            SETTLE,
            *score("raw"),
            {"do": "copy", "folder": store, "to": raw},
            {"do": "compact", "folder": store, "level": "medium"},
            *score("medium"),
            {"do": "recode", "folder": store, "raw": raw, "baseline": "KIVI int4"},
            *score("kivi"),
        ],
        transfer(store=store, fidelity="lossy", **PATIENT),
        apart=False,
        max_logprobs=TOP,
    )
    assert [r["cached"] for r in found if "cached" in r] == [[PREFIX] * len(prompts)] * 3
    told = {x: np.load(tmp_path / f"{x}.npz") for x in ("raw", "medium", "kivi")}

    def kl(name: str) -> list[np.ndarray]:
        pairs = [(told[x], i) for i in range(len(prompts)) for x in ("raw", name)]
        rows = [(x[f"ids{i}"].tolist(), x[f"logprobs{i}"].tolist()) for x, i in pairs]
        return [divergence(p, q) for p, q in zip(rows[::2], rows[1::2], strict=True)]

    medium, kivi = kl("medium"), kl("kivi")
    assert all(len(each) == CONTINUATION - 1 for each in medium)
    assert 0 < np.mean(medium) <= BOUND * np.mean(kivi), [[float(x.mean()) for x in way] for way in (medium, kivi)]


# --- exact: the same bits, and nothing of a lossy engine ---


@dataclass
class Told:
    """What an exact engine, then a lossy one, then a fresh exact one have answered; ``events`` are the last one's."""

    written: list[dict[str, Any]]
    lossy: list[dict[str, Any]]
    exact: list[dict[str, Any]]
    events: Path


TEXTS, LONG = 4, 600


@pytest.fixture(scope="module")
def told(models: Models, long_texts: list[str], tmp_path_factory: Any) -> Told:
    folder = tmp_path_factory.mktemp("compacted")
    store, texts = folder / "store", texts_of(models.llama, long_texts)
    documents = [texts.tokens(i, 512) for i in range(TEXTS)]
    longer = [texts.tokens(i, 512 + LONG) for i in range(TEXTS)]
    other = texts.tokens(TEXTS, LONG)
    Store.init(store).close()
    way = {"store": str(store), **PATIENT}

    def compact(level: str) -> dict[str, Any]:
        return {"do": "compact", "folder": str(store), "level": level}

    store_all = [*(generate(prompt(d, 1)) for d in documents), SETTLE]
    written = run_engine(folder, "first", models.llama, store_all, transfer(**way), apart=False)
    shutil.copytree(store, folder / "raw")
    lossy = run_engine(
        folder,
        "lossy",
        models.llama,
        [
            compact("lossless"),
            *(generate(prompt(t, 1)) for t in (*longer, other)),
            SETTLE,
            compact("medium"),
            RESET,
            *(generate(prompt(t, 1, params=NO_WRITE)) for t in (*longer, other)),
        ],
        transfer(fidelity="lossy", **way),
        apart=False,
    )
    with reached(folder, "mount" if can_mount() else "store") as place:
        exact = run_engine(
            folder,
            "second",
            models.llama,
            [generate(prompt(t, 1, params=NO_WRITE)) for t in (*longer, other)],
            transfer(probe=True, **PATIENT, **place),
            {"KVFS_PROBE_STORE": str(folder / "raw")},
            apart=False,
        )
    return Told(written, lossy, exact, folder / "second.events")


def hits(results: list[dict[str, Any]]) -> list[int]:
    return [n for result in results if "outputs" in result for n in cached(result)]


def test_a_fresh_exact_engine_gets_the_bits_that_were_computed(told: Told) -> None:
    assert hits(told.written) == [0] * TEXTS
    loads = events(told.events, "load")
    assert [(e["reason"], e["bad"], e["n"]) for e in loads] == [(None, [], 512)] * TEXTS
    counts = [e for e in events(told.events, "stats") if e.get("compacted_bytes:decoded")]
    assert counts, "nothing was decoded"


def test_a_lossy_engine_has_both(told: Told) -> None:
    whole = (512 + LONG) // 16 * 16
    assert hits(told.lossy) == [512] * TEXTS + [0] + [whole] * TEXTS + [LONG // 16 * 16]


def test_an_exact_engine_never_gets_lossy_kv_nor_what_came_after_it(told: Told) -> None:
    assert hits(told.exact) == [512] * TEXTS + [0]
