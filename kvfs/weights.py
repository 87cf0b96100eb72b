"""The content hash of a model's weights, computed once per file and remembered by (dev, ino, size, mtime, ctime).

Only content counts: a renamed or copied folder is the same model, an edited file with the same name is
another.  Hugging Face's cache names each blob by its SHA-256 already; other files are hashed in full.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

from kvfs.errors import IdentityError

__all__ = ["adapter_fingerprint", "weights_fingerprint"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state.*)\.(bin|pt|pth)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfs" / "weights.json"


def _load_cache(path: Path) -> dict[str, str]:
    try:
        d = json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent or damaged: derived data, hash again
        return {}
    return {k: v for k, v in d.items() if isinstance(v, str)} if isinstance(d, dict) else {}


def _save_cache(path: Path, entries: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # a read-only home costs a second hash, nothing else
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, tmp = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(fd, "w") as f:
            json.dump(_load_cache(path) | entries, f)
        Path(tmp).replace(path)


def _file_hash(path: Path, cache: dict[str, str], fresh: dict[str, str]) -> str:
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    with real.open("rb") as f:
        st = os.fstat(f.fileno())
        ident = f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}:{st.st_ctime_ns}"
        if ident not in cache:
            cache[ident] = fresh[ident] = hashlib.file_digest(f, "sha256").hexdigest()
            after = os.fstat(f.fileno())
            if (after.st_size, after.st_mtime_ns) != (st.st_size, st.st_mtime_ns):
                raise IdentityError(f"{real} changed while it was hashed; wait until it is written and start again")
        return cache[ident]


def _fingerprint(domain: bytes, files: list[Path]) -> str:
    path = _cache_path()
    cache = _load_cache(path)
    fresh: dict[str, str] = {}
    hashes = sorted(_file_hash(f, cache, fresh) for f in files)
    if fresh:
        _save_cache(path, fresh)
    return hashlib.sha256(domain + "\n".join(hashes).encode()).hexdigest()


def weights_fingerprint(model: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over the content of a model's weight files; ``model`` is a folder or one file.

    Where a folder holds safetensors, other formats of the same weights in it are not counted, as
    loaders prefer safetensors.  Raises IdentityError if there are no weights, OSError if one cannot be read.
    """
    p = Path(model)
    files = [p] if p.is_file() else sorted(f for f in p.glob("*") if f.suffix in _WEIGHTS and f.is_file())
    files = [f for f in files if not _NOT_WEIGHTS.fullmatch(f.name)]
    safetensors = [f for f in files if f.suffix == ".safetensors"]
    if not files:
        raise IdentityError(f"{p} holds no weight files ({', '.join('*' + s for s in _WEIGHTS)})")
    return _fingerprint(b"kvfs-weights/1\0", safetensors or files)


def adapter_fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over the content of a LoRA adapter: its weights and ``adapter_config.json``."""
    p = Path(folder)
    files = [f for f in sorted(p.glob("adapter_*")) if f.is_file()]
    if not files:
        raise IdentityError(f"{p} holds no adapter (adapter_config.json and adapter_model.*)")
    return _fingerprint(b"kvfs-adapter/1\0", files)
