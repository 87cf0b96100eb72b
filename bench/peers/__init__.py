"""The connectors that are compared: how each is configured, and the server that some need beside the engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent.parent
LMCACHE_PYTHON = ROOT / ".venv-lmcache" / "bin" / "python"
LMCACHE_PORT, LMCACHE_HTTP_PORT = 47155, 47180
HOST_BYTES = 1 << 30
"""Memory of the tier that two peers put before their files."""


@contextlib.contextmanager
def no_service(_store: Path, _log: Path) -> Iterator[None]:
    """Run nothing: the connector works alone."""
    yield


@dataclass(frozen=True)
class Peer:
    """A way to keep KV caches; all but ``none`` outlive the engine."""

    name: str
    title: str
    connector: Callable[[Path], dict[str, Any] | None]
    """The ``--kv-transfer-config`` for a store folder."""
    service: Callable[[Path, Path], contextlib.AbstractContextManager[None]] = no_service
    """What runs beside the engines: called with the store folder and a log file."""
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further engine arguments."""


def kvfs_connector(**extra: str) -> dict[str, Any]:
    """Return what ``kvfs vllm-config`` prints."""
    return {
        "kv_connector": "KvfsConnector",
        "kv_connector_module_path": "kvfs.vllm_hook.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def mountpoint(store: Path) -> Path:
    """Return where ``mounted`` shows a store."""
    return store.with_name(store.name + ".mnt")


@contextlib.contextmanager
def mounted(store: Path, log: Path) -> Iterator[None]:
    """Run the daemon: ``kvfs mount`` returns when the mount answers."""
    mount = mountpoint(store)
    mount.mkdir(exist_ok=True)
    kvfs = Path(sys.executable).with_name("kvfs")
    with log.open("ab") as output:
        subprocess.run([kvfs, "init", store], check=True, stdout=output, stderr=output)
        subprocess.run([kvfs, "mount", store, mount], check=True, stdout=output, stderr=output, timeout=30)
    try:
        yield
    finally:
        subprocess.run([kvfs, "umount", mount], check=True, timeout=30)
        mount.rmdir()


def example_connector(store: Path) -> dict[str, Any]:
    """Return the configuration of vLLM's example: one file a layer and prompt."""
    extra = {"shared_storage_path": str(store)}
    return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def offloading_connector(store: Path) -> dict[str, Any]:
    """Return the configuration of vLLM's tiering offload: host memory, then files."""
    extra = {
        "spec_name": "HostCopySpec",
        "spec_module_path": "bench.peers.host_copy",
        "cpu_bytes_to_use": HOST_BYTES,
        "secondary_tiers": [{"type": "fs", "root_dir": str(store)}],
    }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def lmcache_connector(_store: Path) -> dict[str, Any]:
    """Return the configuration of LMCache's client; the store belongs to its server."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": LMCACHE_PORT},
    }


@contextlib.contextmanager
def lmcache_server(store: Path, log: Path) -> Iterator[None]:
    """Run LMCache's server with a memory of ``HOST_BYTES`` before a folder of files. Raises TimeoutError."""
    store.mkdir(exist_ok=True)
    files = {"type": "fs", "base_path": str(store)}
    command = [
        LMCACHE_PYTHON.with_name("lmcache"), "server", "--host", "127.0.0.1", "--port", str(LMCACHE_PORT),
        "--http-port", str(LMCACHE_HTTP_PORT), "--l1-size-gb", str(HOST_BYTES >> 30), "--eviction-policy", "LRU",
        "--l2-adapter", json.dumps(files), "--disable-observability",
    ]  # fmt: skip
    environment = os.environ | {"LMCACHE_TRACK_USAGE": "false"}
    with log.open("ab") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for_page(f"http://127.0.0.1:{LMCACHE_HTTP_PORT}/healthcheck", limit=60)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for_page(url: str, limit: float) -> None:
    """Wait until ``url`` answers. Raises TimeoutError after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"{url} did not answer in {limit:.0f} s")


PEERS = {
    peer.name: peer
    for peer in (
        Peer("none", "no connector", lambda _store: None),
        Peer("kvfs", "kvfs, mounted", lambda store: kvfs_connector(mount=str(mountpoint(store))), service=mounted),
        Peer("kvfs-store", "kvfs, no daemon", lambda store: kvfs_connector(store=str(store))),
        # It keeps what one step computed: a prompt of two is stored cut short, and loading that kills the engine.
        Peer(
            "example",
            "ExampleConnector (whole prompts in a step)",
            example_connector,
            arguments={"max_num_batched_tokens": 16384},
        ),
        Peer("offload-fs", "OffloadingConnector, fs tier (host-copy shim)", offloading_connector),
        Peer(
            "lmcache",
            "LMCache 0.5.6, server mode",
            lmcache_connector,
            service=lmcache_server,
            python=str(LMCACHE_PYTHON),
            environment={"LMCACHE_MP_TRANSFER_MODE": "lmcache_driven", "LMCACHE_TRACK_USAGE": "false"},
        ),
    )
}
