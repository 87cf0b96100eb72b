"""The other transport: libfuse through mfusepy, for kernels without passthrough and mounts without privileges.

One process does all. The tree is the same, read-only except for ``rm``; reads go through this process, so its death
ends the mount until its keeper has started the next. Engines map the files they lease, and do not notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib
import logging
import os
import shutil
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from kvfs.daemon.bind import bind
from kvfs.daemon.fuse import connection
from kvfs.daemon.handover import Channel, dump_error, load_config, orders
from kvfs.daemon.logs import log_to_stderr
from kvfs.daemon.tree import SOCKET, tenant_path
from kvfs.errors import ConfigError, KvfsError, MountError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvfs.config import Config
    from kvfs.daemon.view import View

log = logging.getLogger(__name__)

SERVED: Final = (
    "getattr",
    "getxattr",
    "listxattr",
    "mkdir",
    "mknod",
    "open",
    "read",
    "readlink",
    "release",
    "statfs",
    "unlink",
)
REFUSED: Final = (
    "chmod",
    "chown",
    "create",
    "link",
    "removexattr",
    "rename",
    "rmdir",
    "setxattr",
    "symlink",
    "truncate",
    "utimens",
    "write",
)
LIBRARY: Final = "libfuse3.so.3"
TICK: Final = 1.0


def missing() -> str | None:
    """What this host lacks for this transport, and what to do; None if nothing."""
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "without root it takes fusermount3 (package fuse3)"
    try:
        _mfusepy()
    except (ImportError, OSError, AttributeError) as e:
        return f"libfuse cannot be used ({e}); install the packages libfuse3-3 and mfusepy"
    return None


def _mfusepy() -> Any:
    """mfusepy, which loads libfuse as it is imported: version 3 where it is, by its name, as a search is slow."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY)
        os.environ.setdefault("FUSE_LIBRARY_PATH", LIBRARY)
    return importlib.import_module("mfusepy")


class Operations:
    """A view as mfusepy wants it: errors as OSError, types of names as attributes."""

    use_ns = True

    def __init__(self, view: View, started: Callable[[], None]) -> None:
        self._view, self._started = view, started
        for name in SERVED:
            setattr(self, name, _guarded(getattr(view, name)))
        for name in REFUSED:
            setattr(self, name, _refuse)

    def init(self, _path: str) -> None:
        """Called as the kernel's first request is answered."""
        self._started()

    def readdir(self, path: str, _fh: int) -> Iterable[tuple[str, dict[str, int], int]]:
        """Names and types."""
        return [(name, {"st_mode": mode}, 0) for name, mode in _guarded(self._view.readdir)(path)]


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except KvfsError as e:
            raise OSError(e.errno, str(e)) from e

    return call


def _refuse(*_: Any) -> int:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def main() -> int:
    """Mount and serve as the keeper orders (`kvfs.daemon.remounting`) until it is unmounted or a signal comes."""
    keeper = Channel.inherited(int(sys.argv[-1]))
    spec, _ = orders(keeper, "serve")
    config = load_config(spec["config"])
    log_to_stderr(config.log_level)
    try:
        serve(config, keeper, spec["resumed"])
    except KvfsError as e:
        keeper.send("error", dump_error(e))
        return e.exit_code
    return 0


def serve(config: Config, keeper: Channel, resumed: bool) -> None:
    """Mount the store of ``config`` and serve it until it is unmounted, a signal comes or the keeper is gone.

    ``resumed``: clients of an earlier process are about to connect again. Raises MountError.
    """
    # Heavy; who only asks what is missing has no use for them.
    from kvfs.daemon.coder import Coder  # noqa: PLC0415
    from kvfs.daemon.service import Service  # noqa: PLC0415

    point = config.mountpoint
    if point is None:
        raise ConfigError("no mount point is named")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # to libfuse it would mean the end; there is nothing to reload
    service = Service(config, resumed, Coder.of(config))
    stop = threading.Event()
    failed: list[KvfsError] = []

    def attend() -> None:
        """Bind the control socket once the kernel's first request is answered, then watch over the mount."""
        try:
            with bind(point) as listener:
                service.listen(listener)
                keeper.send("serving")
                ours = connection.mounted_at(point)
                while not stop.wait(TICK) and ours in connection.mounts() and keeper.send("ping"):
                    service.tick()
                    for name in service.tenants.wanted():
                        with contextlib.suppress(MountError):  # it is asked for again
                            service.tenants.listen(name, bind(point, tenant_path(name, SOCKET)))
                service.close()
        except KvfsError as e:
            failed.append(e)
        if not stop.is_set():  # unmounted, or no socket: libfuse ends as it does for this signal
            os.kill(os.getpid(), signal.SIGTERM)

    attending = threading.Thread(target=attend, name="kvfs-service")
    words = dict(word.partition("=")[::2] for word in connection.options(config))
    shown = {"fsname": str(service.catalog.store.path), "subtype": "kvfs", **{k: v or True for k, v in words.items()}}
    try:
        _mfusepy().FUSE(Operations(service.view, attending.start), str(point), foreground=True, **shown)
    except RuntimeError as e:
        if attending.ident is None:  # once it serves, an end by a signal is told in this way too
            raise MountError(point, f"libfuse ended with status {e}; its message stands in the log") from None
    finally:
        stop.set()
        if attending.ident is not None:
            attending.join()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    sys.exit(main())
