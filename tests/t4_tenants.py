"""P8: a tenant can neither read, list, probe, poison, evict nor exhaust another's chunks. On a real mount, with root in
a container that binds one subtree, and with users of the host."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from kvfs import tenants
from kvfs.cli.main import kvfs_command
from kvfs.client import MountClient
from tests import daemons, samples
from tests.mounted import mounted, needs_mount, place, processes, until
from tests.tenancy import MIB, UIDS, Actor, new_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_mount

NS = samples.MANIFEST.ns
PART = samples.MANIFEST.parts[0]
WHOLE = samples.MANIFEST.all_parts
CHUNK = 4 * 60_000
"""Roughly the bytes of one."""


def key(n: int) -> bytes:
    return bytes([n]) * 32


def served(point: Path, name: str) -> bool:
    return (point / "tenants" / name / ".kvfs" / "sock").exists()


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """What belongs to the host, and no container sees."""
    (tmp_path / "host" / "mnt").mkdir(parents=True)
    for folder in itertools.takewhile(lambda folder: folder != Path("/tmp"), (tmp_path, *tmp_path.parents)):
        folder.chmod(0o711)  # users of the host have to get there
    return tmp_path / "host"


@pytest.fixture
def store(host: Path) -> Path:
    return new_store(host / "kv", {"a": 100 * MIB, "b": 100 * MIB, "public": 50 * MIB})


@pytest.fixture
def point(store: Path, host: Path) -> Iterator[Path]:
    with mounted(store, host / "mnt", allow_other=True) as point:
        until(lambda: all(served(point, name) for name in tenants.names(store)))
        yield point


@pytest.fixture
def act(host: Path, tmp_path: Path) -> Iterator[Callable[..., Actor]]:
    """Makes actors: root in a container of a tenant, or a user of the host who uses a tenant's subtree."""
    actors: list[Actor] = []

    def make(name: str, role: str = "container") -> Actor:
        inside = tmp_path / f"inside-{len(actors)}"
        inside.mkdir()
        actors.append(Actor(host, host / "mnt" / "tenants" / name, role, inside if role == "container" else None))
        return actors[-1]

    yield make
    for actor in actors:
        actor.close()


def register(*actors: Actor) -> None:
    for actor in actors:
        until(lambda actor=actor: actor("client.register(samples.MANIFEST)") == repr(NS))


def test_containers_use_their_own_and_see_nothing_of_others(point: Path, act: Callable[..., Actor]) -> None:
    a, b = act("a"), act("b")
    register(a, b)
    assert a("put(1)") == "[True, True, True, True]"
    assert a("look(1)") == f"[{WHOLE}]"
    assert a("lease(1)") == "True"
    assert a("path(1).read_bytes()[4096:] == samples.payload(key(1), PARTS[0])") == "True"
    # list
    tree = (
        "sorted(os.listdir(inside)), os.listdir(inside / samples.MANIFEST.ns_hex), host.exists() and os.listdir(host)"
    )
    assert b(tree) == repr(([".kvfs", NS.hex(), "by-model"], ["manifest.json"], []))
    assert b("(inside / 'tenants').exists(), (inside / '..' / 'a').exists()") == "(False, False)"
    # read
    assert b("path(1).read_bytes()").startswith("FileNotFoundError")
    assert b("lease(1)").startswith("ChunkNotFound")
    # probe
    assert b("look(1)") == "[0]"
    assert b("client.explain(NS, [key(1)], samples.MANIFEST)['verdict']") == b(
        "client.explain(NS, [key(9)], samples.MANIFEST)['verdict']"
    )
    assert "'chunks': 0" in b("{k: client.stats()[k] for k in ('chunks', 'bytes', 'tenant')}")
    # evict, remove, put away
    assert b("client.remove(NS, key(1))") == "False"
    assert b("client.evict(None, 1 << 40)") == "(0, 0)"
    report = "client.report(NS, key({}), PARTS[0], 'checksum')"
    assert b(report.format(1)) == b(report.format(9)) == "True"  # nothing damaged is there, as nothing is there
    assert b("path(1).unlink()").startswith("FileNotFoundError")
    assert b("client.retire(NS)") == "0"
    assert b("client.reload()").startswith("Unsupported")
    assert a("look(1), lease(1)") == f"([{WHOLE}], True)"
    # poison: other bytes under the same key stay where they were stored
    register(b)
    wrong = (
        "r = client.reserve(NS, 200_000); chunk.write_part(r.fd, samples.MANIFEST, daemons.meta(key(1), PARTS[0]), "
        "samples.payload(key(2), PARTS[0])); created = client.publish(NS, r, key(1), PARTS[0])"
    )
    assert (b(wrong), b("created"), b("lease(1)")) == ("None", "True", "False")
    assert a("lease(1)") == "True"


