"""The levels of the codec: how coarse the steps are."""

from typing import NamedTuple

from kvfs.errors import ConfigError

__all__ = ["FORMS", "LEVELS", "Level", "level"]


class Level(NamedTuple):
    """``steps`` are 256 log2 of the quantisation steps of sections by channel (K) and by token (V), relative to the
    standard deviation of what is quantised; None if nothing is."""

    name: str
    steps: tuple[int, int] | None

    @property
    def lossless(self) -> bool:
        return self.steps is None

    @property
    def form(self) -> str:
        """The form of parts coded at this level."""
        return f"cachegen-{self.name}"


LEVELS = {
    x.name: x
    for x in (
        Level("lossless", None),
        Level("high", (-701, -576)),  # .15 and .21
        Level("medium", (-320, -196)),  # .42 and .59
        Level("low", (-189, -64)),  # .6 and .84
        Level("lowest", (0, 124)),  # 1 and 1.4
    )
}
"""From the finest to the coarsest."""

FORMS = ("raw", *(x.form for x in LEVELS.values()))
"""Every form that a part is stored in, from the finest to the coarsest."""


def level(name: str) -> Level:
    """A level by its name; ConfigError for another."""
    try:
        return LEVELS[name]
    except KeyError:
        raise ConfigError(f"codec level {name!r} is not one of {', '.join(LEVELS)}") from None
