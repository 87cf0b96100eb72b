"""Every error kvfs raises: one tree, each leaf with the errno a filesystem caller sees and the CLI's exit code.

The class docstring is the message template: ``str(ChunkNotFound("ab12", "..."))`` fills it.  The
FUSE view reads ``errno``, the CLI reads ``exit_code``, and nothing else maps errors.
"""

import errno as _errno

__all__ = [
    "ChunkCorrupt",
    "ChunkNotFound",
    "ConfigError",
    "DaemonUnavailable",
    "DeadlineExceeded",
    "IdentityError",
    "KvfsError",
    "MountError",
    "NamespaceNotFound",
    "NotAStore",
    "ProtocolError",
    "StoreBusy",
    "StoreFull",
    "StoreReadOnly",
    "TenantNotFound",
    "Unsupported",
]


class KvfsError(Exception):
    """{}"""

    errno: int = _errno.EIO
    exit_code: int = 1

    def __str__(self) -> str:
        template = (type(self).__doc__ or "{}").strip()
        return template.format(*self.args) if self.args else template


class ChunkNotFound(KvfsError, FileNotFoundError):
    """no chunk {}: it was never stored, or has been evicted or removed"""

    errno = _errno.ENOENT
    exit_code = 3


class ChunkCorrupt(KvfsError, ValueError):
    """part {} is damaged ({}): {}"""

    errno = _errno.EIO
    exit_code = 4

    @property
    def name(self) -> str:
        """The part, as KEY.PART, if that is known."""
        return str(self.args[0])

    @property
    def reason(self) -> str:
        """A slug from a small closed set, used as a metric label and in lost+found."""
        return str(self.args[1])


class NamespaceNotFound(KvfsError, FileNotFoundError):
    """no namespace {}: `kvfs ns list` shows those of this store"""

    errno = _errno.ENOENT
    exit_code = 5


class IdentityError(KvfsError, ValueError):
    """identity: {}"""

    errno = _errno.EINVAL
    exit_code = 6


class NotAStore(KvfsError, FileNotFoundError):
    """{} is not a kvfs store: `kvfs init {}` makes one"""

    errno = _errno.ENOENT
    exit_code = 7


class StoreBusy(KvfsError, BlockingIOError):
    """{} is in use by {}"""

    errno = _errno.EBUSY
    exit_code = 8


class StoreFull(KvfsError, OSError):
    """no space left for {}: free space or raise the quota; the cache goes on without it"""

    errno = _errno.ENOSPC
    exit_code = 9

    @property
    def reason(self) -> str:
        """What is used up, as a slug: ``space``, ``budget``, ``namespace``, ``writes``, ``clients``."""
        return str(self.args[1]) if len(self.args) > 1 else "space"


class StoreReadOnly(KvfsError, PermissionError):
    """{} cannot be written: {}"""

    errno = _errno.EROFS
    exit_code = 10


class ConfigError(KvfsError, ValueError):
    """configuration: {}"""

    errno = _errno.EINVAL
    exit_code = 11


class DaemonUnavailable(KvfsError, ConnectionError):
    """no answer from the daemon of {}: {}"""

    errno = _errno.ENOTCONN
    exit_code = 12


class DeadlineExceeded(KvfsError, TimeoutError):
    """{} took longer than its deadline of {} s"""

    errno = _errno.ETIMEDOUT
    exit_code = 13


class ProtocolError(KvfsError, ValueError):
    """control protocol: {}"""

    errno = _errno.EPROTO
    exit_code = 14


class MountError(KvfsError, OSError):
    """cannot mount {}: {}"""

    errno = _errno.EIO
    exit_code = 15


class Unsupported(KvfsError, NotImplementedError):
    """not supported: {}"""

    errno = _errno.ENOTSUP
    exit_code = 16


class TenantNotFound(KvfsError, FileNotFoundError):
    """no tenant {}{}; `kvfs tenant list` shows those of this store"""

    errno = _errno.ENOENT
    exit_code = 17
