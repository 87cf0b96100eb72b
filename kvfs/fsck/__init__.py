"""Check a store that no daemon serves, and repair what can be: from the marker down to single parts.

The tree is walked once.  Payload is not read, except to copy a part out of a hard link, or on request.  Nothing that
may be somebody's data is deleted: it goes to ``lost+found`` with the reason.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from kvfs import tenants
from kvfs.errors import NotAStore
from kvfs.files import from_os_error
from kvfs.fsck import chunks, derived, folders, tenancy
from kvfs.fsck.findings import Finding, Repairs
from kvfs.fsck.parts import Parts
from kvfs.store import Store

__all__ = ["Finding", "Fsck"]


class Fsck:
    """One check of the store at ``path``; `run` yields what it finds as it repairs it.

    ``dry_run`` changes nothing.  ``data``: read all payload too.  ``repair_orphans``: remove chunks that cannot be
    reached since their parent is gone.
    """

    def __init__(self, path: Path, *, dry_run: bool = False, data: bool = False, repair_orphans: bool = False) -> None:
        self._path, self._dry_run, self._data, self._repair_orphans = path, dry_run, data, repair_orphans
        self._parts_of_tenants = self._bytes_of_tenants = 0
        try:
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise NotAStore(path, path) from None
        except OSError as e:
            raise from_os_error(e, path) from e
        self._store = Store(path, root, "relaxed")
        self._repairs = Repairs(self._store, root, dry_run)
        self._parts = Parts(self._repairs, data)
        self._locks: list[int] = []

    @property
    def parts(self) -> int:
        """Sound parts met so far."""
        return self._parts.count + self._parts_of_tenants

    @property
    def bytes(self) -> int:
        """Bytes of their files."""
        return self._parts.bytes + self._bytes_of_tenants

    def run(self) -> Iterator[Finding]:
        """Check and repair everything.

        Raises NotAStore for a folder that never was a store, IdentityError for one of another format, StoreBusy for
        one that a daemon serves, on this host or, on a shared volume, another.
        """
        repairs = self._repairs
        evidence = folders.read_marker(repairs)
        yield from derived.take_locks(repairs, self._locks)
        yield from folders.write_marker(repairs, evidence)
        index = derived.Snapshot(repairs)
        yield from index.compare()
        yield from folders.walk(repairs, self._parts)
        for ns, rows in self._parts.chunks.items():
            yield from chunks.incomplete(repairs, ns, rows)
            yield from chunks.orphans(repairs, ns, rows, self._repair_orphans)
        yield from derived.check(repairs)
        index.update()
        yield from tenancy.check(repairs)
        for name in tenants.names(self._path):
            yield from self._tenant(name)

    def _tenant(self, name: str) -> Iterator[Finding]:
        """Check the store of a tenant as one by itself."""
        options = {"dry_run": self._dry_run, "data": self._data, "repair_orphans": self._repair_orphans}
        with contextlib.suppress(NotAStore), Fsck(tenants.place(self._path, name), **options) as check:
            for each in check.run():
                yield each._replace(path=f"{tenants.FOLDER}/{name}/{each.path}")
            self._parts_of_tenants += check.parts
            self._bytes_of_tenants += check.bytes

    def close(self) -> None:
        """Let daemons have the store again."""
        self._store.close()
        for fd in self._locks:
            os.close(fd)
        self._locks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
