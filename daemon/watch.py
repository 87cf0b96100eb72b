"""What others do to the store behind the daemon's back: files that appear and vanish reach the index.

inotify (through watchdog) names them within a second.  It can lose events, run out of watches, and sees nothing of
what other hosts do, so it is only the fast path: a listing of the store, now and then, is what counts.
"""

import errno
import logging
import os
import threading
import time
from pathlib import Path

from watchdog.events import (
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from kvfs.daemon.catalog import Catalog
from kvfs.errors import KvfsError
from kvfs.names import is_ns, leaf_name, parse_file_name
from kvfs.network import is_network

__all__ = ["Watcher"]

log = logging.getLogger(__name__)

SETTLE = 0.1
"""Seconds between an event and its reading: the events of our own publishing are old news by then."""
LIST_EVERY = 60.0
"""Seconds between listings beside inotify."""
LIST_EVERY_ALONE = 2.0
"""Seconds between listings without it."""
LISTING_SHARE = 0.005
"""Of the time, at most, goes into listing beside inotify: a large store is listed less often."""
LISTING_SHARE_ALONE = 0.02
"""The same without it."""
MAX_EVENTS = 8192
"""Beyond so many files in one go a listing is cheaper, and the kernel's queue of twice that may have run over."""
_MAX_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    DirMovedEvent,
    DirDeletedEvent,
]


class Watcher(FileSystemEventHandler):
    """Keeps a catalog's index true to its store, from threads of its own; `start` does not wait for anything."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._root = os.fspath(catalog.store.path)
        self._wake = threading.Condition()  # guards the next three
        self._paths: set[str] = set()
        self._list = True
        self._stopping = False
        self._next = 0.0  # when to list, monotonic seconds
        self._observer: InotifyObserver | None = None
        self._thread = threading.Thread(target=self._run, name="kvfs-watch", daemon=True)

    def start(self) -> None:
        """Begin: list the store once and follow what happens to it from before that on."""
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Note a path to look at.  Runs in watchdog's thread."""
        with self._wake:
            if event.is_directory:  # a folder moved away takes its files with it, without a word about them
                self._list |= is_ns(Path(os.fsdecode(event.src_path)).name)
            else:
                self._paths |= {os.fsdecode(p) for p in (event.src_path, event.dest_path) if p}
            if len(self._paths) > MAX_EVENTS:
                self._paths.clear()
                self._list = True
            self._wake.notify()

    def _run(self) -> None:
        alone = not self._observe() or is_network(self.catalog.store.path)
        try:
            pause = 0.0
            while self._wait(pause):
                if alone:
                    pause = self._look(LIST_EVERY_ALONE, LISTING_SHARE_ALONE)
                else:
                    pause = self._look(LIST_EVERY, LISTING_SHARE)
        finally:
            if self._observer is not None:
                self._observer.stop()
                self._observer.join()

    def _observe(self) -> bool:
        """Start inotify; False where it is not to be had."""
        observer = None
        try:
            self._fits()
            observer = InotifyObserver()
            observer.schedule(self, self._root, recursive=True, event_filter=_EVENTS)
            observer.start()
        except OSError as e:
            log.info("no inotify on %s (%s); listing it every %g s instead", self._root, e.strerror, LIST_EVERY_ALONE)
            if observer is not None:
                observer.stop()
            return False
        self._observer = observer
        return True

    def _fits(self) -> None:
        """OSError if the folders are more than there may be watches: watchdog would leave some out in silence."""
        limit = int(_MAX_WATCHES.read_text())
        spaces = [name for name in os.listdir(self._root) if is_ns(name)]
        folders = sum(1 + len(os.listdir(os.path.join(self._root, name))) for name in spaces)
        if folders > limit:
            raise OSError(errno.ENOSPC, f"{folders} folders, and fs.inotify.max_user_watches is {limit}")

    def _wait(self, pause: float) -> bool:
        """Until there is something to look at, or ``pause`` is over; False when it is time to stop."""
        with self._wake:
            if not self._wake.wait_for(lambda: self._stopping or self._paths or self._list, pause):
                self._list = True
            self._wake.wait_for(lambda: self._stopping, SETTLE)
            return not self._stopping

    def _look(self, every: float, share: float) -> float:
        """Bring the index up to date; returns seconds until the next listing."""
        with self._wake:
            paths, self._paths = self._paths, set()
            everything, self._list = self._list, False
        begun = time.monotonic()
        if everything:
            try:
                found, gone = self.catalog.reconcile()
            except (KvfsError, OSError) as e:
                log.warning("cannot list %s: %s", self._root, e)
            else:
                log.debug("listed %s: %d parts found, %d gone", self._root, found, gone)
            self._next = begun + max(every, (time.monotonic() - begun) / share)
        else:
            for path in paths:
                self._refresh(Path(path))
        return max(0.0, self._next - time.monotonic())

    def _refresh(self, path: Path) -> None:
        named = parse_file_name(path.name)
        ns = path.parent.parent.name
        if named is None or not is_ns(ns) or path.parent.name != leaf_name(named[0]):
            return
        try:
            self.catalog.refresh(bytes.fromhex(ns), *named)
        except (KvfsError, OSError) as e:
            log.debug("%s: %s", path, e)
