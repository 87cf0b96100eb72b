"""The tenants of a store that is served: each has a catalog, a view and a control socket of its own.

Records that appear, change or vanish are followed without a restart. Nothing of one tenant depends on what another
has stored: not its answers, nor the time they take, nor its limits.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvfs import tenants
from kvfs.daemon.branch import Branch
from kvfs.daemon.control import Rules
from kvfs.daemon.incoming import refusal
from kvfs.daemon.public import TenantCatalog
from kvfs.daemon.shares import Shares
from kvfs.daemon.tree import SOCKET, path_of, tenant_path
from kvfs.daemon.view import View
from kvfs.errors import KvfsError
from kvfs.kinds import Amount
from kvfs.metrics import Metrics
from kvfs.store import Store

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection

    from kvfs.config import Config
    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.coder import Coder
    from kvfs.identity import PartId
    from kvfs.tenants import Tenant

log = logging.getLogger(__name__)

CONNECTIONS: Final = 256
FILES: Final = 1024
"""Of one tenant: connections, each of which costs a thread, and files being written."""
AGAIN: Final = 5.0
"""Seconds after which a socket is asked for again, and a tenant that could not be served is tried again."""
GRACE: Final = 60.0
"""Seconds after the end of a tenant in which its descriptors stay open: a thread may be about to use their numbers."""


@dataclasses.dataclass
class Served:
    """One tenant at work."""

    tenant: Tenant
    secret: bytes
    store: Store
    catalog: TenantCatalog
    branch: Branch
    view: View
    asked: float = 0.0
    """When its socket was asked for, in monotonic seconds."""


class Whole(NamedTuple):
    """What tenants have in common: the process that codes parts, if there is one; whom to tell of a path in the mount
    that is gone; `View.before_slow`; whom to ask to let go of a file, by its inode."""

    coder: Coder | None
    gone: Callable[[str], None]
    before_slow: Callable[[], None]
    let_go: Callable[[int], None]


class Tenants:
    """All tenants of the store of ``root``; ``listening`` names those whose sockets an earlier worker has served."""

    def __init__(self, root: Catalog, resumed: bool, listening: Collection[str], whole: Whole) -> None:
        self._root, self._resumed, self._listening = root, resumed, set(listening)
        self._whole = whole
        self._shares = Shares(root)
        self._served: dict[str, Served] = {}
        self._dropped: list[str] = []
        self._ending: dict[str, tuple[Served, threading.Thread]] = {}
        self._ended: list[tuple[float, Served]] = []
        self._failed: dict[str, float] = {}
        self._seen = -1
        self.follow()
        self._resumed = False

    # --- for the view ---

    def names(self) -> list[str]:
        """Those that are served."""
        return sorted(self._served)

    def at(self, name: str) -> tuple[View, Tenant]:
        """The view of a tenant, and its record; ENOENT."""
        served = self._served.get(name)
        if served is None:
            raise refusal(errno.ENOENT)
        return served.view, served.tenant

    def statfs(self, name: str, block: int) -> dict[str, int]:
        """What a tenant may use, and what is left of it, in blocks of ``block`` bytes; nothing of what others use."""
        total, free = (count // block for count in self._served[name].catalog.room())
        return {"f_blocks": total, "f_bfree": free, "f_bavail": free, "f_files": 0, "f_ffree": 0}

    # --- coming and going ---

    def follow(self) -> None:
        """Pick up records that have come, changed or gone."""
        self._tidy()
        try:
            seen = os.stat(self._root.store.path / tenants.FOLDER).st_mtime_ns
        except FileNotFoundError:
            seen = 0
        retry = any(time.monotonic() - when > AGAIN for when in self._failed.values())
        if seen == self._seen and not retry:
            return
        self._seen = seen
        present = tenants.names(self._root.store.path)
        for name in present:
            try:
                self._take_in(tenants.load(self._root.store.path, name))
                self._failed.pop(name, None)
            except (KvfsError, OSError) as e:
                if name not in self._failed:
                    log.error("the record of tenant %s is not followed: %s", name, e)
                self._failed[name] = time.monotonic()
        for name in self._served.keys() - set(present):
            self._drop(self._served[name])
        self._failed = {name: when for name, when in self._failed.items() if name in present}

    def _take_in(self, tenant: Tenant) -> None:
        served = self._served.get(tenant.name)
        if served is not None and tenants.read_secret(self._root.store.path, tenant.name) != served.secret:
            self._drop(served)  # removed, and made again, between two looks
            served = None
        if tenant.name in self._ending:
            self._seen = -1  # look again
            return
        if served is None:
            served = self._start(tenant)
            self._served = {**self._served, tenant.name: served}
        elif served.tenant == tenant:
            return
        served.tenant = tenant
        served.branch.rule(self._rules(served))
        self._shares.join(tenant.name, served.catalog, tenant.budget)
        served.catalog.evictor.wake()

    def _start(self, tenant: Tenant) -> Served:
        path, name = self._root.store.path, tenant.name
        secret = tenants.read_secret(path, name)
        store = Store.open(tenants.place(path, name), self._root.config.durability, self._root.config.is_shared)
        try:
            store.lock_daemon(f"the daemon of {path} (pid {os.getpid()})")
            config, coder = self._config_of(tenant, store), self._whole.coder
            make = functools.partial(coder.make, tenant=name) if coder else None
            catalog = TenantCatalog(store, config, Metrics(), self._resumed, make, self._public_of(name))
        except BaseException:
            store.close()
            raise

        def gone(event: str, ns: bytes, key: bytes | None, part: PartId | None) -> None:
            if event in {"removed", "changed"} and key is not None and part is not None:
                self._whole.gone(tenant_path(name, path_of(ns, key, part)))
            elif event == "retired":
                self._whole.gone(tenant_path(name, f"/{ns.hex()}"))

        catalog.on_change(gone)
        catalog.reader.area.release = lambda source: self._whole.let_go(source[1])
        about = "".join(f'{key} = "{value}"\n' for key, value in tenant.to_json().items())
        view = View(catalog, config, about, socket_bound=name in self._listening)
        view.before_slow = self._whole.before_slow
        asked = time.monotonic() if name in self._listening else 0.0
        return Served(tenant, secret, store, catalog, Branch(catalog, follow=False), view, asked)

    def _config_of(self, tenant: Tenant, store: Store) -> Config:
        """The daemon's settings, for one tenant: its part of what is shared, none that speak of one file or port."""
        config, space = self._root.config, os.statvfs(store.path)
        total = space.f_blocks * space.f_frsize
        part = min(1.0, tenant.budget.of(total) / max(1, config.budget.of(total)))
        writes = config.write_budget and Amount(int(config.write_budget.of(total) * part), 0.0)
        return dataclasses.replace(
            config,
            store=store.path,
            budget=tenant.budget,
            namespace_budgets=(),
            write_budget=writes,
            quarantine_limit=int(config.quarantine_limit * part),
            hydrate_limit=int(config.hydrate_limit * part),
            compact_share=config.compact_share * part,
            scrub_rate=int(config.scrub_rate * part) and max(1 << 16, int(config.scrub_rate * part)),
            trace=None,
            metrics_listen=None,
        )

    def _public_of(self, name: str) -> Callable[[], Catalog | None]:
        def public() -> Catalog | None:
            served = self._served.get(tenants.PUBLIC)
            return served.catalog if served is not None and name != tenants.PUBLIC else None

        return public

    def _drop(self, served: Served) -> None:
        """Serve a tenant no more. Its work ends in a thread, as it may take longer than a worker may be silent."""
        name = served.tenant.name
        self._served = {other: each for other, each in self._served.items() if each is not served}
        self._shares.leave(name)
        self._dropped.append(name)
        self._listening.discard(name)
        closing = threading.Thread(target=served.branch.close, name=f"kvfs-end-{name}")
        self._ending[name] = served, closing
        closing.start()

    def _tidy(self) -> None:
        """See to tenants that are gone: their descriptors are closed when nobody can be about to use them."""
        for name, (served, closing) in list(self._ending.items()):
            if not closing.is_alive():
                del self._ending[name]
                self._ended.append((time.monotonic(), served))
                log.info("tenant %s is gone", name)
        while self._ended and time.monotonic() - self._ended[0][0] > GRACE:
            self._release(self._ended.pop(0)[1])

    @staticmethod
    def _release(served: Served) -> None:
        served.view.close()
        served.store.close()

    # --- sockets ---

    def wanted(self) -> list[str]:
        """Tenants whose sockets have to be bound, now or again."""
        now = time.monotonic()
        wanted = [s for s in self._served.values() if not s.branch.listens and now - s.asked > AGAIN]
        for served in wanted:
            if served.asked:  # what came of it is not known
                served.view.forget_socket()
                self._whole.gone(tenant_path(served.tenant.name, SOCKET))
            served.asked = now
        return [served.tenant.name for served in wanted]

    def dropped(self) -> list[str]:
        """Tenants whose sockets are of no use any more; each is told once."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def listen(self, name: str, listener: socket.socket) -> None:
        """Serve a tenant on its socket. That decides who the peer is: a container's root is no more than its users."""
        served = self._served.get(name)
        if served is None or served.branch.listens:
            listener.close()
            return

        served.branch.listen(listener, self._rules(served))

    def _rules(self, served: Served) -> Rules:
        def salts() -> tuple[bytes, bytes]:
            public = self._served.get(tenants.PUBLIC)
            return served.secret, public.secret if public is not None and public is not served else b""

        name, admins = served.tenant.name, frozenset({0, served.tenant.uid})
        return Rules(admins, CONNECTIONS, FILES, salts, lambda: {"tenant": name})

    # --- the rest ---

    def figures(self) -> list[dict[str, Any]]:
        """What each tenant is, may use and uses; bytes."""
        rows = []
        ending = {name: served for name, (served, _) in self._ending.items()}
        for name, served in sorted((ending | self._served).items()):
            catalog = served.catalog
            chunks, used = catalog.index.totals()
            rows.append(
                {
                    "name": name,
                    **served.tenant.to_json(),
                    "limit": catalog.room()[0],
                    "chunks": chunks,
                    "bytes": used,
                    "listens": served.branch.listens,
                }
            )
        return rows

    def save(self) -> None:
        """Save snapshots."""
        for served in self._served.values():
            served.branch.save()

    def close(self) -> None:
        """End all, and save."""
        for served in self._served.values():
            served.branch.close()
        for _, closing in self._ending.values():
            closing.join()
        ended = [*(each for each, _ in self._ending.values()), *(each for _, each in self._ended)]
        for served in (*self._served.values(), *ended):
            self._release(served)
