"""What the worker gives up before it looks at anything that others wrote: rights that it has no use for.

It keeps what the service unit imposes that it runs in (system calls, devices, address families). The rest it does
itself: capabilities, and with the setting ``worker_user`` the user, every right to write outside the store
(Landlock), and TCP. Capabilities and Landlock hold for one thread and those it starts, so there may be no other yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import pwd
import resource
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final

from kvfs.errors import ConfigError, MountError

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvfs.config import Config

log = logging.getLogger(__name__)

CAP_DAC_OVERRIDE: Final = 1
CAP_DAC_READ_SEARCH: Final = 2
CAP_FOWNER: Final = 3
CAP_SYS_ADMIN: Final = 21
CAP_LEASE: Final = 28
NEEDED: Final = frozenset({CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_SYS_ADMIN, CAP_LEASE})
"""What a worker that stays root uses: files of any owner in the store, leases on them, backing ids, and the unmount
when its keeper is gone."""

PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
CAPABILITY_VERSION_3: Final = 0x20080522
CAPSET_HEADER: Final = Struct("=Ii")  # version pid
CAPSET_DATA: Final = Struct("=IIIIII")  # effective permitted inheritable, low words; then the high ones

LANDLOCK_CREATE_RULESET: Final = 444
LANDLOCK_ADD_RULE: Final = 445
LANDLOCK_RESTRICT_SELF: Final = 446
LANDLOCK_CREATE_VERSION: Final = 1
LANDLOCK_RULE_PATH_BENEATH: Final = 1
LANDLOCK_RULE_NET_PORT: Final = 2
RULESET: Final = Struct("=QQ")  # handled_access_fs handled_access_net
PATH_BENEATH: Final = Struct("=Qi")  # allowed_access parent_fd
NET_PORT: Final = Struct("=QQ")  # allowed_access port
EXECUTE: Final = 1 << 0
WRITES: Final = (1 << 1) | sum(1 << n for n in range(4, 13))
"""Write a file, remove or make anything (linux/landlock.h, ABI 1)."""
APPENDS: Final = (1 << 1) | (1 << 8)
"""Write a file, make a regular one: what the trace takes."""
REFER: Final = 1 << 13
"""Link and rename between folders; ABI 2."""
TRUNCATE: Final = 1 << 14
"""ABI 3."""
TCP: Final = 3
"""Bind and connect; ABI 4."""
BIND: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)


def enter(config: Config) -> None:
    """Give up what this worker does not need, for good. Raises ConfigError for a user that is not there, MountError
    if ``worker_user`` is set and cannot be obeyed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every leased part is an open file
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if config.worker_user is None:
        _keep_capabilities(NEEDED)
        return
    try:
        _become(config.worker_user)
        _confine(config)
        owner = os.stat(config.store or "/").st_uid
    except OSError as e:
        raise MountError(config.mountpoint, f"worker_user {config.worker_user}: {e.strerror}") from None
    if owner != os.geteuid():  # its files could not be passed through
        raise MountError(config.mountpoint, f"worker_user {config.worker_user} must own {config.store}: chown -R it")


def account(user: str) -> pwd.struct_passwd:
    """The account with a name or a number; ConfigError if there is none."""
    try:
        return pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"worker_user {user}: there is no such user") from None


def _become(user: str) -> None:
    there = account(user)
    if os.geteuid() == there.pw_uid:  # a service manager has seen to that
        _keep_capabilities(frozenset())
        return
    _drop_bounding(frozenset())
    os.initgroups(there.pw_name, there.pw_gid)
    os.setresgid(there.pw_gid, there.pw_gid, there.pw_gid)
    os.setresuid(there.pw_uid, there.pw_uid, there.pw_uid)
    _set_capabilities(frozenset())


def _keep_capabilities(kept: Collection[int]) -> None:
    with contextlib.suppress(PermissionError):  # an unprivileged daemon has none to drop
        _drop_bounding(kept)
    _set_capabilities(kept)


def _drop_bounding(kept: Collection[int]) -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        if capability not in kept:
            _check(_libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))


def _set_capabilities(kept: Collection[int]) -> None:
    """Have no more than ``kept``, and none that this process did not have."""
    header = CAPSET_HEADER.pack(CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(CAPSET_DATA.size)
    _check(_libc.capget(header, data))
    low = sum(1 << n for n in kept if n < 32)
    high = sum(1 << n - 32 for n in kept if n >= 32)
    effective, permitted, _, effective_high, permitted_high, _ = CAPSET_DATA.unpack(data)
    words = CAPSET_DATA.pack(effective & low, permitted & low, 0, effective_high & high, permitted_high & high, 0)
    if words != data.raw:  # a service unit may forbid the call, having left nothing to give up
        _check(_libc.capset(header, words))


def _confine(config: Config) -> None:
    """Write in the store only, run nothing, use TCP for the metrics page only, as far as this kernel can see to it."""
    version = _libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_VERSION)
    if version < 1 or config.store is None:
        log.info("this kernel has no Landlock: only file permissions confine the worker")
        return
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise OSError(errno.EBUSY, f"{threads} threads were started before the sandbox")
    writes = WRITES | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    net = TCP if version >= 4 else 0
    rules = RULESET.pack(writes | EXECUTE, net)
    ruleset = _check(_libc.syscall(LANDLOCK_CREATE_RULESET, rules, RULESET.size if net else 8, 0))
    try:
        _allow(ruleset, config.store, writes)
        if config.trace is not None:
            _allow(ruleset, config.trace.parent, APPENDS)
        if net and config.metrics_listen is not None:
            rule = NET_PORT.pack(BIND, config.metrics_listen.port)
            _check(_libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_NET_PORT, rule, 0))
        _check(_libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, folder: Path, rights: int) -> None:
    beneath = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        rule = PATH_BENEATH.pack(rights, beneath)
        _check(_libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(beneath)


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
