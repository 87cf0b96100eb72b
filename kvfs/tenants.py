"""The tenants of a store: each is a store of its own below ``tenants/``, with a secret, an owner, and a budget.

    <store>/tenants/<name>/          a whole store, which knows nothing of the others
    <store>/tenants/<name>.json      whose it is and what it may use; a tenant exists as long as this does
    <store>/tenants/<name>.secret    32 random bytes that enter every key; no view shows them

Files stay the store's owner's: the tenant's uid, gid and mode are what the mount shows.  A tenant is kept from the
others by the daemon, so without one nobody but the store's owner has any business here.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfs import marker, retired
from kvfs.config import nearest
from kvfs.errors import ConfigError, TenantNotFound, Unsupported
from kvfs.files import DIR_MODE, OPEN_DIR, from_os_error, make_dir, read_small
from kvfs.identity import canonical_json
from kvfs.kinds import AMOUNT, Amount, one_of
from kvfs.store import Store

__all__ = [
    "FOLDER", "MAX_TENANTS", "MODES", "PUBLIC", "SECRET_MODE", "Tenant", "add", "change", "check", "clear", "enter",
    "forget", "is_name", "load", "make_secret", "make_store", "names", "needs_daemon", "place", "read_secret",
    "record_name", "secret_name", "tenant_of",
]  # fmt: skip

FOLDER = "tenants"
PUBLIC = "public"
"""The tenant whose chunks all others may read; it is the operator's to write."""
MAX_TENANTS = 128
SECRET_BYTES = 32
SECRET_MODE = 0o600
RECORD_MODE = 0o640
MODES = one_of("0700", "0750")
"""What a tenant's folder may be: its user's, or its group's to read too; nobody else's ever."""
FORMAT = "kvfs-tenant/1"
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_MAX_ID = (1 << 32) - 1  # -1 of the kernel's: nobody


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose a subtree is in the mount (``mode`` is 0o700 or 0o750), and what it may use."""

    name: str
    uid: int
    gid: int
    mode: int
    budget: Amount

    def to_json(self) -> dict[str, Any]:
        """As the record has it, but for its format and the name, which is the file's."""
        return {"uid": self.uid, "gid": self.gid, "mode": f"{self.mode:04o}", "budget": AMOUNT.show(self.budget)}


def is_name(name: str) -> bool:
    """Whether a tenant can be called so: a lower-case letter, then up to 31 of those, digits and dashes."""
    return _NAME.fullmatch(name) is not None


def record_name(name: str) -> str:
    """The file that makes a tenant."""
    return f"{name}.json"


def secret_name(name: str) -> str:
    """The file of its secret."""
    return f"{name}.secret"


def place(store: Path, name: str) -> Path:
    """The folder of a tenant's own store."""
    return store / FOLDER / name


def enter(store: Path) -> int:
    """A descriptor of the folder of tenants; FileNotFoundError where there never was one."""
    return os.open(store / FOLDER, OPEN_DIR)


def names(store: Path) -> list[str]:
    """The tenants of a store, by their records."""
    try:
        with os.scandir(store / FOLDER) as entries:
            found = [each.name for each in entries if each.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for each in found if each.endswith(".json") and is_name(name := each.removesuffix(".json")))


def check(store: Path, name: str) -> None:
    """TenantNotFound, with the nearest name, unless there is such a tenant."""
    there = names(store)
    if name not in there:
        raise TenantNotFound(name, nearest(name, there))


def load(store: Path, name: str) -> Tenant:
    """Read a tenant's record.  TenantNotFound; ConfigError for a record that is damaged."""
    check(store, name)
    path = store / FOLDER / record_name(name)
    try:
        d = json.loads(read_small(None, path))
        numbers = d["uid"], d["gid"]
        if d["format"] != FORMAT or any(type(n) is not int or not 0 <= n < _MAX_ID for n in numbers):
            raise ValueError(f"format {d['format']}, uid and gid {numbers}")
        return Tenant(name, *numbers, int(MODES.parse(d["mode"]), 8), AMOUNT.parse(d["budget"]))
    except FileNotFoundError:
        raise TenantNotFound(name, "") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be used ({e}); `kvfs tenant set {name}` with all options, or `rm`") from None


