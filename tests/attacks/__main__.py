"""Write every attack that is bytes to a file of its own: ``python -m tests.attacks FOLDER``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from tests.attacks import derived, frames, headers, manifests

KINDS: Final[dict[str, dict[str, bytes]]] = {
    "header": headers.ATTACKS,
    "sealed-header": {name: headers.seal(raw) for name, raw in headers.ATTACKS.items()},
    "manifest": {name: text.encode() for name, text in manifests.ATTACKS.items()},
    "snapshot": derived.SNAPSHOTS,
    "verified": derived.CHECKED,
    "note": derived.NOTES,
    "frame": frames.ATTACKS,
}


def main() -> None:
    """Write them all."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for kind, attacks in KINDS.items():
        for name, raw in attacks.items():
            (folder / f"{kind}.{re.sub(r'[^a-z0-9]+', '-', name.lower())}").write_bytes(raw)


if __name__ == "__main__":
    main()
