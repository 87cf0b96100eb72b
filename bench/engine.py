"""A vLLM engine in a process of its own, driven over two pipes: what every benchmark measures.

The child reads one JSON request a line, runs any number of them at a time and answers in the order of completion; times
are taken in the child, so that the pipe costs nothing. The parent sees an asynchronous ``Engine``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.peers import Peer

ROOT = Path(__file__).parent.parent
START_LIMIT = 240.0
"""Seconds that an engine may take to start."""

END_LIMIT = 30.0
"""Seconds that an engine may take to go."""

REST = 1.3
"""Seconds after which an engine that has answered leaves the cores to another one: vLLM's processes go on polling for a
second (its ``SpinCondition``). Whoever measures engines in turns rests between them."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",  # both cores of the reference machine; the default leaves one idle
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": str(ROOT),
}
ARGUMENTS = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 16384, "disable_log_stats": True}


@dataclass(frozen=True)
class Answer:
    """One finished generation. Times are seconds since the request."""

    tokens: list[int]
    ttft: float
    total: float
    cached: int
    """Prompt tokens that were not computed, from whatever cache."""


class Engine:
    """The parent's side of an engine process. Make one with ``running``."""

    def __init__(self, process: subprocess.Popen[bytes], requests: int, answers: asyncio.StreamReader) -> None:
        self._process = process
        self._requests = requests
        self._answers = answers
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        while line := await self._answers.readline():
            answer = json.loads(line)
            self._waiting.pop(answer.pop("id")).set_result(answer)
        for future in self._waiting.values():
            future.set_exception(RuntimeError(f"engine process {self._process.pid} ended; see its log"))

    async def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        if self._reader.done():
            raise RuntimeError(f"engine process {self._process.pid} has ended; see its log")
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        os.write(self._requests, json.dumps({"id": number, "verb": verb, **arguments}).encode() + b"\n")
        return await future

    async def generate(self, prompt: list[int], max_tokens: int = 1, **transfer: Any) -> Answer:
        """Generate greedily, exactly ``max_tokens`` tokens. ``transfer`` are the request's ``kv_transfer_params``."""
        return Answer(**await self._ask("generate", prompt=prompt, max_tokens=max_tokens, transfer=transfer))

    async def loaded_bytes(self) -> int:
        """Return the bytes that kvfs has put into the engine's blocks; for engines that do not disable_log_stats."""
        return int((await self._ask("loaded"))["bytes"])

    async def forget(self) -> None:
        """Empty the engine's own prefix cache, so that only the connector's store can serve. Raises TimeoutError."""
        for _ in range(200):
            if (await self._ask("forget"))["done"]:
                return
            await asyncio.sleep(0.05)  # blocks are still held, by a store in flight for one
        raise TimeoutError("the engine's prefix cache cannot be emptied: its blocks stay in use")


def start(peer: Peer, options: dict[str, Any], log: Path) -> tuple[subprocess.Popen[bytes], int, int]:
    """Start the child in a process group of its own. Return it, the end to write to and the end to read from."""
    (child_in, requests), (answers, child_out) = os.pipe(), os.pipe()
    own = {"TMPDIR": str(log.parent), "VLLM_RPC_BASE_PATH": str(log.parent)}
    command = [peer.python, "-m", "bench.engine", str(child_in), str(child_out), json.dumps(options)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | peer.environment | own,
            pass_fds=(child_in, child_out),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    os.close(child_in)
    os.close(child_out)
    return process, requests, answers


async def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the group of a child that was asked to go, and kill what stays: a stuck mount can hold it for ever."""
    deadline = time.monotonic() + END_LIMIT
    while time.monotonic() < deadline:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.asynccontextmanager
async def running(peer: Peer, store: Path, model: Path, log: Path, **arguments: Any) -> AsyncIterator[Engine]:
    """Run an engine with ``peer``'s connector on ``store``.

    Its output is appended to ``log``, and its sockets lie beside that, so its path is short. Raises RuntimeError if
    the engine does not start, TimeoutError if it takes longer than ``START_LIMIT``.
    """
    options = {"model": str(model), **ARGUMENTS, **peer.arguments, **arguments}
    if connector := peer.connector(store):
        options["kv_transfer_config"] = connector
    process, requests, answers = start(peer, options, log)
    reader, transport = await read_lines(answers)
    try:
        if await asyncio.wait_for(reader.readline(), START_LIMIT) != b"ready\n":
            raise RuntimeError(f"{peer.name}: the engine did not start; see {log}")
        yield Engine(process, requests, reader)
    finally:
        os.close(requests)
        await end(process)
        transport.close()


async def read_lines(pipe: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    """Attach a reader to a pipe."""
    reader = asyncio.StreamReader(limit=1 << 24)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb")
    )
    return reader, transport


async def serve(requests: int, answers: int, options: dict[str, Any]) -> None:
    """Run the engine of this process until the parent closes its pipe."""
    from prometheus_client import REGISTRY
    from vllm import SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    if "kv_transfer_config" in options:
        options["kv_transfer_config"] = KVTransferConfig(**options["kv_transfer_config"])
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def generate(number: int, prompt: list[int], max_tokens: int, transfer: dict[str, Any]) -> dict[str, Any]:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )
        tokens: list[int] = []
        start, first, cached = time.perf_counter(), 0.0, 0
        async for output in engine.generate(TokensPrompt(prompt_token_ids=prompt), sampling, str(number)):
            first = first or time.perf_counter() - start
            cached = output.num_cached_tokens or cached
            tokens += output.outputs[0].token_ids
        return {"tokens": tokens, "ttft": first, "total": time.perf_counter() - start, "cached": cached}

    async def answer(request: dict[str, Any]) -> None:
        number, verb = request.pop("id"), request.pop("verb")
        if verb == "forget":
            result = {"done": await engine.reset_prefix_cache()}
        elif verb == "loaded":
            samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
            result = {"bytes": sum(s.value for s in samples if s.name == "kvfs_hook_load_bytes_total")}
        else:
            result = await generate(number, **request)
        os.write(answers, json.dumps({"id": number, **result}).encode() + b"\n")

    reader, _ = await read_lines(requests)
    os.write(answers, b"ready\n")
    try:
        async with asyncio.TaskGroup() as group:  # what fails ends the process, and the parent sees the pipe's end
            while line := await reader.readline():
                group.create_task(answer(json.loads(line)))
            engine.shutdown(timeout=END_LIMIT - 10)
            os._exit(0)
    finally:
        os.close(answers)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])))
