"""One store being served: its catalog, what keeps that true and the store sound, and its control socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfs.daemon.control import ControlServer
from kvfs.daemon.neighbours import Neighbours
from kvfs.daemon.scrub import Scrubber
from kvfs.daemon.watch import Watcher

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.control import Rules


class Branch:
    """A catalog at work, in threads of its own.  The store stays the caller's to close.

    ``follow``: others on this host may use the store behind the daemon's back; nobody does so with a tenant's.
    """

    def __init__(self, catalog: Catalog, follow: bool = True) -> None:
        self.catalog = catalog
        self._watcher = Watcher(catalog, follow)
        others = follow or catalog.store.trash is not None
        self._neighbours = Neighbours(catalog, self._watcher) if others and not catalog.config.read_only else None
        self._scrubber = Scrubber(catalog, catalog.config.scrub_rate)
        self._listener: socket.socket | None = None
        self._control: ControlServer | None = None
        self._watcher.start()
        if self._neighbours is not None:
            self._neighbours.start()
        if not catalog.config.read_only:
            catalog.evictor.start()
            catalog.compactor.start()
        if catalog.config.scrub_rate:
            self._scrubber.start()

    @property
    def listens(self) -> bool:
        """Whether its control socket is answered."""
        return self._control is not None

    def listen(self, listener: socket.socket, rules: Rules, reload: Callable[[], object] | None = None) -> None:
        """Answer on a control socket, which is the branch's from now on; ``reload`` has another worker take over."""
        self._listener = listener
        self._control = ControlServer(self.catalog, listener, reload, rules)
        self._control.start()

    def rule(self, rules: Rules) -> None:
        """Have other rules hold on the control socket."""
        if self._control is not None:
            self._control.rules = rules

    def save(self) -> None:
        """Save snapshots."""
        self.catalog.save()
        self._scrubber.save()

    def close(self) -> None:
        """End everything, and save."""
        if self._control is not None and self._listener is not None:
            self._control.close()
            self._listener.close()
        self._watcher.close()
        self._scrubber.close()
        self.catalog.close()
        if self._neighbours is not None:
            self._neighbours.close()
