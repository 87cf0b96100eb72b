"""The names in a mount are a closed grammar."""

from __future__ import annotations

import pytest

from kvfs.daemon import tree
from kvfs.daemon.tree import What
from kvfs.identity import PartId

NS, KEY = bytes(range(32)), bytes(range(100, 132))
PART = f"{KEY.hex()}.full.h0.safetensors"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/", What.ROOT),
        ("/.kvfs", What.META),
        ("/.kvfs/sock", What.SOCKET),
        ("/.kvfs/stats.json", What.STATS),
        ("/.kvfs/config.toml", What.CONFIG),
        ("/by-model", What.MODELS),
        ("/by-model/anything", What.MODEL),
        (f"/{NS.hex()}", What.NAMESPACE),
        (f"/{NS.hex()}/manifest.json", What.MANIFEST),
        (f"/{NS.hex()}/{KEY.hex()[:3]}", What.LEAF),
        (f"/{NS.hex()}/{KEY.hex()[:3]}/{PART}", What.PART),
    ],
)
def test_places(path: str, what: What) -> None:
    place = tree.find(path)
    assert place is not None
    assert place.what is what
    assert place.name == path.rpartition("/")[2]


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/.kvfs/x",
        "/.kvfs/sock/x",
        "/by-model/a/b",
        f"/{NS.hex()[1:]}",
        f"/{NS.hex()}/tmp",
        f"/{NS.hex()}/xyz",
        f"/{NS.hex()}/ABC",
        f"/{NS.hex()}/000/{PART}",
        f"/{NS.hex()}/{KEY.hex()[:3]}/{PART}/x",
        f"/{NS.hex()}/{KEY.hex()[:3]}/.{PART}.AbC123",
        f"/{NS.hex()}/{KEY.hex()[:3]}/..",
        "/lost+found",
        "/kvfs-store.json",
        f"/{NS.hex()}/{PART}",
        f"/{NS.hex().upper()}",
        f"/{NS.hex()}/manifest.json/x",
    ],
)
def test_all_else_has_no_place(path: str) -> None:
    assert tree.find(path) is None


def test_path_of_is_the_inverse() -> None:
    path = tree.path_of(NS, KEY, PartId("swa512", 3))
    place = tree.find(path)
    assert place is not None
    assert (place.ns, place.key, place.part) == (NS, KEY, PartId("swa512", 3))


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"name": "google/gemma-3-270m", "revision": "0123456789abcdef"}, "google--gemma-3-270m@01234567-00010203"),
        ({"name": "my model", "revision": None}, "my_model-00010203"),
        ({}, "unnamed-00010203"),
        ({"name": "../../etc", "revision": "a/b"}, "..--..--etc@a--b-00010203"),
        ({"name": "n" * 500}, "n" * 100 + "-00010203"),
    ],
)
def test_model_names_need_no_quoting(info: dict[str, object], name: str) -> None:
    assert tree.model_name(NS, info) == name
