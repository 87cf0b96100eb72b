"""What the control socket tells of all chunks: every one, in pages that are bounded, and nobody else waits for it."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING

import pytest

from kvfs.client import MountClient
from kvfs.daemon import control
from kvfs.errors import NamespaceNotFound, ProtocolError
from kvfs.identity import GroupKind, Manifest
from kvfs.protocol import MAX_DESCRIBED, MAX_DOCUMENT
from tests import coded
from tests.daemons import catalog_of, file_of, serving
from tests.mounted import until
from tests.samples import MANIFEST, new_key, new_store, put
from tests.t3_control import Peer, dial, frame, is_closed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvfs.daemon.catalog import Catalog

NS, PARTS = MANIFEST.ns, MANIFEST.parts
KEYS = [bytes([n] * 32) for n in range(1, 8)]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with new_store(tmp_path / "store") as store:
        for key in KEYS:
            put(store, key, PARTS[2])
    with catalog_of(tmp_path / "store") as found:
        yield found


@pytest.fixture
def client(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MountClient]:
    """Of a daemon whose pages are small."""
    monkeypatch.setattr(control, "PAGE", 3)
    with serving(catalog, tmp_path / "mnt"), MountClient(tmp_path / "mnt") as made:
        yield made


def test_every_chunk_is_named_once(client: MountClient, catalog: Catalog) -> None:
    assert sorted(client.keys(NS)) == KEYS
    catalog.remove_chunk(NS, KEYS[3])
    assert sorted(client.keys(NS)) == [*KEYS[:3], *KEYS[4:]]
    with pytest.raises(NamespaceNotFound):
        client.keys(new_key())


def test_a_listing_begins_anew_when_the_rows_are_others(
    client: MountClient, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that takes over numbers them anew: what was on a page already may come behind it, and the reverse."""
    for key in KEYS[:3]:  # their rows come to stand after those of the others
        catalog.remove_chunk(NS, key)
    catalog.index.save()
    ask, begun = client._writes.call, []

    def ask_and_restart(verb: str, timeout: float, nfds: int = 0, **fields: object) -> object:
        answer = ask(verb, timeout, nfds, **fields)
        begun.append(fields["begin"])
        if len(begun) == 23:  # behind some of the rows that hold a chunk
            assert catalog.index.load()
        return answer

    monkeypatch.setattr(client._writes, "call", ask_and_restart)
    assert sorted(client.keys(NS)) == KEYS[3:]
    assert begun.count(0) == 2


def test_what_is_told_of_a_chunk(client: MountClient, catalog: Catalog) -> None:
    put(catalog.store, KEYS[0], PARTS[0])
    catalog.reconcile()
    catalog.touch(NS, KEYS[:1])
    catalog.pin(NS, KEYS[0], True)
    used, plain, gone = client.describe(NS, [KEYS[0], KEYS[1], new_key()])
    assert gone is None
    assert used is not None
    assert plain is not None
    sizes = {str(part): file_of(catalog.store.path, KEYS[0], part).stat().st_size for part in (PARTS[0], PARTS[2])}
    assert time.time() - used.pop("last_use") < 60
    assert used == {"tokens": 256, "form": "raw", "hits": 1, "pinned": True, "parts": sizes}
    assert (plain["hits"], plain["last_use"], plain["pinned"], [*plain["parts"]]) == (0, 0, False, [str(PARTS[2])])
    with pytest.raises(NamespaceNotFound):
        client.describe(new_key(), KEYS)


def test_the_form_is_that_of_the_first_part(tmp_path: Path) -> None:
    with coded.new_store(tmp_path / "store", coded.EXACT) as store:
        coded.put_coded(store, coded.EXACT, KEYS[0], "lossless")
        coded.put_coded(store, coded.EXACT, KEYS[1], "lossless", keep_raw=True)
        sizes = {(each.key, each.part, each.coded): each.entry.stat().st_size for each in store.scan(coded.EXACT.ns)}
    mount = tmp_path / "mnt"
    with catalog_of(tmp_path / "store") as catalog, serving(catalog, mount), MountClient(mount) as client:
        told = client.describe(coded.EXACT.ns, KEYS[:2])
    assert [each["form"] for each in told if each] == ["cachegen-lossless", "raw"]
    for key, each in zip(KEYS, told, strict=False):
        assert each is not None
        assert each["tokens"] == 256
        assert sum(each["parts"].values()) == sum(size for (of, _, _), size in sizes.items() if of == key)
    assert len(sizes) == 6, "both forms of the second chunk count"


