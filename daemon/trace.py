"""A record of lookups and stores, one JSON object a line, for `kvfs sim --trace`.

It holds the first 8 bytes of each key, which say nothing of a text to anyone who does not have the text, and no tokens.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from kvfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvfs.chunk import PartMeta

log = logging.getLogger(__name__)

FORMAT: Final = {"kvfs-trace": 1}
ID_BYTES: Final = 8
MAX_BYTES: Final = 1 << 30
REPEAT: Final = 1.0
"""Seconds in which the same lookup is recorded once: engines ask again and again for a request that waits."""


class Trace:
    """Appends to a file until it has `MAX_BYTES`. Thread-safe. ConfigError if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._file = path.open("a", encoding="ascii")
        except OSError as e:
            raise ConfigError(f"trace = {path}: {e.strerror}") from None
        self._last: dict[tuple[bytes, bytes], float] = {}
        if self._file.tell() == 0:
            self._write(FORMAT)

    def looked(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """Somebody has looked for these chunks, in the order of a text, or for tails that may continue one."""
        now = time.time()
        if not keys:
            return
        with self._lock:
            if now - self._last.get((ns, keys[-1]), 0.0) < REPEAT:
                return
            if len(self._last) >= 1024:
                self._last.clear()
            self._last[ns, keys[-1]] = now
        ids = base64.b64encode(b"".join(key[:ID_BYTES] for key in keys)).decode()
        self._write({"t": round(now, 2), "ns": ns.hex()[:16], "look": ids})

    def stored(self, meta: PartMeta, nbytes: int) -> None:
        """A part of ``nbytes`` has been stored."""
        key, parent = (base64.b64encode(each[:ID_BYTES]).decode() for each in (meta.key, meta.parent))
        fields = {"tokens": meta.tokens, "position": meta.position, "part": str(meta.part)}
        event = {"t": round(time.time(), 2), "ns": meta.ns.hex()[:16], "store": key, "parent": parent, "bytes": nbytes}
        self._write(event | fields)

    def close(self) -> None:
        """Write what is left in memory."""
        with self._lock:
            self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.write(json.dumps(event, separators=(",", ":")) + "\n")
                if self._file.tell() > MAX_BYTES:
                    log.info("%s is full; no more is recorded", self._file.name)
                    self._file.close()
