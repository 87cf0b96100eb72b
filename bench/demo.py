"""Two engines, one prefill (``make demo``): what the second engine gains from what the first one stored.

A store is mounted; an engine prefills a long real text, stores it, and is ended. A second, fresh engine gets the same
prompt, then the same text with another question, then the conversation that goes on, each computed anew (reads switched
off by the request) and from the mount. Without the right to mount, the engines use the store folder directly.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.engine import Engine, running
from bench.peers import PEERS, Peer, mountpoint
from bench.prompts import encode, prompt, tokenizer
from bench.ttft import settle, stored_bytes
from models import build

QUESTIONS = ("\n\nQuestion: What is this text about?\nAnswer:", "\n\nQuestion: Who would read it, and why?\nAnswer:")
FOLLOW_UP = "\n\nQuestion: Name one detail of it.\nAnswer:"
ANSWER_TOKENS = 24
NO_READ = {"kvfs.skip_read": True, "kvfs.skip_write": True}
KVFS = str(Path(sys.executable).with_name("kvfs"))


@dataclass(frozen=True)
class Row:
    """One prompt: how long the first token took computed and from the store (s), and how many tokens were loaded."""

    title: str
    tokens: int
    cold: float
    warm: float
    loaded: int
    same: bool


def say(text: str) -> None:
    """Print one line of progress at once."""
    print(text, flush=True)


async def compare(engine: Engine, title: str, ids: list[int]) -> Row:
    """Answer a prompt computed anew, then from the store."""
    cold = await engine.generate(ids, ANSWER_TOKENS, **NO_READ)
    await engine.forget()
    warm = await engine.generate(ids, ANSWER_TOKENS)
    await engine.forget()
    return Row(title, len(ids), cold.ttft, warm.ttft, warm.cached, warm.tokens == cold.tokens)


async def play(peer: Peer, store: Path, place: Path, model: Path, length: int, log: Path) -> tuple[list[Row], str]:
    """Run both engines. Return a row for each prompt, and what was stored and shared in words."""
    text = prompt(model, length, "A text that both engines read", 0)
    first, second = ([*text, *encode(model, q)[1:]] for q in QUESTIONS)
    say(f"engine 1 starts on {place}")
    async with running(peer, store, model, log) as engine:
        await engine.generate(prompt(model, 600, "warm-up", 1))
        answer = await engine.generate(first, ANSWER_TOKENS)
        say(f"engine 1 prefilled {len(first):,} tokens: first token after {answer.ttft:.2f} s")
        say(f"  it says: {tokenizer(model).decode(answer.tokens)!r}")
        await settle(store)
    stored = stored_bytes(store)
    say(f"engine 1 has ended; {stored / 1e6:.1f} MB are stored\n\nengine 2 starts on {place}")
    async with running(peer, store, model, log, disable_log_stats=False) as engine:
        await engine.generate(prompt(model, 600, "warm-up", 2))
        before = await engine.loaded_bytes()
        warm = await engine.generate(first, ANSWER_TOKENS)
        await engine.forget()
        shared = await engine.loaded_bytes() - before
        rows = [Row("the same prompt", len(first), answer.ttft, warm.ttft, warm.cached, warm.tokens == answer.tokens)]
        goes_on = [*first, *warm.tokens, *encode(model, FOLLOW_UP)[1:]]
        rows.append(await compare(engine, "same text, other question", second))
        rows.append(await compare(engine, "the conversation goes on", goes_on))
    words = f"stored by engine 1: {stored / 1e6:.1f} MB; of these"
    return rows, f"{words} engine 2 loaded for the same prompt: {shared / 1e6:.1f} MB"


def table(rows: list[Row]) -> str:
    """Return the rows as text."""
    lines = [f"{'':<26}{'prompt':>8}{'from store':>12}{'TTFT cold':>11}{'TTFT kvfs':>11}{'':>8}  same answer"]
    lines += [
        f"{r.title:<26}{r.tokens:>8,}{r.loaded:>12,}{r.cold:>9.2f} s{r.warm:>9.2f} s{r.cold / r.warm:>7.0f}x  "
        f"{'yes' if r.same else 'no*'}"
        for r in rows
    ]
    if not all(r.same for r in rows):
        lines.append(
            "* where two tokens are equally likely in bfloat16, any hit, the engine's own too, may turn the answer"
        )
    return "\n".join(lines)


def show(*command: str) -> None:
    """Print a kvfs command and what it prints."""
    say(f"\n$ kvfs {' '.join(command)}")
    subprocess.run([KVFS, *command], check=True, timeout=30)


def can_mount(work: Path) -> str:
    """Try a mount; return why it is refused, in one line, or nothing."""
    (work / "probe.mnt").mkdir()
    subprocess.run([KVFS, "init", work / "probe"], check=True, stdout=subprocess.DEVNULL, timeout=30)
    tried = subprocess.run(
        [KVFS, "mount", work / "probe", work / "probe.mnt"], capture_output=True, text=True, check=False, timeout=30
    )
    if tried.returncode == 0:
        subprocess.run([KVFS, "umount", work / "probe.mnt"], check=True, timeout=30)
        return ""
    logs = [line for path in (work / "probe" / ".kvfs").glob("daemon.*.log") for line in path.read_text().splitlines()]
    return "; ".join([*tried.stderr.split("\n")[:1], *logs[-1:]])


def main() -> None:
    """Play the demonstration and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000, help="length of the text")
    parser.add_argument("--model", type=Path, default=build.Models.at(build.cache_dir()).gemma)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvfs-demo-") as folder:
        work = Path(folder)
        store, log = work / "store", work / "engines.log"
        refused = can_mount(work)
        if refused:
            say(f"no mount here ({refused}); the engines use the store folder itself")
        peer = PEERS["kvfs-store" if refused else "kvfs"]
        place = store if refused else mountpoint(store)
        subprocess.run([KVFS, "init", store], check=True, stdout=subprocess.DEVNULL, timeout=30)
        try:
            with peer.service(store, log):
                if not refused:
                    say(f"{store} is mounted at {place}")
                rows, words = asyncio.run(play(peer, store, place, options.model, options.tokens, log))
                show("status", "--at", str(place))
                show("ls", "--at", str(place))
        except Exception:
            say("\n".join(log.read_text(errors="replace").splitlines()[-40:]) if log.exists() else "no engine log")
            raise
        say(f"\n{table(rows)}\n\n{words}")


if __name__ == "__main__":
    main()
