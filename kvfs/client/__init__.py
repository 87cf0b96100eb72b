"""One interface to a store, over its mount or over its bare folder."""

import os

from kvfs.client.claims import Lease, LeasedPart, Reservation
from kvfs.client.mount import MountClient
from kvfs.client.store import StoreClient
from kvfs.config import Config
from kvfs.errors import ConfigError

__all__ = ["Client", "Lease", "LeasedPart", "MountClient", "Reservation", "StoreClient", "connect"]

Client = MountClient | StoreClient


def connect(
    *,
    mount: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    upkeep: Config | None = None,
) -> Client:
    """A client of the store mounted at ``mount``, or of the folder ``store``: exactly one of them.

    ``upkeep``: the settings by which it takes part in the upkeep of a bare folder.

    Touches neither: the first call does, within its deadline.
    """
    if mount is not None and store is None:
        return MountClient(mount)
    if store is not None and mount is None:
        return StoreClient(store, upkeep=upkeep)
    raise ConfigError("name the mount or the store: one of them")
