"""The view of a store with tenants: its own tree, and below ``/tenants`` the whole tree of each tenant.

A tenant's tree has its owner and mode, and is what its containers bind: they see nothing else of the mount. The folder
above can be entered by those who know a name, and listed by root alone.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from typing import TYPE_CHECKING, Any, Final

from kvfs.daemon.incoming import refusal
from kvfs.daemon.tree import SOCKET, TENANTS
from kvfs.daemon.view import FOREVER, View, attributes
from kvfs.tenants import FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfs.config import Config
    from kvfs.daemon.catalog import Catalog
    from kvfs.daemon.tenants import Tenants
    from kvfs.tenants import Tenant

MODE: Final = 0o711
KNOWN: Final = 60
"""Seconds for which the kernel may believe that a tenant is there, and whose its files are."""

PASSED_ON: Final = (
    "chmod",
    "create",
    "flush",
    "fsync",
    "keep",
    "mknod",
    "open",
    "open_file",
    "read",
    "readlink",
    "seen",
    "setxattr",
    "truncate",
    "unlink",
    "write",
)
"""Methods of `View` that a tree answers by itself, given the path in it."""


class Forest(View):
    """The view of a store and its tenants; each of theirs is a `View` too, in which paths begin anew."""

    def __init__(
        self, catalog: Catalog, config: Config, config_text: str, socket_bound: bool, tenants: Tenants
    ) -> None:
        super().__init__(catalog, config, config_text, socket_bound)
        self._tenants = tenants

    def _find(self, path: str) -> tuple[View, str, Tenant | None]:
        """The view that a path leads into, the path in it, and whose that is."""
        if not path.startswith(f"{TENANTS}/"):
            return self, path, None
        name, _, rest = path[len(TENANTS) + 1 :].partition("/")
        view, tenant = self._tenants.at(name)
        return view, f"/{rest}", tenant

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """As of a `View`; what lies in a tenant's tree is the tenant's."""
        view, inner, tenant = self._find(path)
        if tenant is not None:
            return owned(view.getattr(inner, fh), inner, tenant)
        if path != TENANTS:
            return super().getattr(path, fh)
        if not self._tenants.names():
            raise refusal(errno.ENOENT)
        return attributes(os.lstat(self._catalog.store.path), stat.S_IFDIR | MODE)

    def unlinked(self, path: str, size: int, mtime: int) -> dict[str, int]:
        """As of a `View`; of a tenant that is gone too."""
        try:
            _, inner, tenant = self._find(path)
        except FileNotFoundError:
            tenant = None
        st = super().unlinked(path, size, mtime)
        return st if tenant is None else owned(st, inner, tenant)

    def lifetime(self, path: str) -> tuple[int, int]:
        """As of a `View`."""
        view, inner, tenant = self._find(path)
        if tenant is not None:
            names, attrs = view.lifetime(inner)
            return KNOWN if inner == "/" else names, min(KNOWN, attrs)
        return (FOREVER, KNOWN) if path == TENANTS else super().lifetime(path)

    def readdir(self, path: str, fh: int | None = None) -> list[tuple[str, int]]:
        """As of a `View`."""
        view, inner, tenant = self._find(path)
        if tenant is not None:
            return view.readdir(inner, fh)
        if path == TENANTS:
            return [(name, stat.S_IFDIR) for name in (".", "..", *self._tenants.names())]
        names = super().readdir(path, fh)
        return [*names, (FOLDER, stat.S_IFDIR)] if path == "/" and self._tenants.names() else names

    def statfs(self, path: str) -> dict[str, int]:
        """As of a `View`; of a tenant's tree: its budget, and what is left of it."""
        st, (_, _, tenant) = super().statfs(path), self._find(path)
        return st if tenant is None else st | self._tenants.statfs(tenant.name, st["f_frsize"])

    def listxattr(self, path: str) -> list[str]:
        """As of a `View`."""
        view, inner, tenant = self._find(path)
        if tenant is not None:
            return view.listxattr(inner)
        return [] if path == TENANTS else super().listxattr(path)

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        """As of a `View`."""
        view, inner, tenant = self._find(path)
        if path == TENANTS:
            raise refusal(errno.ENODATA)
        return super().getxattr(path, name) if tenant is None else view.getxattr(inner, name, position)

    def release(self, path: str, fh: int) -> int:
        """As of a `View`; a tenant that is gone has let go of its handles."""
        try:
            view, inner, tenant = self._find(path)
        except FileNotFoundError:
            return 0
        return super().release(path, fh) if tenant is None else view.release(inner, fh)

    def mkdir(self, path: str, mode: int) -> int:
        """As of a `View`; a tenant is made by `kvfs tenant add`."""
        if os.path.dirname(path) == TENANTS:
            raise refusal(errno.EROFS)
        view, inner, tenant = self._find(path)
        return super().mkdir(path, mode) if tenant is None else view.mkdir(inner, mode)


def _passed_on(name: str) -> Callable[..., Any]:
    method = getattr(View, name)

    @functools.wraps(method)
    def call(self: Forest, path: str, *args: Any) -> Any:
        view, inner, _ = self._find(path)
        return method(view, inner, *args)

    return call


for _name in PASSED_ON:
    setattr(Forest, _name, _passed_on(_name))


def owned(st: dict[str, int], path: str, tenant: Tenant) -> dict[str, int]:
    """Attributes of what lies at ``path`` of a tenant's tree: its owner's, and nobody's whom its mode leaves out."""
    kind, mode = stat.S_IFMT(st["st_mode"]), stat.S_IMODE(st["st_mode"])
    if path == "/":
        mode = tenant.mode
    elif path == SOCKET:
        mode = 0o666
    if kind != stat.S_IFLNK:
        mode &= 0o770 if tenant.mode & 0o070 else 0o700
    return st | {"st_mode": kind | mode, "st_uid": tenant.uid, "st_gid": tenant.gid}
