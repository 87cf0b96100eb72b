"""What serves one store and its tenants besides the filesystem's transport, put together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvfs.config import to_toml
from kvfs.daemon.branch import Branch
from kvfs.daemon.catalog import Catalog
from kvfs.daemon.control import Rules
from kvfs.daemon.forest import Forest
from kvfs.daemon.tenants import Tenants, Whole
from kvfs.daemon.tree import path_of
from kvfs.errors import ConfigError
from kvfs.metrics import Metrics
from kvfs.store import Store

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection

    from kvfs.config import Config
    from kvfs.daemon.coder import Coder
    from kvfs.identity import PartId


class Service:
    """Catalogs, view, control sockets, metrics page and snapshots of one store and its tenants.

    ``resumed``: it takes the place of one that died, whose clients are about to connect again; ``bound``: on the same
    mount, where the control socket is already; ``listening`` names the tenants whose sockets are. Parts are coded by
    ``coder``, which is closed with this; here without one. ``on_gone`` is called with the path of whatever vanishes
    from the view, ``let_go`` with the inode of a file that is not to be kept open.
    """

    def __init__(
        self,
        config: Config,
        resumed: bool,
        coder: Coder | None = None,
        bound: bool = False,
        listening: Collection[str] = (),
    ) -> None:
        if config.store is None:
            raise ConfigError("no store is named")
        self.on_gone: Callable[[str], object] = lambda _: None
        self.let_go: Callable[[int], object] = lambda _: None
        self._store = Store.open(config.store, config.durability, config.is_shared)
        self._coder = coder
        self.metrics = Metrics()
        self._config = config
        self._stop_metrics = self.metrics.serve(config.metrics_listen) if config.metrics_listen else None
        self.catalog = Catalog(self._store, config, self.metrics, resumed, None if coder is None else coder.make)
        self.catalog.on_change(self._changed)
        self.catalog.reader.area.release = lambda source: self._let_go(source[1])
        whole = Whole(coder, self._gone, self._before_slow, self._let_go)
        self.tenants = Tenants(self.catalog, resumed, listening, whole)
        self.view = Forest(self.catalog, config, to_toml(config, origins=True), bound, self.tenants)
        self._branch = Branch(self.catalog)
        self._saved = time.monotonic()

    def _gone(self, path: str) -> None:
        self.on_gone(path)

    def _before_slow(self) -> None:
        self.view.before_slow()

    def _let_go(self, inode: int) -> None:
        self.let_go(inode)

    def _changed(self, event: str, ns: bytes, key: bytes | None, part: PartId | None) -> None:
        if event in {"removed", "changed"} and key is not None and part is not None:
            self.on_gone(path_of(ns, key, part))
        elif event == "retired":
            self.on_gone(f"/{ns.hex()}")

    def listen(self, listener: socket.socket, reload: Callable[[], object] | None = None) -> None:
        """Answer on the control socket from now on; ``reload`` has another worker take over soon."""
        self._branch.listen(listener, Rules(about=self._about), reload)

    def _about(self) -> dict[str, Any]:
        return {"tenants": self.tenants.figures()}

    def tick(self) -> None:
        """Pick up changes of tenants, and save a snapshot if it is time to."""
        self.tenants.follow()
        if time.monotonic() - self._saved >= self._config.snapshot_interval:
            self.save()
            self._saved = time.monotonic()

    def save(self) -> None:
        """Save snapshots."""
        self._branch.save()
        self.tenants.save()

    def close(self) -> None:
        """End everything, and save."""
        self._branch.close()
        self.tenants.close()
        if self._stop_metrics is not None:
            self._stop_metrics()
        self._store.close()
        if self._coder is not None:
            self._coder.close()
