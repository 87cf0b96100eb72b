"""Runs vLLM engines through lists of operations, each in a process of its own. Not a test: t6 tests start it.

``python -m tests.engine`` imports vLLM, which takes longer than to start a small engine; then it forks for each line of
its standard input, ``{"job", "out", "output", "environment", "seconds"}``, and answers with the status of the fork.

The file JOB is ``{"model": folder, "llm": {LLM keywords}, "connector": {kv_transfer_config} or null, "ops": [...]}``;
each op is ``{"do": name, ...}`` (see the functions below), and each writes one line to OUT as it ends. The engine's
processes are ended by their ids and the fork by ``os._exit``: vLLM's own way out walks /proc, which a stuck mount can
block.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Result = dict[str, Any]


def generate(llm: Any, op: dict[str, Any]) -> Result:
    """Answer ``prompts`` (``{"ids", "max_tokens", "params", "logprobs"}``) at once, greedily."""
    from vllm import SamplingParams

    prompts, sampling = [], []
    for p in op["prompts"]:
        prompts.append({"prompt_token_ids": p["ids"]} | ({"cache_salt": p["salt"]} if p.get("salt") else {}))
        sampling.append(
            SamplingParams(
                max_tokens=p.get("max_tokens", 4),
                temperature=0,
                ignore_eos=True,
                logprobs=p.get("logprobs"),
                extra_args={"kv_transfer_params": p["params"]} if p.get("params") else None,
            )
        )
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "outputs": [
            {"ids": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens, "reason": o.outputs[0].finish_reason}
            for o in outputs
        ],
    }


def distributions(llm: Any, op: dict[str, Any]) -> Result:
    """Score each of ``prompts`` from its token ``after`` on, over what is cached of it: the ``top`` most likely tokens
    of each position, as arrays ``ids<i>`` and ``logprobs<i>`` ``[positions, top + 1]`` (the token itself comes first)
    in the file ``out``."""
    import numpy as np
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=op["top"],
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=False,
        extra_args={"kv_transfer_params": {"kvfs.skip_write": True}},
    )
    arrays, cached, width = {}, [], op["top"] + 1
    for i, ids in enumerate(op["prompts"]):
        [told] = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        found, cached = told.prompt_logprobs, [*cached, told.num_cached_tokens]
        begins = [found.start_indices[p] for p in range(op["after"] + 1, len(ids))]
        arrays[f"ids{i}"] = np.array([found.token_ids[b : b + width] for b in begins], np.int32)
        arrays[f"logprobs{i}"] = np.array([found.logprobs[b : b + width] for b in begins], np.float64)
    np.savez(op["out"], **arrays)
    return {"cached": cached}


def compact(llm: Any, op: dict[str, Any]) -> Result:
    """Compact the whole store ``folder``, lossy namespaces at ``level``."""
    from tests.compacting import compact

    return {"parts": compact(Path(op["folder"]), op["level"])}


def reset(llm: Any, op: dict[str, Any]) -> Result:
    """Empty the engine's own prefix cache; with ``connector`` the connector's too."""
    return {"ok": llm.reset_prefix_cache(reset_connector=op.get("connector", False))}


def repeat(llm: Any, op: dict[str, Any]) -> Result:
    """Generate for ``prompts``, with the engine's own prefix cache emptied each time, until the file ``until`` is
    there; the sums of what came of it."""
    requests = hits = 0
    reasons: Counter[str] = Counter()
    slowest = 0.0
    while not Path(op["until"]).exists():
        reset(llm, op)
        found = generate(llm, op)
        requests += len(found["outputs"])
        hits += sum(o["cached"] > 0 for o in found["outputs"])
        reasons.update(o["reason"] for o in found["outputs"])
        slowest = max(slowest, found["seconds"])
    return {"requests": requests, "hits": hits, "reasons": reasons, "slowest": slowest}


def known(llm: Any, op: dict[str, Any]) -> Result:
    """Wait until the store knows the engine's namespace, as far as this process can see."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None or (connector := core.scheduler.connector) is None:
        time.sleep(3)
        return {}
    deadline = time.monotonic() + 10
    while connector._scheduler._namespaces.get(None) is None:
        if time.monotonic() > deadline:
            raise TimeoutError("the store does not know the engine's namespace")
        time.sleep(0.02)
    return {}


