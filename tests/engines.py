"""Starts real engines for the t6 tests, one at a time, each through a list of operations (see `tests.engine`)."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from kvfs.store import Store
from tests.conftest import RUN_MARK

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
LIMIT = 400
"""Seconds that an engine may take for everything."""
PREPARED: list[subprocess.Popen[str]] = []
"""Processes that have imported vLLM and run no engine now."""


@dataclass
class Texts:
    """Token ids of real texts, in the tokens of one model."""

    tokenizer: Tokenizer
    texts: list[str]

    def tokens(self, number: int, n: int, skip: int = 0) -> list[int]:
        """The first ``n`` tokens of a text, from its character ``skip`` on, after the model's first token."""
        return list(self.tokenizer.encode(self.texts[number % len(self.texts)][skip : skip + 6 * n + 100]).ids[:n])

    def more(self, text: str) -> list[int]:
        """Token ids of what comes later in a prompt."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def texts_of(model: Path, texts: list[str]) -> Texts:
    return Texts(Tokenizer.from_file(str(model / "tokenizer.json")), texts)


def transfer(probe: bool = False, **extra: Any) -> dict[str, Any]:
    """The --kv-transfer-config of the hook."""
    return {
        "kv_connector": "ProbeConnector" if probe else "KvfsConnector",
        "kv_connector_module_path": "tests.hook_probe" if probe else "kvfs.vllm_hook.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def generate(*prompts: dict[str, Any]) -> dict[str, Any]:
    return {"do": "generate", "prompts": list(prompts)}


def prompt(ids: list[int], max_tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"ids": ids, "max_tokens": max_tokens, **more}


RESET = {"do": "reset"}
SETTLE = {"do": "settle"}
"""Until what was gathered is in the store."""

KNOWN = {"do": "known"}
"""Until the store knows the engine's namespace: what is computed before is not stored."""


def prepare() -> subprocess.Popen[str]:
    """Start a process that engines can be forked from. It outlives the test, and so it does not carry the run's mark;
    what it runs does."""
    fixed = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name != RUN_MARK}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine"],
        cwd=ROOT,
        env=environment | fixed,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.communicate, timeout=LIMIT)
    return process


def run_engine(
    folder: Path,
    name: str,
    model: Path,
    ops: list[dict[str, Any]],
    connector: dict[str, Any] | None,
    env: dict[str, str] | None = None,
    apart: bool = True,
    **llm: Any,
) -> list[dict[str, Any]]:
    """Start an engine, run ``ops``, end it; returns one result for each op. Its log is kept beside the job, and the
    store it uses is the folder ``store`` there. ``apart``: its core has a process of its own, as in a server; without,
    it starts in half the time."""
    Store.init(folder / "store").close()
    job, out, log = (folder / f"{name}.{end}" for end in ("json", "out", "log"))
    ops = [op | ({"folder": str(folder / "store")} if op == SETTLE else {}) for op in ops]
    job.write_text(json.dumps({"model": str(model), "llm": llm, "ops": [KNOWN, *ops], "connector": connector}))
    environment = {
        RUN_MARK: os.environ[RUN_MARK],
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if llm.get("tensor_parallel_size", 1) == 2 else "0-1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)),
        "TMPDIR": str(folder),  # vLLM leaves its sockets behind
        "KVFS_PROBE": str(folder / f"{name}.events"),
        "KVFS_PROBE_STORE": str(folder / "store"),
    } | (env or {})
    process = PREPARED.pop() if PREPARED else prepare()
    order = {"job": str(job), "out": str(out), "output": str(log), "environment": environment, "seconds": LIMIT}
    print(json.dumps(order), file=process.stdin, flush=True)
    if not (status := process.stdout.readline()):
        pytest.fail("nothing runs engines: see what `python -m tests.engine` says", pytrace=False)
    PREPARED.append(process)
    code = int(status)
    results = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if code or len(results) != len(ops) + 2:
        pytest.fail(f"engine {name}: {code} after {len(results)} results:\n{log.read_text()[-4000:]}", pytrace=False)
    return results[2:]


@contextmanager
def mounted(store: Path, point: Path) -> Iterator[int]:
    """Show a store at a mount point while this lasts; gives the pid of the daemon's keeper."""
    point.mkdir()
    kvfs = str(Path(sys.executable).with_name("kvfs"))
    subprocess.run(["timeout", "-k", "5", "30", kvfs, "mount", str(store), str(point)], check=True)
    try:
        yield next(
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and f"kvfs.daemon.keeper\0{store}\0{point}\0" in _command(entry)
        )
    finally:
        subprocess.run(["timeout", "-k", "5", "30", kvfs, "umount", str(point)], check=False)
        subprocess.run(["umount", "-l", str(point)], check=False, stderr=subprocess.DEVNULL)


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:  # gone meanwhile
        return ""


def can_mount() -> bool:
    """Whether this user may mount through FUSE without help."""
    return os.geteuid() == 0 and os.access("/dev/fuse", os.W_OK)


def cached(result: dict[str, Any]) -> list[int]:
    """Prompt tokens that each request of a generate op did not compute."""
    return [o["cached"] for o in result["outputs"]]


def answers(result: dict[str, Any]) -> list[list[int]]:
    """The tokens that each request of a generate op got."""
    return [o["ids"] for o in result["outputs"]]
