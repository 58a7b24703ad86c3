"""The tones of the quickstart's colours. An object has its colour; a background also goes to a second tone of it."""

import math
from functools import lru_cache

from simpletuner.quickstart.vocabulary import COLORS

RGB = tuple[int, int, int]

PERIOD_PX = 16
"""Of stripes and checks: two latents of the VAE. Finer patterns would be lost."""
_DARK = ("black", "blue", "purple")
_TONE_STEP = 0.27
_MIN_DISTANCE = 80.0
"""In RGB, between an object and every tone of its background."""


@lru_cache(maxsize=16)
def tones(color: str) -> tuple[RGB, RGB]:
    """Returns the two tones of a background: the colour, and darker, or lighter for dark colours."""
    end = 255 if color in _DARK else 0
    red, green, blue = (round(value + _TONE_STEP * (end - value)) for value in COLORS[color])
    return COLORS[color], (red, green, blue)


@lru_cache(maxsize=64)
def is_clear(color: str, background: str) -> bool:
    """Returns whether an object of a colour is plain to see on all tones of a background."""
    start, end = tones(background)
    return min(math.dist(COLORS[color], _mix(start, end, step / 8)) for step in range(9)) >= _MIN_DISTANCE


def _mix(start: RGB, end: RGB, part: float) -> list[float]:
    return [a + part * (b - a) for a, b in zip(start, end, strict=True)]
