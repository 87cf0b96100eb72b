"""A tenant's catalog: within its limits, and with the chunks of the public tenant, to be read and nothing else.

Keys of the two never meet, as each has a salt of its own. What is public is handed out without a claim: whoever reads
it cannot keep the operator from removing it, and reads on all the same, as open files outlive their names.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from kvfs.daemon.catalog import Catalog
from kvfs.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from kvfs.config import Config
    from kvfs.daemon.compact import Make
    from kvfs.identity import Manifest, PartId
    from kvfs.metrics import Metrics
    from kvfs.store import Store
    from kvfs.verify import Opened

MAX_NAMESPACES: Final = 256
"""Namespaces of one tenant: each costs folders and memory that no budget counts."""


class TenantCatalog(Catalog):
    """``public`` gives the catalog of the public tenant, or None while there is none."""

    def __init__(
        self,
        store: Store,
        config: Config,
        metrics: Metrics,
        resumed: bool,
        make: Make | None,
        public: Callable[[], Catalog | None],
    ) -> None:
        super().__init__(store, config, metrics, resumed, make)
        self._public = public

    def register(self, manifest: Manifest, info: Mapping[str, Any] | None = None) -> bytes:
        """As of a `Catalog`; StoreFull for a tenant with too many namespaces."""
        present = self.index.namespaces()
        if len(present) >= MAX_NAMESPACES and manifest.ns not in present:
            raise StoreFull(f"more than {MAX_NAMESPACES} namespaces of one tenant", "clients")
        return super().register(manifest, info)

    def _readable(self, ns: bytes) -> Catalog | None:
        """The public catalog, if it knows the namespace."""
        public = self._public()
        return public if public is not None and ns in public.index.namespaces() else None

    def lookup(self, ns: bytes, keys: Sequence[bytes]) -> list[int]:
        """As of a `Catalog`."""
        masks = super().lookup(ns, keys)
        public = self._readable(ns)
        if public is None:
            return masks
        return [own or other for own, other in zip(masks, public.index.look(ns, keys), strict=True)]

    def _lent(self, ns: bytes, keys: Sequence[bytes]) -> tuple[Catalog | None, set[bytes]]:
        """The public catalog, and which of these chunks only it has."""
        public = self._readable(ns)
        if public is None:
            return None, set()
        absent = [key for key, mask in zip(keys, self.index.masks(ns, keys), strict=True) if not mask]
        return public, {key for key, mask in zip(absent, public.index.masks(ns, absent), strict=True) if mask}

    def lease(
        self, holder: Hashable, lease: int, ns: bytes, refs: Sequence[tuple[bytes, PartId]], coded: bool = False
    ) -> list[Opened]:
        """As of a `Catalog`; chunks that only the public tenant has are opened and not claimed."""
        public, lent = self._lent(ns, [key for key, _ in refs])
        if public is None or not lent:
            return super().lease(holder, lease, ns, refs, coded)
        reader = object()
        theirs = public.lease(reader, 0, ns, [ref for ref in refs if ref[0] in lent], coded)
        public.leases.drop(reader)
        try:
            own = super().lease(holder, lease, ns, [ref for ref in refs if ref[0] not in lent], coded)
        except BaseException:
            for each in theirs:
                os.close(each.fd)
            raise
        ours, others = iter(own), iter(theirs)
        return [next(others if key in lent else ours) for key, _ in refs]

    def room(self) -> tuple[int, int]:
        """Bytes that the tenant may use, and those of them that it does not."""
        account = self.evictor.accounts[-1]
        return account.limit, max(0, account.limit - self.evictor.used(account))

    def stats(self) -> dict[str, Any]:
        """As of a `Catalog`; how full the disk is would tell what others store."""
        return super().stats() | {"free": self.room()[1]}

    def report(self, holder: Hashable, ns: bytes, key: bytes, part: PartId, reason: str | None) -> bool:
        """As of a `Catalog`.  That a public part is damaged is looked into; that it is whole is not taken on trust."""
        public, lent = self._lent(ns, [key])
        if public is None or not lent:
            return super().report(holder, ns, key, part, reason)
        return reason is not None and public.damaged(ns, key, part, reason)
