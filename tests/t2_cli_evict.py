"""``kvfs evict``, ``pin``, ``unpin`` and ``sim``."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvfs.chunk import PartMeta
from kvfs.cli import replay, sim, workloads
from kvfs.cli.main import kvfs_command
from kvfs.daemon.trace import Trace
from kvfs.errors import ConfigError, StoreBusy
from kvfs.store import Store
from kvfs.upkeep.policy import POLICIES
from tests.daemons import catalog_of
from tests.samples import MANIFEST, new_key, new_store, put

NS = MANIFEST.ns


def run(*words: object) -> Result:
    return CliRunner().invoke(kvfs_command, [str(word) for word in words])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with new_store(tmp_path / "s") as store:
        for first in range(3):
            parent = bytes(32)
            for position in range(3):
                key = bytes([first, position]) * 16
                put(store, key, position=position * 256, parent=parent)
                parent = key
    return tmp_path / "s"


def left(place: Path) -> int:
    with Store.open(place) as store:
        return len({found.key for found in store.scan(NS)})


def test_evict_from_a_store_that_nobody_serves(place: Path) -> None:
    assert json.loads(run("evict", "1B", "--at", place, "--json").stdout)["chunks"] == 1
    assert left(place) == 8
    assert run("evict", "1GiB", "sample", "--at", place).stdout.startswith("removed 8 chunks")
    assert left(place) == 0


def test_pins_hold_and_are_shown(place: Path) -> None:
    key = (b"\1\2" * 16).hex()
    told = json.loads(run("pin", key[:8], "--at", place, "--json").stdout)
    assert told == {"ns": NS.hex(), "key": key, "pinned": True}
    assert run("evict", "1GiB", "--at", place).exit_code == 0
    assert left(place) == 3
    assert json.loads(run("show", key[:8], "--at", place, "--json").stdout)["pinned"] is True
    assert "pinned" in run("show", key[:8], "--at", place).stdout
    assert run("unpin", key[:8], "--at", place).exit_code == 0
    run("evict", "1GiB", "--at", place)
    assert left(place) == 0


def test_a_served_store_is_not_evicted_from_behind_its_daemon(place: Path) -> None:
    with Store.open(place) as store:
        store.lock_daemon("another")
        assert run("evict", "1B", "--at", place).exit_code == StoreBusy.exit_code
    assert left(place) == 9


@pytest.mark.parametrize("words", [("evict", "10"), ("evict", "0B"), ("sim", "--budget", "x"), ("sim", "--trace", "/")])
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], place: Path) -> None:
    result = run(*words, *(["--at", place] if words[0] == "evict" else []))
    assert result.exit_code == (ConfigError.exit_code if words != ("sim", "--trace", "/") else 1)


# --- sim ---


def test_sim_prints_every_policy_and_budget(tmp_path: Path) -> None:
    words = ["sim", "--requests", 60, "--budget", "10%", "--budget", "5GiB"]
    report = json.loads(run(*words, "--json").stdout)
    assert set(report) == set(workloads.GENERATED) == set(sim.WORKLOADS)
    for rows in report.values():
        assert [row["budget"] for row in rows] == ["10%", "5GiB", "100%"]
        for row in rows:
            assert set(row["policies"]) == set(POLICIES)
        unlimited = rows[-1]["policies"]
        assert all(score["evicted"] == 0 for score in unlimited.values())
        assert len({score["hits"] for score in unlimited.values()}) == 1
        assert rows[0]["policies"]["lru"]["hits"] <= unlimited["lru"]["hits"]
    text = run(*words).stdout
    assert "prefill saved in the mean: gdsf" in text


def test_a_workload_is_the_same_for_the_same_seed() -> None:
    for name in workloads.GENERATED:
        assert workloads.generate(name, 30, 5) == workloads.generate(name, 30, 5)
        assert workloads.generate(name, 30, 5) != workloads.generate(name, 30, 6)


def test_the_hit_rate_of_a_known_workload() -> None:
    a, b = b"a", b"b"
    events: list[workloads.Event] = [
        workloads.Look(0, (a, b)),
        workloads.Stored(0, a, None, 0, 256, 10, "full.h0"),
        workloads.Stored(0, a, None, 0, 256, 10, "full.h1"),
        workloads.Stored(0, b, a, 256, 256, 20),
        workloads.Look(5, (a, b)),
        workloads.Look(9, (b"never stored",)),
    ]
    known = replay.chunks_of(events)
    assert known[a].size == 20
    for budget, hits in ((40, 0.5), (20, 0.25), (10, 0.0)):
        assert replay.replay(events, POLICIES["lru"], budget, known).hits == hits


def test_what_a_daemon_recorded_is_replayed(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    text = [new_key() for _ in range(4)]
    with catalog_of(place, trace=file) as catalog:
        for _ in range(2):
            catalog.lookup(NS, text)
        with Store.init(tmp_path / "other") as other:
            other.register(MANIFEST)
            for n, key in enumerate(text):
                put(other, key, position=n * 256, parent=text[n - 1] if n else bytes(32))
                for part in MANIFEST.parts:
                    temp = catalog.reserve(NS, 100_000, key)
                    fd = other.open_part(NS, key, part)
                    os.sendfile(temp.fd, fd, 0, os.fstat(fd).st_size)
                    os.close(fd)
                    os.close(temp.fd)
                    catalog.publish_file(NS, temp.name, key, part)
        catalog.lookup(NS, text[:3])
        catalog.close()
    looks = [event for event in workloads.read_trace(file) if isinstance(event, workloads.Look)]
    assert [len(look.keys) for look in looks] == [4, 3], "the repeated lookup is recorded once"
    report = json.loads(run("sim", "--trace", file, "--budget", "100%", "--json").stdout)
    scores = report[str(file)][0]["policies"]
    assert all(score["hits"] == pytest.approx(3 / 7) for score in scores.values())
    file.write_text(file.read_text() + '{"t": 1, "lo')  # cut short by a crash
    assert len(workloads.read_trace(file)) == 2 + 16


def test_a_trace_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.daemon.trace.MAX_BYTES", 1000)
    trace = Trace(tmp_path / "t")
    for _ in range(100):
        key = new_key()
        trace.looked(NS, [key])
        trace.stored(PartMeta(NS, key, bytes(32), 256, 0, MANIFEST.parts[0]), 10)
    trace.close()
    assert (tmp_path / "t").stat().st_size < 1300
    with pytest.raises(ConfigError, match="Is a directory"):
        Trace(tmp_path)
    (tmp_path / "x").write_text("{}\n")
    with pytest.raises(ConfigError, match="not a trace"):
        workloads.read_trace(tmp_path / "x")
