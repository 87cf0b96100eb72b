"""Reach: against a brute-force oracle that marks every needed token, and the cases measured on real engines."""

from hypothesis import given
from hypothesis import strategies as st

from kvfs.identity import GroupKind, Manifest
from kvfs.reach import Blocker, Need, Tail, reach

FULL = Manifest(
    weights="",
    config={},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", (0,), 2, 64, 64),),
    chunk_tokens=256,
)
HYBRID = Manifest(
    weights="",
    config={},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("swa512", (0,), 1, 64, 64), GroupKind("full", (1,), 1, 64, 64)),
)
SWA, ALL = HYBRID.mask_of("swa512"), HYBRID.all_parts
F = HYBRID.mask_of("full")


def test_all_slices_are_demanded() -> None:
    assert reach(FULL, [3, 3, 1], [], 5000).n == 512
    got = reach(FULL, [3, 1, 3], [], 5000)
    assert got.n == 256
    assert got.blocker == Blocker(1, "full", ("full.h1",))


def test_a_prompt_stored_whole_hits_to_its_last_token_but_one() -> None:
    got = reach(HYBRID, [ALL] * 8, [], 2047, align=128)
    assert got.n == 2047
    assert [(n.index, n.kinds) for n in got.needs if "swa512" in n.kinds] == [(i, ("swa512", "full")) for i in (6, 7)]
    assert reach(HYBRID, [ALL] * 8, [], 2048, align=128).n == 2048


def test_the_first_live_block_of_a_window_is_wanted_whole() -> None:
    # n = 2000: the window begins at 1489, its block of 128 at 1408, in chunk 5.
    got = reach(HYBRID, [F] * 5 + [ALL] * 2, [Tail(2000, ALL)], 2008, align=128)
    assert (got.n, [n.index for n in got.needs if "swa512" in n.kinds]) == (2000, [5, 6, 7])
    assert got.needs[-1] == Need(7, 1792, 2000, ("swa512", "full"), True)
    assert reach(HYBRID, [F] * 6 + [ALL], [Tail(2000, ALL)], 2008, align=128).n == 0


def test_a_shared_document_falls_back_to_the_last_window_that_was_kept() -> None:
    masks = [F] * 9 + [ALL] * 3 + [F] * 11
    got = reach(HYBRID, masks, [], 4500, align=128)
    assert got.n == 3072
    assert got.blocker is not None
    assert got.blocker.kind == "swa512"


def test_tokens_computed_locally_are_not_asked_for() -> None:
    got = reach(HYBRID, [0] * 7 + [ALL], [], 2047, computed=1920, align=128)
    assert (got.n, [n.index for n in got.needs]) == (2047, [7])
    assert reach(HYBRID, [ALL] * 8, [], 2047, computed=2047).n == 0


@given(
    st.lists(st.sampled_from([0, F, SWA, ALL]), max_size=8),
    st.lists(st.tuples(st.integers(1, 140), st.sampled_from([F, ALL])), max_size=3),
    st.integers(1, 2200),
    st.integers(0, 15),
    st.sampled_from([16, 128]),
)
def test_against_brute_force(
    masks: list[int], tails: list[tuple[int, int]], limit: int, blocks: int, align: int
) -> None:
    found = [Tail(e * 16, m) for e, m in tails if e * 16 % 256]
    computed = blocks * 128
    got = reach(HYBRID, masks, found, limit, computed, align)
    by_end = {t.end: t.mask for t in found}

    def covered(end: int, token: int, bit: int) -> bool:
        i = token // 256
        if end % 256 and i == end // 256:
            return bool(by_end[end] & bit)
        return i < len(masks) and bool(masks[i] & bit)

    best = 0
    for end in [*by_end, *(256 * (i + 1) for i in range(len(masks)))]:
        n = min(end, limit)
        lo = max(0, n - 511) // align * align
        if n > computed and all(covered(end, t, F) and (t < lo or covered(end, t, SWA)) for t in range(computed, n)):
            best = max(best, n)
    assert got.n == best
