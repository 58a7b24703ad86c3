"""The outlines of the quickstart's shapes, upright, the middle of its box at (0, 0), in diameters of the circle.

Shapes must stay apart behind a VAE that keeps one latent for 8 x 8 pixels. So they differ by more than their corners:
arms, holes and notches are at least 5 px wide in the smallest size, and a star is wider than a circle.
"""

import math
from functools import lru_cache

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@lru_cache(maxsize=16)
def outlines(shape: str) -> tuple[tuple[Point, ...], ...]:
    """Returns the polygon of a shape, and that of its hole if it has one; y points down."""
    points = _OUTLINES[shape]
    x, y = ((min(at) + max(at)) / 2 for at in zip(*points, strict=True))
    moved = tuple((px - x, py - y) for px, py in points)
    return (moved, tuple(_ellipse(_HOLE))) if shape == "ring" else (moved,)


@lru_cache(maxsize=16)
def box(shape: str) -> Box:
    """Returns the smallest box around a shape."""
    xs, ys = zip(*outlines(shape)[0], strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _ellipse(radius: float, num_corners: int = 64) -> list[Point]:
    angles = (2 * math.pi * corner / num_corners for corner in range(num_corners))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star(radius: float, inner: float) -> list[Point]:
    """Returns the ten corners of a five-pointed star, the first at the top."""
    lengths = (radius, inner * radius) * 5
    angles = (math.pi * corner / 5 for corner in range(10))
    return [(r * math.sin(angle), -r * math.cos(angle)) for angle, r in zip(angles, lengths, strict=True)]


def _cross(half: float, arm: float) -> list[Point]:
    """Returns an upright cross; ``arm`` is half the width of its bars."""
    quarter = [(arm, -half), (arm, -arm), (half, -arm)]
    turned = [quarter, *([] for _ in range(3))]
    for turn in range(1, 4):
        turned[turn] = [(-y, x) for x, y in turned[turn - 1]]
    return [point for corner in turned for point in corner]


def _heart(scale: float, num_corners: int = 64) -> list[Point]:
    angles = [2 * math.pi * corner / num_corners for corner in range(num_corners)]
    return [
        (
            scale * 16 * math.sin(a) ** 3,
            -scale * (13 * math.cos(a) - 6 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]


_HOLE = 0.27
"""Radius of the ring's hole."""
_OUTLINES: dict[str, list[Point]] = {
    "circle": _ellipse(0.5),
    "square": [(-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)],
    "triangle": [(0.0, -0.6), (0.62, 0.5), (-0.62, 0.5)],
    "star": _star(0.65, 0.43),
    "ring": _ellipse(0.56),
    "cross": _cross(0.56, 0.19),
    "heart": _heart(0.036),
}