def test_users_of_the_host_are_kept_apart_by_the_kernel(point: Path, act: Callable[..., Actor]) -> None:
    a, b = (act(name, str(UIDS[name])) for name in "ab")
    register(a, b)
    assert a("put(1)[0], look(1), lease(1), path(1).stat().st_uid") == f"(True, [{WHOLE}], True, {UIDS['a']})"
    for expression in (
        "os.listdir(inside.parent)",
        "os.listdir(inside.parent / 'a')",
        "(inside.parent / 'a' / '.kvfs' / 'stats.json').read_bytes()",
        "daemons.file_of(inside.parent / 'a', key(1), PARTS[0]).read_bytes()",
        "socket.socket(socket.AF_UNIX).connect(str(inside.parent / 'a' / '.kvfs' / 'sock'))",
        "os.listdir(inside.parent / 'public')",
        "socket.socket(socket.AF_UNIX).connect(str(inside.parents[1] / '.kvfs' / 'sock'))",
        "os.mkdir(inside.parent / 'c')",
    ):
        assert b(expression).startswith(("PermissionError", "OSError: [Errno 30]")), expression
    assert "'a'" not in b("(inside.parents[1] / '.kvfs' / 'stats.json').read_text()")
    modes = {path: stat.S_IMODE((point / path).stat().st_mode) for path in ("tenants", "tenants/a", "tenants/public")}
    assert modes == {"tenants": 0o711, "tenants/a": 0o750, "tenants/public": 0o700}
    assert stat.S_IMODE((point / "tenants/a/.kvfs/sock").stat().st_mode) == 0o660
    assert stat.S_IMODE((point / "tenants/public/.kvfs/sock").stat().st_mode) == 0o600


def test_the_socket_decides_who_the_peer_is(point: Path, store: Path, act: Callable[..., Actor]) -> None:
    secrets = {name: tenants.read_secret(store, name) for name in tenants.names(store)}
    assert len(set(secrets.values())) == 3
    for name in "ab":
        for role in ("container", str(UIDS[name])):
            actor = act(name, role)
            until(lambda actor=actor: not actor("client.salts()").startswith("DaemonUnavailable"))
            assert actor("client.salts()") == f"Salts(own={secrets[name]!r}, public={secrets['public']!r})"
            assert actor("client.stats()['tenant'], 'tenants' in client.stats()") == f"('{name}', False)"
    with MountClient(point) as client, MountClient(point / "tenants" / "public") as public:
        assert client.salts() == (b"", b"")
        assert public.salts() == (secrets["public"], b"")
        assert [row["name"] for row in client.stats()["tenants"]] == ["a", "b", "public"]


def test_no_view_shows_a_secret(point: Path, store: Path) -> None:
    secrets = [tenants.read_secret(store, name) for name in tenants.names(store)]
    for name in tenants.names(store):
        path = store / "tenants" / tenants.secret_name(name)
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_size) == (0o600, 32)
    seen = 0
    for folder, _, files in os.walk(point):
        for name in files:
            path = Path(folder, name)
            if stat.S_ISREG(path.lstat().st_mode):
                seen += 1
                assert "secret" not in name
                assert not any(s in path.read_bytes() or s.hex().encode() in path.read_bytes() for s in secrets)
    assert seen >= 4 * 2  # stats and settings of each


def test_all_read_what_is_public_and_only_its_own_socket_writes_it(
    point: Path, store: Path, act: Callable[..., Actor]
) -> None:
    a, b = act("a"), act("b", str(UIDS["b"]))
    register(a, b)
    with MountClient(point / "tenants" / "public") as public:
        public.register(samples.MANIFEST)
        daemons.put(public, key(5))
        for actor in (a, b):
            assert actor("look(5, 6)") == f"[{WHOLE}, 0]"
            assert actor("lease(5)") == "True"
            assert actor("put(6)[0], lease(6), look(5, 6)") == f"(True, True, [{WHOLE}, {WHOLE}])"
            both = "client.lease(NS, [(key(n), PARTS[1]) for n in (6, 5, 6)], timeout=5)"
            check = "[daemons.read(p.fd, p.key, PARTS[1]) == samples.payload(p.key, PARTS[1]) for p in held.parts]"
            assert actor(f"held = {both}") == "None"
            assert actor(f"{check}, held.release()") == "([True, True, True], None)"
            assert actor("client.remove(NS, key(5)), path(5).exists()") == "(False, False)"
            assert actor("[client.report(NS, key(5), PARTS[0], why) for why in (None, 'checksum')]") == "[False, False]"
        assert public.lookup(NS, [key(5), key(6)], timeout=5) == [WHOLE, 0]
        # one who reads cannot keep the operator from taking it away, and reads on
        assert a("held = client.lease(NS, [(key(5), PARTS[0])], timeout=5)") == "None"
        assert public.remove(NS, key(5))
    assert a("daemons.read(held.parts[0].fd, key(5), PARTS[0]) == samples.payload(key(5), PARTS[0])") == "True"
    assert a("look(5), held.release()") == "([0], None)"
    damaged = tenants.place(store, "public")
    with MountClient(point / "tenants" / "public") as public:
        daemons.put(public, key(7))
        daemons.damage(daemons.file_of(damaged, key(7), PART))
        assert b("client.report(NS, key(7), PARTS[0])") == "False"  # not taken on trust
        with public.lease(NS, [(key(7), PART)], timeout=5) as lease:
            assert not lease.parts[0].verified
        daemons.damage(daemons.file_of(damaged, key(7), PART))  # and is whole again
        assert public.remove(NS, key(7))


