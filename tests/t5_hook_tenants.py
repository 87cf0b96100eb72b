"""Engines of tenants: equal texts that do not meet, and public beginnings that all of them read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvfs import tenants
from kvfs.client import MountClient, StoreClient
from kvfs.config import Config
from kvfs.daemon.service import Service
from kvfs.identity import Salts
from tests.daemons import listen
from tests.t5_hook_text import text
from tests.tenancy import MIB, new_store
from tests.toy import CHUNK, HYBRID, PLAIN, Toy, engine  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvfs.vllm_hook.geometry import Geometry


@pytest.fixture
def hire(tmp_path: Path, engine: Callable[..., Toy]) -> Iterator[Callable[..., Toy]]:
    """Makes an engine of a tenant."""
    store = new_store(tmp_path / "kv", {"a": 100 * MIB, "b": 100 * MIB, "public": 100 * MIB})
    service = Service(Config(store=store, scrub_rate=0), resumed=False)
    for name in service.tenants.names():
        service.tenants.listen(name, listen(tmp_path / name))

    def make(tenant: str, **kwargs: Any) -> Toy:
        return engine(client=lambda _: MountClient(tmp_path / tenant), **kwargs)

    yield make
    service.close()


def test_equal_texts_of_two_tenants_do_not_meet(hire: Callable[..., Toy]) -> None:
    tokens = text(1, 200)
    assert hire("a").answer(tokens) == 0
    assert hire("b").answer(tokens) == 0
    assert hire("a").answer(tokens) == 192
    assert hire("b").answer(tokens, cache_salt="mine") == 0


@pytest.mark.parametrize("geometry", [HYBRID, PLAIN], ids=["hybrid", "plain"])
def test_a_public_beginning_goes_on_in_private(hire: Callable[..., Toy], geometry: Geometry) -> None:
    prompt = text(2, 4 * CHUNK)
    alone = hire("a", geometry=geometry)
    assert alone.answer(prompt + text(3, 30)) == 0
    operator = hire("public", geometry=geometry, interval=CHUNK)
    operator.answer(prompt)
    b = hire("b", geometry=geometry, interval=CHUNK)
    assert b.namespaces.salts.public == operator.namespaces.salts.own != b.namespaces.salts.own
    longer = prompt + text(4, 2 * CHUNK + 40)
    assert b.answer(longer) == len(prompt)
    again = hire("b", geometry=geometry)
    assert again.answer(longer) == len(longer) // 16 * 16  # begun in public, gone on in its own
    assert again.answer(longer, cache_salt="mine") == len(prompt)  # what is public stays so
    stored = {name: client_of(toy).stats()["chunks"] for name, toy in (("public", operator), ("b", b))}
    assert stored["public"] == 4
    assert 0 < stored["b"] <= 2 * 4  # of each text, and no copy of what is public
    stranger = hire("a", geometry=geometry)
    assert stranger.answer(longer) == len(prompt)


def client_of(toy: Toy) -> MountClient:
    assert isinstance(toy.client, MountClient)
    return toy.client


def test_a_tenants_folder_is_no_store_for_an_engine(tmp_path: Path, hire: Callable[..., Toy]) -> None:
    with StoreClient(tenants.place(tmp_path / "kv", "a")) as client, pytest.raises(tenants.Unsupported):
        client.salts()
    with StoreClient(tmp_path / "kv") as client:
        assert client.salts() == Salts()
