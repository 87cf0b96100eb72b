"""The worker: the process that answers for a mount. It may die at any moment; the keeper starts the next one."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from kvfs.daemon import sandbox
from kvfs.daemon.coder import Coder
from kvfs.daemon.fuse import connection
from kvfs.daemon.fuse.abi import Init
from kvfs.daemon.fuse.nodes import Nodes
from kvfs.daemon.fuse.passthrough import Borrower, Lender, privileged
from kvfs.daemon.fuse.session import Session
from kvfs.daemon.handover import Channel, dump_error, load_config, orders
from kvfs.daemon.logs import log_to_stderr
from kvfs.daemon.service import Service
from kvfs.daemon.tree import tenant_path
from kvfs.errors import KvfsError, MountError

if TYPE_CHECKING:
    from pathlib import Path

    from kvfs.config import Config

log = logging.getLogger(__name__)

PING_EVERY: Final = 1.0
STUCK: Final = 30.0
"""Seconds after which a session whose every thread is busy with one request counts as hung."""


def run(keeper: Channel) -> int:
    """Serve a mount as the keeper orders, until it says stop, dies, or the mount is gone."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the keeper hears them too, and says when
    spec, fds = orders(keeper, "serve")
    spec |= zip(("fuse", "table", "borrowing"), fds, strict=True)
    config = load_config(spec["config"])
    log_to_stderr(config.log_level)
    try:
        coder = Coder.of(config, functools.partial(sandbox.enter, config))
        sandbox.enter(config)
        serve(config, coder, keeper, spec)
    except KvfsError as e:
        log.error("%s", e)
        keeper.send("error", dump_error(e))
        return e.exit_code
    except Exception:
        log.exception("the worker failed")
        return 1
    return 0


def serve(config: Config, coder: Coder | None, keeper: Channel, spec: dict[str, Any]) -> None:
    """Assemble the parts and run them."""
    service = Service(config, spec["resumed"], coder, spec["bound"], spec["listening"])
    maker = _backing_maker(spec, service.catalog.store.path)
    session = Session(spec["fuse"], service.view, Nodes(spec["table"]), maker, service.metrics, config.threads)

    service.on_gone = lambda path: session.gone([path])
    service.let_go = session.let_go
    session.start()
    if spec["bound"]:
        session.refresh()
    keeper.send("answering")
    threading.Thread(target=_report_end, args=(session, keeper), name="fuse-end", daemon=True).start()
    while (word := (message := keeper.receive(PING_EVERY))[0]) not in {"stop", "leave", "eof"}:
        if word == "listen":
            listener = socket.socket(fileno=message[2][0])
            if message[1] is not None:
                service.tenants.listen(message[1], listener)
            else:
                service.listen(listener, reload=lambda: keeper.send("reload"))
                signal.signal(signal.SIGTERM, lambda *_: keeper.send("reload"))
                keeper.send("serving")
        if not session.stuck(STUCK):
            keeper.send("ping")
        service.tick()
        for name in service.tenants.dropped():
            keeper.send("no-tenant", name)
            session.tree_gone(tenant_path(name))
        for name in service.tenants.wanted():
            keeper.send("tenant", name)
    if word == "leave" or (word == "eof" and spec["managed"]):
        service.save()
        os._exit(0)  # as a crash would: what it has taken and not answered, the next worker is asked again
    if word == "eof" and config.mountpoint is not None:
        log.error("the keeper is gone; unmounting %s", config.mountpoint)
        with contextlib.suppress(MountError):  # without that right its end leaves a mount that says ENOTCONN
            connection.umount(config.mountpoint, lazy=True)
    service.close()


def _backing_maker(spec: dict[str, Any], store: Path) -> Lender | Borrower | None:
    """Who makes backing ids; None where the kernel passes no files through."""
    keeper = socket.socket(fileno=spec["borrowing"])
    if Init.PASSTHROUGH in Init(spec["agreed"]) and not privileged():
        return Borrower(keeper)
    keeper.close()
    return Lender(spec["fuse"], store) if Init.PASSTHROUGH in Init(spec["agreed"]) else None


def _report_end(session: Session, keeper: Channel) -> None:
    session.wait()
    keeper.send("unmounted")


if __name__ == "__main__":
    sys.exit(run(Channel.inherited(int(sys.argv[-1]))))