def test_tenants_through_libfuse(store: Path, host: Path, act: Callable[..., Actor]) -> None:
    with mounted(store, host / "mnt", transport="libfuse", allow_other=True) as point:
        until(lambda: all(served(point, name) for name in tenants.names(store)))
        a, b = act("a"), act("b", str(UIDS["b"]))
        register(a, b)
        assert a("put(1)[0], look(1), lease(1)") == f"(True, [{WHOLE}], True)"
        assert a("path(1).read_bytes()[4096:] == samples.payload(key(1), PARTS[0])") == "True"
        assert b("look(1), path(1).exists()") == "([0], False)"
        assert b("os.listdir(inside.parent)").startswith("PermissionError")


def test_one_at_its_limit_evicts_its_own(host: Path, act: Callable[..., Actor]) -> None:
    store = new_store(host / "small", {"a": 2 * MIB, "b": 2 * MIB})
    with mounted(store, host / "mnt", allow_other=True, write_budget=None) as point:
        until(lambda: all(served(point, name) for name in "ab"))
        a, b = act("a"), act("b")
        register(a, b)
        assert b("put(1)[0]") == "True"
        for n in range(2, 40):
            until(lambda n=n: not a(f"put({n})[0]").startswith("StoreFull"))
        with MountClient(point) as client:
            rows = {row["name"]: row for row in client.stats()["tenants"]}
            assert rows["a"]["bytes"] <= 2 * MIB == rows["a"]["limit"]
            assert rows["b"]["chunks"] == 1
            assert client.stats()["eviction"]["budgets"][-1]["limit"] > 2 * MIB
        stats = "{k: v for k, v in client.stats()['eviction']['evicted'].items() if v}"
        assert "budget" in a(stats)
        assert b(stats) == "{}"
        assert b("lease(1)") == "True"
        blocks = os.statvfs(point / "tenants" / "b")
        assert blocks.f_blocks * blocks.f_frsize == 2 * MIB


def test_one_cannot_exhaust_what_others_need(point: Path, act: Callable[..., Actor]) -> None:
    a, b = act("a"), act("b")
    register(a, b)
    assert a("put(1)[0]") == b("put(1)[0]") == "True"
    # connections
    assert a("socks = [connect() for _ in range(400)]") == "None"
    assert b("lease(1), connect().close()") == "(True, None)"
    assert a("[s.close() for s in socks] and None") == "None"
    # descriptors in flight: asked for and never taken
    flood = (
        "ch = Channel(connect()); n = 0; lease = {'verb': 'lease', 'ns': NS, 'keys': join_keys([key(1)] * 250), "
        "'names': ['full.h0'], 'which': bytes(250)}; "
        "[ch.send({'seq': i, 'lease': i, **lease}, Deadline('x', 2)) for i in range(100)]; time.sleep(0.5)"
    )
    a(flood)
    assert a("[len(ch.receive(Deadline('x', 2), 250)[1]) for _ in range(3)]").startswith(
        ("ConnectionResetError", "ProtocolError")
    )
    assert b("lease(1), put(2)[0]") == "(True, True)"
    # files being written, and space that is never written to
    until(lambda: a("look(1)") == f"[{WHOLE}]")
    full = "[client.reserve(NS, 1 << 20) for _ in range(200)]"
    assert a(full).startswith("StoreFull")
    assert a("[client.reserve(NS, 0) for _ in range(2000)]").startswith("StoreFull")
    assert b("put(3)[0]") == "True"
    # namespaces
    many = (
        "import dataclasses; "
        "[client.register(dataclasses.replace(samples.MANIFEST, weights=f'{i:064x}')) for i in range(300)]"
    )
    assert a(many).startswith("StoreFull")
    assert b("client.register(dataclasses.replace(samples.MANIFEST, weights='cd' * 32)) != NS").startswith("NameError")
    assert b("put(4)[0], lease(4)") == "(True, True)"


