"""The daemon among the other users of its store: what they tell reaches the index, what is evicted is the janitor's."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from kvfs.errors import KvfsError
from kvfs.upkeep.listing import differences
from kvfs.upkeep.member import Member

if TYPE_CHECKING:
    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.watch import Watcher
    from kvfs.upkeep.bulletin import News
    from kvfs.upkeep.office import Pace

log = logging.getLogger(__name__)


class Neighbours:
    """Makes a catalog a member, under the name of its host: there is one daemon of a store on each.

    On a local store inotify (``watcher``) tells of files that come and go; on a shared one their makers do.
    """

    def __init__(self, catalog: Catalog, watcher: Watcher, pace: Pace | None = None) -> None:
        self._catalog, self._watcher = catalog, watcher
        self.member = Member(
            catalog.store,
            socket.gethostname(),
            catalog.leases,
            catalog.bulletin,
            catalog.index.pinned,
            self._hear,
            pace,
        )
        catalog.join(self.member)

    def start(self) -> None:
        """Begin."""
        self.member.start()

    def close(self) -> None:
        """Leave."""
        self.member.close()

    def _hear(self, news: News) -> None:
        for ns, key in news.used:
            with contextlib.suppress(KvfsError):  # a namespace that is not here any more
                self._catalog.index.touch(ns, [key])
        if self._catalog.store.trash is None:
            return
        if news.missed:
            self._watcher.list_soon()
        catalog = self._catalog
        try:
            for ns in {ns for ns, _ in news.changed} - set(catalog.index.namespaces()):
                log.debug("%s is new", ns.hex()[:12])
                self._watcher.list_soon()
            for found in differences(catalog.store, catalog.index, news.changed):
                catalog.refresh(found.ns, found.key, found.part, found.coded)
        except (KvfsError, OSError) as e:
            log.debug("%s: %s", catalog.store.path, e)
            self._watcher.list_soon()
