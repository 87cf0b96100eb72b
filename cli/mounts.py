"""Where stores are mounted, and what a folder lies on, by the mount table: no mount is touched to find out."""

from __future__ import annotations

import os
from pathlib import Path

from kvfs.daemon.fuse import connection
from kvfs.errors import MountError


def filesystem_of(folder: Path) -> str:
    """Return the type of the filesystem that ``folder`` lies on; it need not exist."""
    real = Path(os.path.realpath(folder))
    over = [mount for mount in connection.mounts() if real == mount.point or mount.point in real.parents]
    return max(reversed(over), key=lambda mount: len(mount.point.parts)).fstype


def mounted_stores() -> list[Path]:
    """Return the mount points of all kvfs mounts."""
    points = [mount.point for mount in connection.mounts() if mount.fstype == connection.FSTYPE]
    return list(dict.fromkeys(points))


def serving(store: Path) -> Path | None:
    """Return the mount point that shows a store, if one does."""
    real = os.path.realpath(store)
    return next((m.point for m in connection.mounts() if (m.fstype, m.source) == (connection.FSTYPE, real)), None)


def store_of(mountpoint: Path) -> Path:
    """Return the folder of the store, or of the tenant's, that a mount shows there; MountError if none does."""
    from kvfs.tenants import FOLDER, place

    there, tenant = connection.mounted_at(mountpoint), ""
    if there is None and mountpoint.parent.name == FOLDER:
        there, tenant = connection.mounted_at(mountpoint.parent.parent), mountpoint.name
    if there is None:
        raise MountError(mountpoint, "nothing is mounted there any more")
    return place(Path(there.source), tenant) if tenant else Path(there.source)


def locate(path: Path) -> tuple[Path, bool]:
    """Return the absolute path without links, and whether a store is mounted there, or a tenant's as part of one."""
    from kvfs.tenants import FOLDER

    stores = mounted_stores()
    for real in (connection.real(path), Path(os.path.realpath(path))):
        if real in stores or (real.parent.name == FOLDER and real.parent.parent in stores):
            return real, True
    return real, False