def test_a_header_that_cannot_be_read_says_nothing(client: MountClient, catalog: Catalog) -> None:
    """Of a chunk that only a listing knows; looking at it does not put it away."""
    path = file_of(catalog.store.path, KEYS[0], PARTS[2])
    path.chmod(0o600)
    path.write_bytes(bytes(8192))
    [told] = client.describe(NS, KEYS[:1])
    assert told == {"tokens": 0, "form": "raw", "hits": 0, "last_use": 0, "pinned": False, "parts": {"full.h0": 8192}}


def test_more_chunks_than_fit_are_described_in_several(client: MountClient) -> None:
    keys = [*KEYS, *(new_key() for _ in range(2 * MAX_DESCRIBED))]
    told = client.describe(NS, keys)
    assert [each is not None for each in told] == [key in KEYS for key in keys]


def test_the_most_that_one_answer_can_say_fits(tmp_path: Path) -> None:
    """Of 64 parts each, with long names; a size has twelve digits at most."""
    kinds = tuple(GroupKind(f"chunked{1_000_000 + n}", (n,), 8, 64, 64) for n in range(8))
    many = Manifest(weights="64" * 32, config={}, model_dtype="bfloat16", kv_dtype="BF16", kinds=kinds)
    new_store(tmp_path / "store", many).close()
    keys = [new_key() for _ in range(MAX_DESCRIBED)]
    with catalog_of(tmp_path / "store") as catalog:
        for key in keys:
            for part in many.parts:
                catalog.index.add(many.ns, key, part, 1)
        with serving(catalog, tmp_path / "mnt"), MountClient(tmp_path / "mnt") as client:
            told = client.describe(many.ns, keys)
    assert {len(each["parts"]) for each in told if each} == {64}
    assert len(json.dumps({"chunks": told})) + 12 * 64 * MAX_DESCRIBED < MAX_DOCUMENT


def test_requests_are_bounded(catalog: Catalog, tmp_path: Path) -> None:
    with serving(catalog, tmp_path / "mnt"):
        with Peer(tmp_path / "mnt") as peer:
            for begin in (1 << 20, (1 << 63) - 1):
                page, _ = peer.ask("keys", ns=NS, begin=begin)
                assert (page["keys"], page["next"]) == (b"", 0)
        with dial(tmp_path / "mnt") as sock:
            sock.sendall(frame({"seq": 1, "verb": "describe", "ns": NS, "keys": NS * (MAX_DESCRIBED + 1)}))
            assert is_closed(sock)
        with Peer(tmp_path / "mnt") as peer, pytest.raises(ProtocolError):
            peer.ask("keys", ns=NS, begin=-1)


def test_who_asks_for_everything_and_takes_no_answer_holds_nobody_up(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "FRAME", 0.5)
    asked = [
        frame({"seq": 1, "verb": "keys", "ns": NS, "begin": 0}),
        frame({"seq": 1, "verb": "describe", "ns": NS, "keys": b"".join(KEYS) * 18}),
    ]
    with serving(catalog, tmp_path / "mnt") as server, MountClient(tmp_path / "mnt") as victim:
        greedy = [dial(tmp_path / "mnt") for _ in range(8)]
        for n, sock in enumerate(greedy):
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # full, or the server has had enough
                while True:
                    sock.sendall(asked[n % 2])
        took = []
        for _ in range(50):
            begun = time.perf_counter()
            assert victim.lookup(NS, [KEYS[0], new_key()], timeout=5.0) == [MANIFEST.bit(PARTS[2]), 0]
            took.append(time.perf_counter() - begun)
        assert sorted(took)[45] < 0.2
        until(lambda: len(server._connections) <= 2)  # the victim's
        for sock in greedy:
            sock.close()
