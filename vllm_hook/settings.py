"""What a user may write into ``kv_connector_extra_config``."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from kvfs.config import nearest
from kvfs.errors import ConfigError
from kvfs.identity import CHUNK_TOKENS, TAIL_STEP

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The keys of ``kv_connector_extra_config``; exactly one of ``mount`` and ``store`` must be given.

    ``fidelity`` is ``exact``, or ``lossy``: KV that was compacted with loss will do, and what this engine computes is
    stored where only lossy engines find it. ``gate`` is ``auto`` (load only what is estimated to come faster than it is
    computed) or ``always``. A sliding window is kept at every multiple of ``interval_tokens``, so that a later text
    sharing a document up to there can continue from it. Deadlines are in seconds: ``lookup_deadline`` for the answer to
    a lookup; a load is given up after ``stall_deadline`` without a byte, or after ``load_deadline`` or twice the
    estimate, whichever is longer.
    """

    mount: str | None = None
    store: str | None = None
    chunk_tokens: int = CHUNK_TOKENS
    fidelity: str = "exact"
    gate: str = "auto"
    staging_bytes: int = 512 << 20
    interval_tokens: int = 2048
    lookup_deadline: float = 0.05
    stall_deadline: float = 0.5
    load_deadline: float = 2.0

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Self:
        """Check every key and value; ConfigError names what is wrong, and the nearest name of an unknown key."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in extra.items():
            if key not in fields:
                raise ConfigError(f"kv_connector_extra_config has no key {key}{nearest(key, fields)}")
            default = fields[key].default
            wanted = str if default is None else (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ConfigError(f"kv_connector_extra_config: {key} cannot be {value!r}")
        settings = cls(**extra)
        settings._check()
        return settings

    def _check(self) -> None:
        if bool(self.mount) == bool(self.store):
            raise ConfigError("kv_connector_extra_config needs either mount (a mounted store) or store (its folder)")
        if self.gate not in {"auto", "always"}:
            raise ConfigError(f"gate is {self.gate!r}; it can be auto or always")
        if self.fidelity not in {"exact", "lossy"}:
            raise ConfigError(f"fidelity is {self.fidelity!r}; it can be exact or lossy")
        if self.chunk_tokens < TAIL_STEP or self.chunk_tokens % TAIL_STEP:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}; it must be a positive multiple of {TAIL_STEP}")
        if self.interval_tokens < 0 or self.staging_bytes <= 0:
            raise ConfigError("interval_tokens cannot be negative, and staging_bytes must be positive")
        if min(self.lookup_deadline, self.stall_deadline, self.load_deadline) <= 0:
            raise ConfigError("deadlines are seconds and must be positive")