def read_secret(store: Path, name: str) -> bytes:
    """A tenant's secret; ConfigError if it is not there or not whole."""
    path = store / FOLDER / secret_name(name)
    try:
        secret = read_small(None, path)
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"{len(secret)} bytes")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be used ({e}); stop the daemon, `kvfs fsck` makes another") from None
    return secret


def add(store: Path, tenant: Tenant) -> None:
    """Make a tenant: its store and secret first, its record last.

    ConfigError for a name that cannot be one, or is one already; StoreReadOnly, StoreFull.
    """
    if not is_name(tenant.name):
        raise ConfigError(f"{tenant.name!r}: a tenant's name is a lower-case letter, then up to 31 of a-z, 0-9 and -")
    there = names(store)
    if tenant.name in there:
        raise ConfigError(f"there is a tenant {tenant.name} already; `kvfs tenant set {tenant.name}` changes it")
    if len(there) >= MAX_TENANTS:
        raise ConfigError(f"{len(there)} tenants; more than {MAX_TENANTS} cannot share a daemon")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(store / FOLDER, DIR_MODE)
        clear(store, tenant.name)  # what an earlier one of this name has left is not the new one's to see
    except OSError as e:
        raise from_os_error(e, store / FOLDER / tenant.name) from e
    make_store(store, tenant.name)
    make_secret(store, tenant.name)
    change(store, tenant)


def make_store(store: Path, name: str) -> None:
    """Make the store of a tenant, empty.  StoreReadOnly, StoreFull."""
    home = place(store, name)
    Store.init(home).close()
    for path in (store / FOLDER, home, *home.rglob("*")):
        _belong(store, path)


def make_secret(store: Path, name: str) -> None:
    """Write a new secret in place of what is there, if anything is.  StoreReadOnly, StoreFull."""
    _write(store, secret_name(name), secrets.token_bytes(SECRET_BYTES), SECRET_MODE)


def change(store: Path, tenant: Tenant) -> None:
    """Put a record in place of the one that is there, if one is.  StoreReadOnly, StoreFull."""
    record = canonical_json({"format": FORMAT, **tenant.to_json()}) + b"\n"
    _write(store, record_name(tenant.name), record, RECORD_MODE)


def _write(store: Path, name: str, data: bytes, mode: int) -> None:
    """Write a small file whole, for the owner of the store: whoever reads it may read all of it."""
    temp, folder = secrets.token_hex(16), enter(store)
    try:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temp, flags, mode, dir_fd=folder), "wb") as file:
                _belong(store, file.fileno())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp, dir_fd=folder)
            raise
    except OSError as e:
        raise from_os_error(e, store / FOLDER / name) from e
    finally:
        os.close(folder)


def _belong(store: Path, made: Path | int) -> None:
    """Give what root has made to the owner of the store, who has to work with it."""
    owner = os.stat(store)
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.chown(made, owner.st_uid, owner.st_gid, follow_symlinks=isinstance(made, int))


def forget(store: Path, name: str) -> None:
    """End a tenant: no daemon serves it from now on, or soon.  What it had is left for `clear`.  TenantNotFound."""
    try:
        os.unlink(store / FOLDER / record_name(name))
    except FileNotFoundError:
        raise TenantNotFound(name, "") from None
    except OSError as e:
        raise from_os_error(e, store / FOLDER / name) from e


def clear(store: Path, name: str) -> None:
    """Remove the chunks and the secret of a tenant that has been forgotten: they are gone at once, their bytes freed
    before this returns.  OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(store / FOLDER / secret_name(name))
    root = os.open(store, OPEN_DIR)
    try:
        make_dir(".kvfs", root)
        trash = f".kvfs/{retired.name_for(name)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{FOLDER}/{name}", trash, src_dir_fd=root, dst_dir_fd=root)
            shutil.rmtree(trash, dir_fd=root, ignore_errors=True)
    finally:
        os.close(root)


def tenant_of(path: Path) -> str | None:
    """The tenant whose store lies at ``path``; None for any other place."""
    real = Path(os.path.realpath(path))
    return real.name if real.parent.name == FOLDER and (real.parent.parent / marker.NAME).is_file() else None


def needs_daemon(path: Path) -> None:
    """Unsupported if ``path`` is the store of a tenant: what keeps tenants apart is the daemon."""
    if (name := tenant_of(path)) is not None:
        raise Unsupported(
            f"the store of tenant {name} without a daemon: mount the whole store, use {FOLDER}/{name} there"
        )
