"""Who may use how much of one filesystem: the budget of a store, divided among the store itself and its tenants.

Each tenant's budget is a part of the store's, set aside for it; the store keeps the rest for its own chunks.  Where
there is less room than that, since others fill the disk, the store gives way first; what is then left is the tenants',
in proportion.  What one of them uses is in none of these figures but its own, so none makes another evict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfs.upkeep.evict import END

if TYPE_CHECKING:
    from kvfs.daemon.catalog import Catalog
    from kvfs.kinds import Amount


class Shares:
    """The parties of one filesystem: the store, and the tenants that have joined."""

    def __init__(self, store: Catalog) -> None:
        self._store = store
        self._tenants: dict[str, tuple[Catalog, Amount]] = {}

    def join(self, name: str, catalog: Catalog, budget: Amount) -> None:
        """Hold a tenant to its budget from now on, in place of an earlier one, and the store to what is left."""
        self._tenants = {**self._tenants, name: (catalog, budget)}
        catalog.evictor.allowance = lambda total, free: self._granted(budget.of(total), total, free)
        self._store.evictor.allowance = self._rest

    def leave(self, name: str) -> None:
        """A tenant is gone."""
        self._tenants = {other: party for other, party in self._tenants.items() if other != name}
        if not self._tenants:
            self._store.evictor.allowance = None

    def _granted(self, nbytes: int, total: int, free: int) -> int:
        return int(nbytes * min(1.0, self._room(total, free) / max(1, self._promised(total))))

    def _rest(self, total: int, free: int) -> int:
        return max(0, self._room(total, free) - self._promised(total))

    def _promised(self, total: int) -> int:
        return sum(budget.of(total) for _, budget in self._tenants.values())

    def _room(self, total: int, free: int) -> int:
        """Bytes for all parties together, whoever of them has them now."""
        parties = [self._store, *(catalog for catalog, _ in self._tenants.values())]
        used = sum(catalog.index.totals()[1] for catalog in parties)
        kept = int(self._store.evictor.floor() * END)
        return max(0, min(self._store.config.budget.of(total), used + free - kept))