def test_a_copy_into_the_mount_is_the_tenants_own_and_bounded(point: Path, act: Callable[..., Actor]) -> None:
    a, b = act("a", str(UIDS["a"])), act("b")
    register(a, b)
    assert a("put(1)[0]") == "True"
    assert a("data = path(1).read_bytes(); path(1).unlink(); look(1)") == "None"
    assert a("path(1).write_bytes(data), look(1)") == f"({a('len(data)')}, [1])"
    assert b("look(1)") == "[0]"
    endless = "f = open(path(2), 'wb', buffering=0); [f.write(bytes(1 << 16)) for _ in range(64)]"
    assert a(endless).startswith("OSError: [Errno 27]")
    assert a("f.close()").startswith(("None", "OSError"))


def test_killed_and_restarted_the_daemon_serves_the_same_tenants(
    store: Path, host: Path, act: Callable[..., Actor]
) -> None:
    with mounted(store, host / "mnt", logs="worker of", allow_other=True) as point:
        until(lambda: all(served(point, name) for name in tenants.names(store)))
        a, b = act("a"), act("b", str(UIDS["b"]))
        register(a, b)
        assert a("put(1)[0]") == b("put(2)[0]") == "True"
        assert a("held, file = client.lease(NS, [(key(1), PARTS[0])], timeout=5), open(path(1), 'rb')") == "None"
        salts = a("client.salts()"), b("client.salts()")
        worker = processes(store)["worker"]
        os.kill(worker, signal.SIGKILL)
        assert a("len(os.pread(file.fileno(), 1 << 20, 0)) > 4096, path(1).stat().st_uid") == f"(True, {UIDS['a']})"
        until(lambda: processes(store).get("worker") not in {None, worker})
        for actor, n, before in ((a, 1, salts[0]), (b, 2, salts[1])):
            until(lambda actor=actor, n=n: actor(f"look({n})") == f"[{WHOLE}]")
            assert actor("client.salts()") == before
            assert actor(f"lease({n}), len(path({n}).read_bytes()) > 4096, look({3 - n})") == "(True, True, [0])"
        assert a("daemons.read(held.parts[0].fd, key(1), PARTS[0]) == samples.payload(key(1), PARTS[0])") == "True"
        with MountClient(point / "tenants" / "a") as client:
            until(lambda: client.stats()["leases"] == 1)  # claimed again
        assert a("held.release(), file.close()") == "(None, None)"
    with mounted(store, host / "mnt", logs="worker of", allow_other=True) as point:  # the log is the same
        until(lambda: all(served(point, name) for name in tenants.names(store)))
        again = act("a")
        until(lambda: again("look(1)") == f"[{WHOLE}]")
        assert again("client.salts()") == salts[0]


def kvfs(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(kvfs_command, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_and_a_live_daemon(point: Path, store: Path, act: Callable[..., Actor]) -> None:
    code, said, complaint = kvfs("tenant", "add", "c", "--uid", "41003", "--budget", "10MiB", "--at", point)
    assert (code, complaint) == (0, "")
    assert f"{point}/tenants/c" in said
    c = act("c")
    register(c)
    assert c("put(1)[0]") == "True"
    assert kvfs("tenant", "set", "c", "--budget", "20MiB", "--mode", "0700", "--at", store)[0] == 0
    with MountClient(point) as client:
        rows = {row["name"]: row for row in client.stats()["tenants"]}
        assert (rows["c"]["limit"], rows["c"]["mode"], rows["c"]["chunks"]) == (20 * MIB, "0700", 1)
    code, said, _ = kvfs("tenant", "list", "--at", point)
    assert [line.split()[0] for line in said.splitlines()] == ["TENANT", "a", "b", "c", "public"]
    code, said, _ = kvfs("status", "--at", point)
    assert "tenant c" in said
    assert re.search(r"^tenant +c$", kvfs("status", "--at", point / "tenants" / "c")[1], re.MULTILINE)
    assert kvfs("ls", "--at", point / "tenants" / "c")[0] == 0
    assert c("file = open(path(1), 'rb')") == "None"
    assert kvfs("tenant", "rm", "c", "-y", "--at", point)[:2] == (0, "removed c\n")
    assert not (store / "tenants" / "c").exists()
    assert not (point / "tenants" / "c").exists()
    assert c("look(1)").startswith("DaemonUnavailable")
    assert c("path(1).exists(), len(file.read()) > 4096") == "(False, True)"
    assert kvfs("tenant", "add", "c", "--uid", "41004", "--budget", "10MiB", "--at", point)[0] == 0
    again = act("c")
    register(again)
    assert again("look(1), inside.stat().st_uid") == "([0], 41004)"
    with contextlib.suppress(FileNotFoundError):
        assert not list((store / ".kvfs").glob("retired-*"))
    assert place(point / "tenants" / "c", key(1), PART).exists() is False
