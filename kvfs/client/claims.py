"""What a client hands out: leases of parts to read, and reservations of files to write."""

import os
from collections.abc import Callable
from typing import NamedTuple, Self

from kvfs.identity import PartId

__all__ = ["Lease", "LeasedPart", "Reservation"]


class LeasedPart(NamedTuple):
    """A part open for reading.  Unless ``verified``, the reader checks the checksums of what it reads and tells
    the result by ``report``.  ``form``: of what ``fd`` holds, one of `kvfs.codec.FORMS`."""

    key: bytes
    part: PartId
    fd: int
    verified: bool
    form: str = "raw"


class Lease:
    """A claim on chunks: none of ``parts`` is evicted before `release`.  A context manager.

    The descriptors belong to the lease.  Whoever reads one of them in another thread ends that before releasing:
    a closed number is soon that of another file.
    """

    def __init__(self, parts: tuple[LeasedPart, ...], end: Callable[[], None]) -> None:
        self.parts = parts
        self._end = end

    def release(self) -> None:
        """Close the descriptors and end the claim; a second call does nothing.  Never raises, never waits longer
        than a lookup may."""
        parts, self.parts = self.parts, ()
        for p in parts:
            os.close(p.fd)
        if parts:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Reservation:
    """A temp file to write one part into, by ``pwrite`` or a shared map of ``fd``.  A context manager: leaving it
    without having published gives the file up.

    ``token`` names it to the store, ``ns`` is where it will be published.
    """

    def __init__(self, ns: bytes, fd: int, token: str, discard: Callable[[], None]) -> None:
        self.ns, self.fd, self.token = ns, fd, token
        self._discard: Callable[[], None] | None = discard

    def close(self) -> None:
        """Close ``fd``, as publishing needs; a map that is left has to go too."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def spend(self) -> None:
        """Close ``fd`` for publishing: from now on the file is the store's affair."""
        self.close()
        self._discard = None

    def discard(self) -> None:
        """Give the file up unless it was published.  Never raises."""
        self.close()
        discard, self._discard = self._discard, None
        if discard is not None:
            discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()
