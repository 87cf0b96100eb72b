"""Exact and lossy engines on one store, every way round: an exact engine never gets, nor keeps, a bit of lossy KV.

The KV that a lossy toy engine computes differs in its last bit from what an exact one computes, and an exact toy checks
all it loads for all bits (`Toy.check`).
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest

from kvfs.chunk import open_part
from kvfs.store import Store
from tests.compacting import compact
from tests.t5_hook_coded import GENEROUS
from tests.t5_hook_text import text
from tests.toy import engine  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.toy import Toy


def parts(folder: Path) -> dict[str, set[str]]:
    """The names of all parts, by the fidelity of their namespace."""
    found: dict[str, set[str]] = {"exact": set(), "lossy": set()}
    store = Store.open(folder)
    for ns in store.namespaces():
        found[store.manifest(ns).fidelity] |= {p.name for p in (folder / ns.hex()).glob("???/*.safetensors")}
    store.close()
    return found


def test_an_exact_engine_never_finds_what_a_lossy_one_stored(engine: Callable[..., Toy], tmp_path: Path) -> None:
    tokens = text(1, 500)
    assert engine(fidelity="lossy").answer(tokens) == 0
    assert parts(tmp_path / "store")["exact"] == set()
    assert engine().answer(tokens) == 0
    assert engine().answer(tokens) == 496
    assert engine(fidelity="lossy").answer(tokens) == 496


def test_a_lossy_engine_reads_exact_chunks_and_stores_beside_them(engine: Callable[..., Toy], tmp_path: Path) -> None:
    tokens, output, question = text(2, 500), text(3, 90), text(4, 60)
    engine().answer(tokens)
    exact = parts(tmp_path / "store")["exact"]
    lossy = engine(fidelity="lossy")
    assert lossy.answer(tokens, output) == 496
    assert parts(tmp_path / "store") == {"exact": exact, "lossy": parts(tmp_path / "store")["lossy"]}
    assert parts(tmp_path / "store")["lossy"]
    longer = tokens + output[:-1]
    # What it computed continues what it had read: the next lossy engine gets one from each namespace.
    assert engine(fidelity="lossy").answer(longer + question) == len(longer) // 16 * 16
    assert engine().answer(longer + question) == 496
    assert engine().answer(tokens) == 496


def test_exact_kv_is_preferred_where_both_are_there(engine: Callable[..., Toy]) -> None:
    tokens = text(5, 320)
    engine(fidelity="lossy").answer(tokens)
    engine().answer(tokens)
    run = (toy := engine(fidelity="lossy")).admit(tokens)
    toy.taint = 0
    toy.check(run, 319)  # every bit of it is exact


@pytest.mark.parametrize("order", list(itertools.permutations(["exact", "lossy", "compact"])), ids="-".join)
def test_compaction_changes_nothing_of_that(engine: Callable[..., Toy], tmp_path: Path, order: tuple[str, ...]) -> None:
    shared, more = text(6, 256), {"exact": text(7, 70), "lossy": text(8, 70)}
    for who in order:
        if who == "compact":
            compact(tmp_path / "store")
        else:
            engine(fidelity=who, **GENEROUS).answer(shared + more[who])
    compact(tmp_path / "store")
    before = parts(tmp_path / "store")["exact"]
    assert engine(fidelity="lossy", **GENEROUS).answer(shared + more["lossy"] + text(9, 40)) == 320
    assert parts(tmp_path / "store")["exact"] == before
    assert engine(**GENEROUS).answer(shared + more["lossy"], params={"kvfs.skip_write": True}) == 256
    assert engine(**GENEROUS).answer(shared + more["exact"] + text(9, 40)) == 320


def test_random_conversations_of_both(engine: Callable[..., Toy], tmp_path: Path) -> None:
    """What a conversation can hit is what engines that may be read have computed of it."""
    rng = random.Random(7)
    engines = {f: [engine(fidelity=f, **GENEROUS) for _ in range(2)] for f in ("exact", "lossy")}
    for conversation in range(4):
        history = text(100 + conversation, rng.randrange(20, 300))
        known = {"exact": 0, "lossy": 0}
        for turn in range(5):
            who = rng.choice(["exact", "lossy"])
            output = text(1000 * conversation + turn, rng.randrange(1, 120))
            hit = rng.choice(engines[who]).answer(history, output, batch=rng.choice([64, 150, 999]))
            assert hit == min(known[who] // 16 * 16, len(history) - 1), (conversation, turn, who)
            length = len(history) + len(output) - 1
            known["lossy"] = length
            known["exact"] = length if who == "exact" else known["exact"]
            history = history + output + text(2000 * conversation + turn, rng.randrange(1, 80))
    store = Store.open(tmp_path / "store")
    for ns in store.namespaces():
        manifest = store.manifest(ns)
        for found in store.scan(ns):
            with open_part(store.open_part(ns, found.key, found.part), manifest, found.key, found.part) as file:
                assert file.header.fidelity == manifest.fidelity
    store.close()
