"""What the scheduler half tells the worker half, once a step: parts to load into blocks and parts to store from them.

Plain data: vLLM carries it from its scheduler to every rank.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvfs.chunk import PartMeta
from kvfs.errors import ChunkCorrupt
from kvfs.identity import Manifest

__all__ = ["Load", "LoadPart", "Save", "SavePart", "StepJobs"]


@dataclass(frozen=True)
class LoadPart:
    """Parts of one chunk to load: ``kinds`` of the chunk ``key`` of namespace ``ns``, which holds ``tokens`` from
    ``position`` on."""

    ns: bytes
    key: bytes
    position: int
    tokens: int
    kinds: tuple[str, ...]

    def check(self, meta: PartMeta) -> None:
        """Make sure that a part file holds these tokens; ChunkCorrupt ``wrong-shape`` if not."""
        if (meta.position, meta.tokens) != (self.position, self.tokens):
            name = f"{meta.key.hex()}.{meta.part}"
            raise ChunkCorrupt(name, "wrong-shape", f"tokens {meta.position}+{meta.tokens}")


@dataclass(frozen=True)
class Load:
    """Fill the blocks of a request with the tokens [computed, n).

    ``first`` gives, per kind, the first token to write: nothing below it, nothing at n or beyond. ``block_ids`` are the
    engine's block tables, one per group. ``seconds`` is the estimate (0: none yet), ``nbytes`` what will be read by
    all ranks together.
    """

    request: str
    n: int
    first: dict[str, int]
    parts: tuple[LoadPart, ...]
    block_ids: tuple[list[int], ...]
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class SavePart:
    """Parts of one chunk to store."""

    key: bytes
    parent: bytes
    position: int
    tokens: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Save:
    """Store chunks of a request from its blocks, which hold them at the end of this step."""

    request: str
    ns: bytes
    parts: tuple[SavePart, ...]
    block_ids: tuple[list[int], ...]


@dataclass
class StepJobs(KVConnectorMetadata):
    """Everything for one step. ``manifests`` are the namespaces not announced before, ``held`` the finished requests
    whose blocks the engine keeps until the worker has reported them as sent. ``idle``: the engine computes nothing."""

    manifests: list[Manifest] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    idle: bool = False
