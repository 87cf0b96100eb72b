"""The n-th system call kills the process, or fails: for every n, the promises hold (P1, P3, P4, P6)."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from kvfs import chunk, errors
from kvfs.errors import ChunkCorrupt, KvfsError
from kvfs.fsck import Finding, Fsck
from kvfs.index import Index
from kvfs.names import part_path
from kvfs.store import Store
from tests.daemons import catalog_of, damage
from tests.samples import new_store, payload, put
from tests.small import NS, PART, SMALL
from tests.sweep import ERRORS, JOBS, KEYS, Done, Runner, calls
from tests.torture import SEED, report, size, torture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [*torture(), pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")]

TYPED = set(errors.__all__)
BARE = {"OSError", "PermissionError", "InterruptedError", "FileNotFoundError", "BlockingIOError", "NotADirectoryError"}
"""Errors of the filesystem that jobs may let through: the boundary of the command line tells them as they are."""
LOSES = {"evict", "retire"}
"""Jobs that take sound parts away."""
SPOILT = {"quarantine": KEYS[1], "check": KEYS[3]}
"""What is damaged before a job, which is to find it."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("sweep"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a text of four chunks, that a daemon has used and left."""
    path = tmp_path_factory.mktemp("template") / "store"
    with new_store(path, SMALL) as store:
        for i, key in enumerate(KEYS):
            put(store, key, manifest=SMALL, position=i * 256, parent=KEYS[i - 1] if i else bytes(32))
    with catalog_of(path) as catalog:
        catalog.close()
    return path


def prepare(job: str, template: Path, path: Path) -> None:
    """A store as it is before the job."""
    for folder in (path, path.with_name("other")):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, path)
    if job in SPOILT:
        damage(file_of_small(path, SPOILT[job]))
    if job == "check":
        spoil(path)


def file_of_small(path: Path, key: bytes) -> Path:
    return path / SMALL.ns_hex / part_path(key, PART)


def spoil(path: Path) -> None:
    """Something of everything that a check finds, beside a damaged part."""
    space, whole = path / SMALL.ns_hex, file_of_small(path, KEYS[0])
    whole.rename(space / "wrong-name.safetensors")
    (space / "stray").write_text("dear")
    file_of_small(path, KEYS[1]).chmod(0o644)
    (path / "second").hardlink_to(file_of_small(path, KEYS[2]))
    old = space / "tmp" / ("0" * 32)
    old.touch()
    os.utime(old, (1, 1))
    (path / ".kvfs" / f"retired-{'0' * 12}-{'0' * 16}" / "000").mkdir(parents=True)


def whole(path: Path) -> set[bytes]:
    """The keys that a reader is served, each with the right bytes; damage it refuses."""
    found = set()
    with Store.open(path) as store:
        for ns in store.namespaces():
            for each in store.scan(ns):
                try:
                    with chunk.open_part(store.open_part(ns, each.key, each.part), SMALL, each.key, each.part) as file:
                        assert bytes(file.verify()) == payload(each.key, each.part, SMALL), "wrong bytes"
                except ChunkCorrupt as e:
                    assert e.reason in {"checksum", "not-a-file"}, e
                else:
                    found.add(each.key)
    return found


def promises(job: str, path: Path, done: Done | None, lied: bool = False) -> None:
    """What holds whatever happened, before and after the check that an operator makes; ``lied``: the disk said that
    something is gone which is there."""
    if done is not None:
        strange = [error for error in done.errors if error not in TYPED and error not in BARE]
        assert not strange, strange
    acks = done.acks if done else []
    spoilt = {SPOILT[job]} if job in SPOILT else set()
    expected = set(KEYS) - spoilt - unreadable(path) if job not in LOSES else set()
    acked = {bytes.fromhex(key) for key in acks} if job in {"publish", "admit"} else set()
    if job == "register":
        register_goes_on(path.with_name("other"), acks)
    if job == "retire" and "retired" in acks:
        assert not (path / SMALL.ns_hex).exists()
    if job != "check":
        assert expected | acked <= whole(path)
    if job == "evict":
        kept, lost = whole(path), unreadable(path)
        assert lied or lost or kept == set(KEYS[: len(kept)]), "a chunk went before one that continues it"
        assert len(kept | lost) >= 2
    index_agrees(path, repaired=job != "check")
    findings = check(path)
    if job not in SPOILT:
        assert not [each for each in findings if each.is_damage], findings
    assert check(path) == [], "one check does not put everything right"
    assert expected | acked <= whole(path)
    assert spoilt.isdisjoint(whole(path))
    assert not list(path.glob("*/tmp/*"))
    assert not list((path / ".kvfs").glob("retired-*"))
    for found in path.glob(f"{SMALL.ns_hex}/???/*"):
        assert stat.S_IMODE(found.stat().st_mode) in {0o440, 0o400}


