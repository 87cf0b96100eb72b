"""Why a text hits or misses, from what is known of a store."""

from dataclasses import replace

from kvfs.explain import Known, explain
from kvfs.identity import GroupKind
from tests.samples import MANIFEST, new_key

NS = MANIFEST.ns
WHOLE = MANIFEST.all_parts
KNOWN = {NS: Known(MANIFEST, {"name": "sample"}, 7)}
KEYS = [new_key() for _ in range(4)]


def test_all_there_is_a_hit() -> None:
    told = explain(NS, KEYS, [WHOLE] * 4, KNOWN)
    assert (told["verdict"], told["reach"], told["complete"], told["blocker"]) == ("hit", 1024, 4, None)
    assert (told["name"], told["chunks"], told["asked"], told["near"]) == ("sample", 7, 4, [])


def test_an_absent_chunk_is_named() -> None:
    told = explain(NS, KEYS, [WHOLE, WHOLE, 0, WHOLE], KNOWN)
    assert (told["verdict"], told["reach"], told["complete"]) == ("partial", 512, 2)
    assert told["blocker"]["index"] == 2
    assert told["blocker"]["key"] == KEYS[2].hex()
    assert told["blocker"]["absent"] is True


def test_nothing_there_is_a_miss() -> None:
    told = explain(NS, KEYS, [0] * 4, KNOWN)
    assert (told["verdict"], told["reach"], told["blocker"]["index"]) == ("miss", 0, 0)


def test_windows_that_are_gone_do_not_matter_where_nobody_looks() -> None:
    """Only the last 512 tokens of the sliding kind are needed: two chunks."""
    full = MANIFEST.mask_of("full")
    told = explain(NS, KEYS, [full, full, WHOLE, WHOLE], KNOWN)
    assert (told["verdict"], told["complete"]) == ("hit", 0)
    told = explain(NS, KEYS, [WHOLE, full, WHOLE, WHOLE], KNOWN)
    assert told["verdict"] == "hit"
    told = explain(NS, KEYS, [WHOLE, WHOLE, WHOLE, full], KNOWN)
    assert (told["reach"], told["blocker"]["kind"], told["blocker"]["missing"]) == (
        768,
        "swa512",
        ["swa512.h0", "swa512.h1"],
    )


def test_an_unknown_namespace_is_compared_with_the_others_nearest_first() -> None:
    asker = replace(MANIFEST, config={"model_type": "sample", "rope_theta": 1e4}, kv_dtype="F16")
    far = replace(
        asker, weights="00" * 32, model_dtype="float16", kinds=(GroupKind("full", (0,), 1, 32, 32),), adapter="11" * 32
    )
    known = {far.ns: Known(far, {}, 1), **KNOWN}
    told = explain(asker.ns, KEYS, [], known, asker)
    assert (told["verdict"], told["reach"], told["blocker"]) == ("unknown-namespace", 0, None)
    assert [n["ns"] for n in told["near"]] == [NS.hex(), far.ns_hex]
    assert told["near"][0]["differs"] == [["config.rope_theta", 1e4, None], ["kv_dtype", "F16", "BF16"]]


def test_an_unknown_namespace_without_a_manifest_can_only_be_said_to_be_unknown() -> None:
    told = explain(new_key(), KEYS, [], KNOWN)
    assert (told["verdict"], told["near"]) == ("unknown-namespace", [])


def test_the_answer_stays_small() -> None:
    asker = replace(MANIFEST, config={f"field{i}": i for i in range(100)})
    known = {m.ns: Known(m, {}, 0) for m in (replace(MANIFEST, weights=f"{i:064x}") for i in range(20))}
    told = explain(asker.ns, KEYS, [], known, asker)
    assert len(told["near"]) == 5
    assert all(n["differences"] == 102 and len(n["differs"]) == 20 for n in told["near"])


def test_no_keys_are_no_miss() -> None:
    assert explain(NS, [], [], KNOWN)["verdict"] == "hit"