def sleep(llm: Any, op: dict[str, Any]) -> Result:
    """Wait ``seconds``."""
    time.sleep(op["seconds"])
    return {}


def settle(llm: Any, op: dict[str, Any]) -> Result:
    """Wait until what was gathered is in the store: nothing new in ``folder`` for two seconds."""
    seen, since = -1, time.monotonic()
    until = since + 60
    while time.monotonic() < min(until, since + 2):
        now = sum(1 for _ in Path(op["folder"]).glob("*/*/*.safetensors"))
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.1)
    return {"parts": seen}


def abort(llm: Any, op: dict[str, Any]) -> Result:
    """Start ``ids`` under the request id ``name`` (digits), and abort it after ``seconds``."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request(op["name"], {"prompt_token_ids": op["ids"]}, SamplingParams(max_tokens=4, temperature=0))
    time.sleep(op["seconds"])
    engine.abort_request([op["name"]])
    return {}


def signal_daemon(llm: Any, op: dict[str, Any]) -> Result:
    """Send ``signal`` to the worker of the daemon whose keeper is ``keeper``, and with ``both`` to the keeper too."""
    keeper = op["keeper"]
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    for pid in [*([keeper] if op.get("both") else []), *map(int, children)]:
        os.kill(pid, getattr(signal, op["signal"]))
    return {"children": children}


def copy(llm: Any, op: dict[str, Any]) -> Result:
    """Copy the store ``folder`` to the folder ``to``."""
    shutil.copytree(op["folder"], op["to"])
    return {}


def recode(llm: Any, op: dict[str, Any]) -> Result:
    """Put into the store ``folder`` what the codec ``baseline`` of `bench.baselines` leaves of its raw copy ``raw``."""
    from tests.compacting import recode

    return {"parts": recode(Path(op["raw"]), Path(op["folder"]), op["baseline"])}


DO = {
    "generate": generate,
    "known": known,
    "distributions": distributions,
    "compact": compact,
    "copy": copy,
    "recode": recode,
    "reset": reset,
    "repeat": repeat,
    "sleep": sleep,
    "settle": settle,
    "abort": abort,
    "signal": signal_daemon,
}


def main() -> None:
    """Fork for each order, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        if not (pid := os.fork()):
            obey(**json.loads(line))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()


def obey(job: str, out: str, output: str, environment: dict[str, str], seconds: int) -> None:
    """Be the process of one engine, which ends after so many seconds at the latest."""
    code = 1
    try:
        signal.alarm(seconds)
        os.environ.update(environment)
        tempfile.tempdir = None  # read again
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for fd, place in (os.open(os.devnull, os.O_RDONLY), 0), (sink, 1), (sink, 2):
            os.dup2(fd, place)
        run(json.loads(Path(job).read_text()), Path(out))
        code = 0
    except Exception:
        log.exception("the engine failed")
    finally:
        os._exit(code)


def run(job: dict[str, Any], out: Path) -> None:
    """Start the engine, run the operations, end it."""
    from vllm import LLM

    began = time.perf_counter()
    keywords = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "seed": 0,
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,  # prompts are token ids; Gemma's takes fifteen seconds
    } | job.get("llm", {})
    llm = LLM(model=job["model"], kv_transfer_config=job.get("connector"), **keywords)
    with out.open("a") as file:

        def tell(result: Result) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()

        tell({"ready": time.perf_counter() - began})
        for op in job["ops"]:
            tell(DO[op["do"]](llm, op))
    llm.llm_engine.engine_core.shutdown()
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(10)
        if child.is_alive():
            child.kill()


if __name__ == "__main__":
    main()
