"""The quickstart's data set: captioned pictures of coloured shapes, a pure function of (seed, index).

So a larger count only adds pictures, and what a picture shows can be checked against what its caption says. One in
seven combinations of colour and shape occurs in no training picture: what a model makes of those it has not copied.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from simpletuner.quickstart.palette import is_clear
from simpletuner.quickstart.shapes import Box, box
from simpletuner.quickstart.vocabulary import COLORS, COLUMNS, RELATIONS, ROWS, SHAPES, SIZES, TEXTURES

Split = Literal["train", "unseen"]
"""Which combinations of colour and shape a scene is made of."""

PICTURE_SIZES = ((64, 64), (80, 64), (64, 80), (96, 64), (64, 96))
"""(width, height) in pixels; each is as frequent as the others. Targets of ``resolution`` 64, ``pixel``, as they are,
with an alignment of 8 or 16; multiples of 16, so that a UNet can halve the latents once."""
_MARGIN_PX = 2.0
_GAP_PX = 6.0
"""Between two objects: less than a latent, and they run into each other."""
_OFF_CENTER = 0.07
"""Part of an edge from the picture's middle to where an object begins to count as left or right, top or bottom."""


@dataclass(frozen=True)
class Background:
    """What lies behind the objects."""

    color: str
    texture: str
    direction: int = 0
    """Where the second tone lies: right, below, left, above; stripes and checks begin with the first or the second."""

    @property
    def caption(self) -> str:
        """Such as ``a striped blue background``."""
        words = [self.color] if self.texture == "plain" else [self.texture, self.color]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)} background"


@dataclass(frozen=True)
class Thing:
    """One object of a picture; (x, y) is the middle of its box in pixels."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    diameter_px: float
    """Of the circle that is as large."""

    @property
    def caption(self) -> str:
        """Such as ``a small red star``."""
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one object and where, or two and how the first lies to the second."""

    width: int
    height: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """Such as ``a small red star left of a large blue ring on a yellow background``."""
        first = self.things[0]
        if len(self.things) == 2:
            what = f"{first.caption} {self.relation} {self.things[1].caption}"
        else:
            what = f"{first.caption} at the {place(first.x / self.width, first.y / self.height)}"
        return f"{what} on {self.background.caption}"

    @property
    def relation(self) -> str:
        """How the first of two objects lies to the second."""
        first, second = self.things
        return relation(first.x - second.x, first.y - second.y)


def place(x: float, y: float) -> str:
    """Returns the words for a point of the picture, both in parts of an edge: ``top left``, ``center``."""
    row, column = (
        names[(at > 0.5 - _OFF_CENTER) + (at > 0.5 + _OFF_CENTER)] for at, names in ((y, ROWS), (x, COLUMNS))
    )
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


def relation(dx: float, dy: float) -> str:
    """Returns how something lies to what it is (dx, dy) away from, in pixels."""
    horizontal, vertical = RELATIONS[:2], RELATIONS[2:]
    return horizontal[dx > 0] if abs(dx) > abs(dy) else vertical[dy > 0]


@lru_cache(maxsize=2)
def combinations(split: Split) -> tuple[tuple[str, str], ...]:
    """Returns the (color, shape) of which a split's objects are; "unseen" has one shape of each colour."""
    unseen = {(color, SHAPES[(3 * index + 1) % len(SHAPES)]) for index, color in enumerate(COLORS)}
    every = [(color, shape) for color in COLORS for shape in SHAPES]
    return tuple(each for each in every if (each in unseen) == (split == "unseen"))


def make_scene(seed: int, index: int, split: Split = "train") -> Scene:
    """Returns what the picture of an index shows; about every third picture has two objects."""
    return _make(random.Random(f"picture/{split}/{seed}/{index}"), index, split)


def make_prompt(seed: int, index: int, split: Split = "train") -> Scene:
    """Returns a scene whose caption is to be drawn by a model; independent of all pictures, of the same kinds."""
    return _make(random.Random(f"prompt/{split}/{seed}/{index}"), index, split)


def _make(dice: random.Random, index: int, split: Split) -> Scene:
    width, height = PICTURE_SIZES[index % len(PICTURE_SIZES)]
    color = dice.choice(list(COLORS))
    texture = dice.choices(TEXTURES, weights=(2, 1, 1, 1))[0]
    background = Background(color, texture, dice.randrange(4))
    if dice.random() < 1 / 3:
        things = _pair(dice, width, height, color, split)
    else:
        things = (_single(dice, width, height, color, split),)
    return Scene(width, height, background, things)


def _single(dice: random.Random, width: int, height: int, background: str, split: Split) -> Thing:
    """Returns an object in one of nine places, clearly in it and whole."""
    color, shape = dice.choice([each for each in combinations(split) if is_clear(each[0], background)])
    size, diameter, (left, top, right, bottom) = _sized(dice, shape, dice.choice(list(SIZES)))
    x = _at(dice, dice.randrange(-1, 2), width, -left, right)
    y = _at(dice, dice.randrange(-1, 2), height, -top, bottom)
    return Thing(size, color, shape, x, y, diameter)


def _at(dice: random.Random, side: int, edge_px: int, before: float, after: float) -> float:
    """Returns a coordinate on a side (-1, 0, 1) of the middle; one that is too large touches the margin."""
    if side == 0:
        return edge_px * (0.5 + dice.uniform(-0.02, 0.02))
    near = edge_px * (0.5 + side * (_OFF_CENTER + 0.055))
    far = before + _MARGIN_PX if side < 0 else edge_px - after - _MARGIN_PX
    return far if (near - far) * side > 0 else dice.uniform(min(near, far), max(near, far))


def _pair(dice: random.Random, width: int, height: int, background: str, split: Split) -> tuple[Thing, Thing]:
    """Returns two objects of different colours side by side along the longer edge, named in either order."""
    choices = [each for each in combinations(split) if is_clear(each[0], background)]
    color, shape = dice.choice(choices)
    kinds = (color, shape), dice.choice([each for each in choices if each[0] != color])
    horizontal = width > height or (width == height and dice.random() < 0.5)
    length, breadth = (width, height) if horizontal else (height, width)
    while True:
        sized = [_sized(dice, shape, dice.choice(list(SIZES))) for _, shape in kinds]
        spans = [(b[0], b[2]) if horizontal else (b[1], b[3]) for _, _, b in sized]
        slack = length - 2 * _MARGIN_PX - _GAP_PX - sum(end - start for start, end in spans)
        if slack >= 0:
            break
    cuts = sorted(dice.uniform(0, slack) for _ in range(2))
    first = _MARGIN_PX + cuts[0] - spans[0][0]
    second = length - _MARGIN_PX - (slack - cuts[1]) - spans[1][1]
    things: list[Thing] = []
    for along, (color, shape), (size, diameter, _) in zip((first, second), kinds, sized, strict=True):
        across = breadth / 2 + dice.uniform(-5, 5)
        x, y = (along, across) if horizontal else (across, along)
        things.append(Thing(size, color, shape, x, y, diameter))
    dice.shuffle(things)
    return things[0], things[1]


def _sized(dice: random.Random, shape: str, size: str) -> tuple[str, float, Box]:
    """Returns the size, a diameter near it, and the box in pixels around its middle."""
    diameter = SIZES[size] * dice.uniform(0.96, 1.04)
    left, top, right, bottom = (diameter * edge for edge in box(shape))
    return size, diameter, (left, top, right, bottom)
