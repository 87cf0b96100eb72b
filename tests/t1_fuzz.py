"""Anything at all is fed to what reads bytes of others; `make fuzz` does it longer, guided by coverage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS
from tests.torture import size, torture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = torture(slow=False)

EXAMPLES = size("EXAMPLES", 1500, 200_000)
change = st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "add", "copy"]), st.binary(min_size=1, max_size=12))


def changed(seed: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """A seed after some accidents."""
    data = bytearray(seed)
    for where, how, what in changes:
        at = int(where * len(data))
        if how == "set":
            data[at : at + len(what)] = what
        elif how == "cut":
            del data[at : at + what[0]]
        elif how == "add":
            data[at:at] = what
        else:
            data[at:at] = data[at // 2 : at]
    return bytes(data[:60_000])


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[bytes], None], tuple[bytes, ...]]]:
    found = TARGETS[request.param]
    work = found.make()
    yield work, found.seeds
    if hasattr(work, "close"):
        work.close()


def test_anything(target: tuple[Callable[[bytes], None], tuple[bytes, ...]]) -> None:
    work, seeds = target
    for seed in seeds:
        work(seed)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.one_of(st.binary(max_size=300), st.builds(changed, st.sampled_from(seeds), st.lists(change, max_size=6))))
    def anything(data: bytes) -> None:
        work(data)

    anything()
