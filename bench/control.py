"""The control plane: lookups, leases and publishes, over the socket of a daemon and on the bare folder.

The daemon runs in a process of its own, as it does behind a mount; medians over many calls, one client.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import signal
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvfs import chunk
from kvfs.client import Client, connect
from kvfs.config import Config
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.control import ControlServer
from kvfs.identity import GroupKind, Manifest, PartId
from kvfs.metrics import Metrics
from kvfs.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

KEYS = 1000
PARTS = 128
VIEW = "a leased part to a tensor view"
MANIFEST = Manifest(
    weights="be" * 32,
    config={"model_type": "bench"},
    model_dtype="bfloat16",
    kv_dtype="BF16",
    kinds=(GroupKind("full", tuple(range(4)), 4, 64, 64),),
)
"""Four parts a chunk, 256 KiB each at 256 tokens."""


class Result(NamedTuple):
    """One row: medians in milliseconds, and the limit that the promises set, if any."""

    what: str
    mount: float
    store: float
    limit: float | None


def serve(path: Path, listener: socket.socket, ready: Connection) -> None:
    """Be the daemon."""
    with Store.open(path) as store:
        ControlServer(Catalog(store, Config(), Metrics()), listener).start()
        ready.send("ready")
        signal.pause()


def publish(client: Client, key: bytes) -> None:
    """Store one part of a chunk: reserve, write, publish."""
    part = MANIFEST.parts[0]
    lay = chunk.layout(MANIFEST, part, MANIFEST.chunk_tokens)
    with client.reserve(MANIFEST.ns, lay.nbytes, timeout=5.0) as reservation:
        meta = chunk.PartMeta(MANIFEST.ns, key, bytes(32), MANIFEST.chunk_tokens, 0, part)
        chunk.write_part(reservation.fd, MANIFEST, meta, bytes(lay.nbytes))
        client.publish(MANIFEST.ns, reservation, key, part)


def view(key: bytes, part: PartId, fd: int) -> None:
    """Open a leased part that is known to be whole: its header is checked, one tensor mapped."""
    with chunk.open_part(os.dup(fd), MANIFEST, key, part) as file:
        file.tensor("layers.2.v")


def median(work: Callable[[], object], rounds: int) -> float:
    """Milliseconds of one call."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def measure(client: Client, rounds: int) -> dict[str, float]:
    """Run every operation over one client."""
    keys = [secrets.token_bytes(32) for _ in range(KEYS)]
    for key in keys[:PARTS]:
        publish(client, key)
    refs = [(key, MANIFEST.parts[0]) for key in keys[:PARTS]]
    with client.lease(MANIFEST.ns, refs[:1], timeout=5.0) as lease:
        viewed = median(lambda: view(*lease.parts[0][:3]), rounds)
    return {
        f"lookup of {KEYS} keys": median(lambda: client.lookup(MANIFEST.ns, keys, timeout=5.0), rounds),
        "lookup of 1 key": median(lambda: client.lookup(MANIFEST.ns, keys[:1], timeout=5.0), rounds),
        f"lease of {PARTS} parts": median(lambda: client.lease(MANIFEST.ns, refs, timeout=5.0).release(), rounds),
        VIEW: viewed,
        "publish of a part of 256 KiB": median(lambda: publish(client, secrets.token_bytes(32)), rounds),
    }


def run(rounds: int) -> list[Result]:
    """Measure both ways on stores of their own."""
    with tempfile.TemporaryDirectory(prefix="kvfs-bench-") as base:
        mount, folder = Path(base) / "mnt", Path(base) / "store"
        with Store.init(folder) as store:
            store.register(MANIFEST)
        (mount / ".kvfs").mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        ready, theirs = context.Pipe()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(mount / ".kvfs" / "sock"))
            listener.listen()
            daemon = context.Process(target=serve, args=(folder, listener, theirs), daemon=True)
            daemon.start()
        ready.recv()
        try:
            with connect(mount=mount) as mounted, connect(store=folder) as bare:
                found = [measure(client, rounds) for client in (mounted, bare)]
        finally:
            daemon.kill()
            daemon.join()
    limits = {f"lookup of {KEYS} keys": 2.0, f"lease of {PARTS} parts": 3.0, VIEW: 0.05}
    return [Result(what, found[0][what], found[1][what], limits.get(what)) for what in found[0]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="calls of each kind (default: 200)")
    results = run(parser.parse_args().rounds)
    print(f"{'median of one call':<32}{'mount, ms':>12}{'bare, ms':>12}{'limit, ms':>12}")
    for r in results:
        print(f"{r.what:<32}{r.mount:>12.3f}{r.store:>12.3f}{'' if r.limit is None else f'{r.limit:g}':>12}")
    rate = 1000 / results[-1].mount
    print(f"publish rate over the mount: {rate:.0f} parts/s, {rate * 256 / 1024:.0f} MiB/s")


if __name__ == "__main__":
    main()
