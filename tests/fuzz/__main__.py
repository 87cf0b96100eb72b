"""Fuzz one target with atheris: ``python -m tests.fuzz TARGET SECONDS``.

What was found worth keeping stays in ``build/fuzz/TARGET`` for the next time; input that breaks something is written to
``build/fuzz`` and named.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvfs"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Begin with the seeds, and go on until the time is over or something breaks."""
    name, seconds = sys.argv[1], int(sys.argv[2])
    target = TARGETS[name]
    corpus = Path("build/fuzz") / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    work = target.make()
    options = [
        f"-max_total_time={seconds}",
        "-max_len=70000",
        "-rss_limit_mb=2048",
        "-timeout=10",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix=build/fuzz/{name}.", str(corpus)], work)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
