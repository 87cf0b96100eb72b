"""An engine's namespaces: what is in its manifest, found out in the background so that no engine start waits for it.

Until the weights' content hash is known, and for an adapter until its own is, every lookup is a miss. Weights that no
file vouches for (dummy weights, formats kvfs cannot hash, weights updated while the engine runs) get a private
namespace that no other engine shares.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from kvfs.errors import IdentityError, KvfsError, Unsupported
from kvfs.identity import Manifest, Salts, config_identity
from kvfs.vllm_hook.geometry import Geometry
from kvfs.weights import adapter_fingerprint, weights_fingerprint

__all__ = ["Adapter", "Namespaces", "manifest_of", "model_folder"]

log = logging.getLogger(__name__)

HASHABLE_FORMATS = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "pt", "npcache", "gguf", "mistral"})
"""Load formats of vLLM that put into the model exactly what lies in its folder."""

Adapter = tuple[int, str]
"""A LoRA adapter of the engine: its id, and the path of its folder."""


def model_folder(config: Any) -> Path:
    """The local file or folder of a model's weights. Unsupported if there is none to hash. ``config``: VllmConfig."""
    model, load_format = config.model_config, str(config.load_config.load_format)
    if load_format not in HASHABLE_FORMATS:
        raise Unsupported(f"sharing KV of weights loaded as {load_format}")
    if getattr(config, "weight_transfer_config", None) is not None:
        raise Unsupported("sharing KV of weights that are updated while the engine runs")
    return local_folder(model.model, model.revision, config.load_config.download_dir)


def local_folder(name: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The local file or folder of what is named by its path, or by its name on the Hugging Face hub."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - an import of a second, for hub names only
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError) as e:
        raise Unsupported(f"sharing KV of {name}, whose files are not found here ({e})") from e


def manifest_of(config: Any, geometry: Geometry, weights: str, chunk_tokens: int, fidelity: str) -> Manifest:
    """The manifest of an engine without adapter. ``config`` is a VllmConfig."""
    model = config.model_config
    arguments = getattr(model, "quantization_config", None)  # of quantization while loading
    return Manifest(
        weights=weights,
        config=config_identity(model.hf_text_config.to_dict()),
        model_dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=geometry.kv_dtype,
        kinds=geometry.kinds,
        quantization=model.quantization if arguments is None else [model.quantization, str(arguments)],
        kv_scales="checkpoint" if geometry.kv_dtype.startswith("F8") else "none",
        chunk_tokens=chunk_tokens,
        fidelity=fidelity,
    )


class Namespaces:
    """The namespaces of one engine, by adapter.

    ``get`` never waits. ``register`` (of a client) makes a namespace known to the store, and runs in the background
    too; it is tried again when it fails, as the store may come back. It gives the secrets that enter the keys there:
    ``salts``, before any namespace is known.
    """

    RETRY = 5.0

    def __init__(
        self, config: Any, chunk_tokens: int, fidelity: str, register: Callable[[Manifest, dict[str, Any]], Salts]
    ) -> None:
        self.salts = Salts()
        self._config, self._register = config, register
        self._chunk_tokens, self._fidelity = chunk_tokens, fidelity
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._geometry: Geometry | None = None
        self._private: str | None = None
        self._known: dict[Adapter | None, Manifest] = {}
        self._asked: set[Adapter | None] = set()
        self._epoch = 0

    def start(self, geometry: Geometry) -> None:
        """Begin, once the workers have told what their layers are."""
        windows = [k.window for k in geometry.kinds if k.window]
        if windows and min(windows) < self._chunk_tokens:
            # A step may free what lies beyond the window, so a chunk longer than it could never be read back whole.
            self._chunk_tokens = max(16, min(windows) // 16 * 16)
        self._geometry = geometry
        self.get(None)

    def get(self, adapter: Adapter | None) -> Manifest | None:
        """The namespace of requests with this adapter; None until it is known."""
        with self._lock:
            if adapter in self._known or adapter in self._asked or self._geometry is None:
                return self._known.get(adapter)
            self._asked.add(adapter)
            epoch = self._epoch
        threading.Thread(target=self._find, args=(adapter, epoch), name="kvfs-fingerprint", daemon=True).start()
        return None

    def forget(self, adapter: Adapter) -> None:
        """An adapter is about to be loaded again in place: what is in its folder may have changed."""
        with self._lock:
            self._known.pop(adapter, None)
            self._asked.discard(adapter)

    def renew(self) -> None:
        """The engine's KV so far is void (a reset, a weight update): go on in a fresh private namespace."""
        with self._lock:
            self._private = f"private:{uuid4().hex}"
            self._epoch += 1
            self._known.clear()
            self._asked.clear()
        self.get(None)

    def close(self) -> None:
        self._closed.set()

    def register(self, manifest: Manifest) -> None:
        """Make a namespace of this engine known to the store, under the name that people call the model."""
        model = self._config.model_config
        name = model.served_model_name or model.model
        private = {"private": True} if manifest.weights.startswith("private:") else {}
        self.salts = self._register(manifest, {"name": str(name), "revision": model.revision} | private)

    def readable(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """The namespaces that whoever writes to this one may read, the preferred one first: itself, and before a lossy
        one the exact one of the same identity."""
        twins = (dataclasses.replace(manifest, fidelity="exact"),) if manifest.fidelity == "lossy" else ()
        return (*twins, manifest)

    def _find(self, adapter: Adapter | None, epoch: int) -> None:
        level = logging.WARNING
        while not self._closed.is_set():
            try:
                manifest = self._fingerprint(adapter)
                for each in self.readable(manifest):
                    self.register(each)
            except (KvfsError, OSError) as e:
                log.log(level, "kvfs: nothing is cached until the store knows the model (%s); trying again", e)
                level = logging.DEBUG
                self._closed.wait(self.RETRY)
                continue
            except Exception:  # a thread of the hook's outer boundary
                log.exception("kvfs: nothing is cached: the model cannot be identified")
                return
            with self._lock:
                if epoch == self._epoch:
                    self._known[adapter] = manifest
            return

    def _fingerprint(self, adapter: Adapter | None) -> Manifest:
        if self._geometry is None:
            raise IdentityError("the engine's layers are not known yet")
        if self._private is None:
            try:
                weights = weights_fingerprint(model_folder(self._config))
            except Unsupported as e:
                log.info("kvfs: a private namespace for this engine: %s", e)
                with self._lock:
                    weights = self._private = self._private or f"private:{uuid4().hex}"
        else:
            weights = self._private
        manifest = manifest_of(self._config, self._geometry, weights, self._chunk_tokens, self._fidelity)
        return manifest if adapter is None else manifest.with_adapter(adapter_fingerprint(local_folder(adapter[1])))
