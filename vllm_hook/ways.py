"""Which way compacted parts take into an engine's blocks: decoded here, or hydrated by the store."""

__all__ = ["Ways"]


class Ways:
    """How to get at a compacted part: decode it here, or have it hydrated and read that. Whichever has been faster.

    Speeds are bytes of the raw form a second, of one part on one thread, from asking for it until it is in the blocks:
    what decoding is worth here depends on the instruction set, on how many cores are left beside the engine, and on how
    fast the medium is; what hydration is worth on how much the daemon has to do and on what it has hydrated already.
    """

    WEIGHT = 0.3
    """Of a new sample."""
    TRY = 64
    """One part of so many goes the other way, so that neither figure grows old."""

    def __init__(self) -> None:
        self.speeds = {True: 0.0, False: 0.0}
        self._parts = 0

    def decodes(self) -> bool:
        """Whether the next part is to be decoded here."""
        self._parts += 1
        faster = self.speeds[True] >= self.speeds[False]
        return faster if self._parts % self.TRY else not faster

    def took(self, decoded: bool, nbytes: int, seconds: float) -> None:
        """A part of ``nbytes`` in its raw form took so long, decoded here or hydrated."""
        old, sample = self.speeds[decoded], nbytes / max(seconds, 1e-9)
        self.speeds[decoded] = old + self.WEIGHT * (sample - old) if old else sample
