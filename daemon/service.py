"""What serves one store besides the filesystem's transport, put together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvfs.config import to_toml
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.coder import Coder
from kvfs.daemon.control import ControlServer
from kvfs.daemon.scrub import Scrubber
from kvfs.daemon.view import View
from kvfs.daemon.watch import Watcher
from kvfs.errors import ConfigError
from kvfs.metrics import Metrics
from kvfs.store import Store

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kvfs.config import Config


class Service:
    """Catalog, view, watcher, control socket, metrics page and snapshots of one store.

    ``resumed``: it takes the place of one that died, whose clients are about to connect again.
    """

    def __init__(self, config: Config, resumed: bool) -> None:
        if config.store is None:
            raise ConfigError("no store is named")
        self._coder = None if config.read_only else Coder(config.store)  # first: it forks, and there is no thread yet
        self.metrics = Metrics()
        self._config = config
        self._stop_metrics = self.metrics.serve(config.metrics_listen) if config.metrics_listen else None
        self._store = Store.open(config.store, config.durability)
        make = None if self._coder is None else self._coder.make
        self.catalog = Catalog(self._store, config, self.metrics, resumed, make)
        self.view = View(self.catalog, config, to_toml(config, origins=True), socket_bound=resumed)
        self._watcher = Watcher(self.catalog)
        self._scrubber = Scrubber(self.catalog, config.scrub_rate)
        self._control: ControlServer | None = None
        self._saved = time.monotonic()
        self._watcher.start()
        if not config.read_only:
            self.catalog.evictor.start()
            self.catalog.compactor.start()
        if config.scrub_rate:
            self._scrubber.start()

    def listen(self, listener: socket.socket, reload: Callable[[], object] | None = None) -> None:
        """Answer on the control socket from now on; ``reload`` has another worker take over soon."""
        self._control = ControlServer(self.catalog, listener, reload)
        self._control.start()

    def tick(self) -> None:
        """Save a snapshot if it is time to."""
        if time.monotonic() - self._saved >= self._config.snapshot_interval:
            self.save()
            self._saved = time.monotonic()

    def save(self) -> None:
        """Save a snapshot."""
        self.catalog.save()
        self._scrubber.save()

    def close(self) -> None:
        """End everything, and save."""
        if self._control is not None:
            self._control.close()
        self._watcher.close()
        self._scrubber.close()
        self.catalog.close()
        if self._stop_metrics is not None:
            self._stop_metrics()
        self._store.close()
        if self._coder is not None:
            self._coder.close()
