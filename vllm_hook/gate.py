"""Load or recompute: what was measured lately decides which is estimated to come first."""

__all__ = ["Gate"]


class Gate:
    """Exponentially weighted speeds of prefill (tokens/s) and of loading (bytes/s, one rank).

    Until both are measured everything is loaded. A refusal makes the next estimate of loading a little better, so a
    slow moment of the store is forgotten and tried again.
    """

    WEIGHT = 0.3
    """Of a new sample."""
    OVERHEAD = 0.004
    """Seconds a load costs whatever its size: the engine's steps until it starts, and until its end is seen."""
    FORGIVE = 1.2
    """A refusal multiplies the speed of loading by this."""
    MIN_TOKENS = 64
    MIN_BYTES = 1 << 20
    """Smaller samples tell more of the overhead than of the speed."""

    def __init__(self, mode: str, ranks: int) -> None:
        self._always, self._ranks = mode == "always", ranks
        self.tokens_per_s = 0.0
        self.bytes_per_s = 0.0

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A prompt's ``tokens`` were computed in ``seconds``, from its first step to its first output."""
        if tokens >= self.MIN_TOKENS and seconds > 0:
            self.tokens_per_s = self._mix(self.tokens_per_s, tokens / seconds)

    def loaded(self, nbytes: float, seconds: float) -> None:
        """Loads of ``nbytes`` took ``seconds`` on the loader's clock, both summed over ranks."""
        if nbytes >= self.MIN_BYTES and seconds > 0:
            self.bytes_per_s = self._mix(self.bytes_per_s, nbytes / seconds)

    def load_seconds(self, nbytes: int) -> float:
        """Estimate the time to load ``nbytes``, spread over all ranks; 0 if nothing is known yet."""
        return self.OVERHEAD + nbytes / self._ranks / self.bytes_per_s if self.bytes_per_s else 0.0

    def opens(self, tokens: int, nbytes: int) -> bool:
        """Whether loading ``nbytes`` is estimated to be faster than computing ``tokens``."""
        if self._always or not self.tokens_per_s or not self.bytes_per_s:
            return True
        if self.load_seconds(nbytes) <= tokens / self.tokens_per_s:
            return True
        self.bytes_per_s *= self.FORGIVE
        return False

    def _mix(self, old: float, sample: float) -> float:
        return sample if not old else old + self.WEIGHT * (sample - old)