def unreadable(path: Path) -> set[bytes]:
    """Keys of parts that the disk would not give (EIO), which were put away: a miss, and no data lost."""
    with Store.open(path) as store:
        names = {each.name: each.reason for each in store.lost.entries()}
    keys = {
        m[1] for name, why in names.items() if why == "unreadable" and (m := re.search(r"([0-9a-f]{64})\.full", name))
    }
    misplaced = {KEYS[0]} if any(name.startswith("wrong-name") for name in names) else set()
    return {bytes.fromhex(key) for key in keys} | misplaced


def register_goes_on(path: Path, acks: list[str]) -> None:
    """Whatever there is of a store that was being made, making it again makes it whole."""
    if "made" in acks:
        Store.open(path).close()
    if SMALL.ns_hex in acks:
        with Store.open(path) as store:
            assert store.namespaces() == [NS]
    if path.exists():
        age(path)
    with Store.init(path) as store:
        assert store.register(SMALL) == NS
    assert not [each for each in check(path) if each.is_damage]


def index_agrees(path: Path, repaired: bool) -> None:
    """A daemon that starts now knows what is there."""
    with Store.open(path) as store:
        index = Index(store)
        index.load()
        index.reconcile()
        index.check_integrity()
        if repaired:
            assert {key for ns in index.namespaces() for key in index.page(ns, 0, 1 << 20).keys} == {
                each.key for ns in store.namespaces() for each in store.scan(ns)
            }


def age(path: Path) -> None:
    """Let the grace of temp files be over."""
    for found in [*path.rglob("*")]:
        if re.fullmatch(r"[0-9a-f]{32}|.*\.tmp", found.name):
            os.utime(found, (1, 1), follow_symlinks=False)


def check(path: Path) -> list[Finding]:
    age(path)
    with Fsck(path, data=True) as fsck:
        return list(fsck.run())


def plan(runner: Runner, job: str, template: Path, path: Path) -> list[tuple[str, int]]:
    """The calls of the job when nothing goes wrong, after which everything is as it should be."""
    prepare(job, template, path)
    done, trace = runner.run(job, path)
    assert done is not None
    assert not done.errors
    promises(job, path, done)
    return calls(trace)


def chosen(what: str, cases: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """So many of the cases as fit, spread evenly from a random one on; all of them in the long form."""
    wanted = size(what, 20, len(cases))
    stride = max(1, len(cases) // wanted)
    return cases[random.Random(SEED).randrange(stride) :: stride]


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_every_system_call(runner: Runner, template: Path, tmp_path: Path, job: str) -> None:
    path = tmp_path / "store"
    points = [("KILL", name, n) for name, n in plan(runner, job, template, path)]
    killed = 0
    for _, name, n in chosen("CALLS", points):
        prepare(job, template, path)
        done, _ = runner.run(job, path, "-e", f"inject={name}:signal=KILL:when={n}")
        killed += done is None
        try:
            promises(job, path, done)
        except (AssertionError, KvfsError, OSError) as e:
            raise AssertionError(f"{job} killed at {name} {n}: {e}") from e
    report(f"{job}: killed at {killed} of {len(points)} calls")
    assert killed >= 0.9 * len(chosen("CALLS", points)), "it hardly ever came so far"


@pytest.mark.parametrize("job", JOBS)
def test_every_system_call_fails(runner: Runner, template: Path, tmp_path: Path, job: str) -> None:
    path = tmp_path / "store"
    points = plan(runner, job, template, path)
    cases = [(error, name, n) for error, names in ERRORS.items() for name, n in points if name in names.split()]
    outcomes: Counter[str] = Counter()
    for error, name, n in chosen("ERRORS", cases):
        prepare(job, template, path)
        how = "retval=0" if error == "short" else f"error={error}"
        done, trace = runner.run(job, path, "-e", f"inject={name}:{how}:when={n}")
        assert done is not None
        outcomes.update(done.errors or ["none"])
        try:
            promises(job, path, done, lied=error == "ESTALE")
            assert not synced_again(trace)
        except (AssertionError, KvfsError, OSError) as e:
            raise AssertionError(f"{job}, {error} of {name} {n}: {e}\n" + "\n".join(trace[-30:])) from e
    report(f"{job}: {sum(outcomes.values())} failing calls, {dict(outcomes)}")


def synced_again(trace: list[str]) -> list[str]:
    """Files of which an fsync failed, and was tried again: the second would lie."""
    failed, again = set(), []
    for line in trace:
        if (m := re.search(r"\bf(?:data)?sync\(\d+<(.*)>\) += (-?\d+)", line)) is not None:
            again += [m[1]] * (m[1] in failed)
            failed |= {m[1]} if m[2] != "0" and "EINTR" not in line else set()
    return again
