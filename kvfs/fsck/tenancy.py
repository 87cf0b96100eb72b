"""The folder of tenants: what belongs in it, and the secrets. Each tenant's own store is checked as any store is."""

import os
import re
import stat
from collections.abc import Iterator
from functools import partial

from kvfs import tenants
from kvfs.errors import KvfsError
from kvfs.fsck.findings import Finding, Repairs
from kvfs.fsck.folders import check_folder, check_temp, opened
from kvfs.names import is_temp

__all__ = ["check"]

_FILE = re.compile(r"(.*)\.(json|secret)", re.DOTALL)


def check(repairs: Repairs) -> Iterator[Finding]:
    """Check the folder of tenants, if there is one."""
    yield from check_folder(repairs, repairs.root, tenants.FOLDER, needed=False)
    there = tenants.names(repairs.store.path)
    with opened(repairs.root, tenants.FOLDER) as (folder, names):
        for name in names:
            yield from _entry(repairs, folder, name, there)
    for name in there:
        yield from _tenant(repairs, name)


def _entry(repairs: Repairs, folder: int, name: str, there: list[str]) -> Iterator[Finding]:
    """One name in the folder; ``there`` are the tenants that have a record."""
    path, of = f"{tenants.FOLDER}/{name}", _FILE.fullmatch(name)
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    fits = stat.S_ISREG(mode) if of else stat.S_ISDIR(mode)
    if is_temp(name):
        yield from check_temp(repairs, folder, path)
    elif not fits or not tenants.is_name(of[1] if of else name):
        yield repairs.move_away("foreign", path, stat.filemode(mode), folder)
    elif of is None and name not in there:
        yield repairs.move_away("tenant", path, "no record says whose it is", folder)
    elif of and of[2] == "secret" and of[1] not in there:
        yield repairs.repair("retired", path, "its tenant is gone", "removed", partial(os.unlink, name, dir_fd=folder))
    elif of and of[2] == "secret" and stat.S_IMODE(mode) != tenants.SECRET_MODE:
        wanted = tenants.SECRET_MODE
        change = partial(os.chmod, name, wanted, dir_fd=folder)
        yield repairs.repair("mode", path, f"mode {stat.S_IMODE(mode):04o}", f"set to {wanted:04o}", change)


def _tenant(repairs: Repairs, name: str) -> Iterator[Finding]:
    """The record, the secret and the folder of a tenant."""
    store = repairs.store.path
    try:
        tenants.load(store, name)
    except KvfsError as e:
        yield repairs.report("tenant", f"{tenants.FOLDER}/{tenants.record_name(name)}", str(e))
    try:
        tenants.read_secret(store, name)
    except KvfsError:
        detail = "missing or damaged; what was stored with it will not be found again"
        make = partial(tenants.make_secret, store, name)
        yield repairs.repair("tenant", f"{tenants.FOLDER}/{tenants.secret_name(name)}", detail, "made anew", make)
    if not tenants.place(store, name).is_dir():
        make = partial(tenants.make_store, store, name)
        yield repairs.repair("tenant", f"{tenants.FOLDER}/{name}", "its store is missing", "made anew", make)
