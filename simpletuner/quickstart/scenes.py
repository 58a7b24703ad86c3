"""Draws the quickstart's data set: captioned pictures of coloured shapes, a pure function of (seed, index).

So a larger count only adds pictures, and what a picture shows can be checked against what its caption says.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from simpletuner.atomic import new_folder
from simpletuner.config.errors import UserError
from simpletuner.quickstart.vocabulary import COLORS, COLUMNS, ROWS, SHAPES, SIZES

PICTURE_SIZES = ((80, 80), (96, 64), (64, 96), (96, 72), (72, 96), (104, 64), (64, 104))
"""(width, height) in pixels; each is as frequent as the others."""
_VERSION = 1
_MARKER = ".scenes.json"
_OVERSAMPLING = 4
_PLACES = {name: (index + 0.5) / 3 for names in (ROWS, COLUMNS) for index, name in enumerate(names)}


@dataclass(frozen=True)
class Thing:
    """One object of a picture, in the words of its caption."""

    size: str
    color: str
    shape: str
    row: str
    column: str

    @property
    def caption(self) -> str:
        """What and where, such as ``a small red star at the top left``."""
        place = "center" if (self.row, self.column) == ("middle", "center") else f"{self.row} {self.column}"
        return f"a {self.size} {self.color} {self.shape} at the {place}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """The caption, such as ``a small red star at the top left on a blue background``."""
        article = "an" if self.background[0] in "aeiou" else "a"
        return f"{' and '.join(thing.caption for thing in self.things)} on {article} {self.background} background"


def draw(folder: Path, count: int = 300, seed: int = 0) -> Path:
    """Draws pictures 000.png, ... with captions 000.txt into a folder, once, and returns the folder.

    The folder appears whole or not at all.

    Raises:
        UserError: The folder holds something else.
    """
    marker = json.dumps({"version": _VERSION, "count": count, "seed": seed})
    if folder.is_dir() and any(folder.iterdir()):
        found = folder / _MARKER
        if found.is_file() and found.read_text(encoding="utf8") == marker:
            return folder
        raise UserError(f"'{folder}' holds other files than the quickstart's pictures: move or delete it")
    with new_folder(folder) as made:
        for index in range(count):
            scene = make_scene(seed, index)
            render(scene).save(made / f"{index:03}.png")
            (made / f"{index:03}.txt").write_text(f"{scene.caption}\n", encoding="utf8")
        (made / _MARKER).write_text(marker, encoding="utf8")
    return folder


def make_scene(seed: int, index: int) -> Scene:
    """Returns what the picture of an index shows; every third picture has two objects side by side."""
    dice = random.Random(f"{seed}/{index}")
    width, height = PICTURE_SIZES[index % len(PICTURE_SIZES)]
    background, *colors = dice.sample(list(COLORS), 3)
    if dice.random() < 1 / 3:
        rows = dice.choices(ROWS, k=2)
        beside, above = [(rows[0], "left"), (rows[1], "right")], [("top", "center"), ("bottom", "center")]
        places, sizes = beside if width >= height else above, ["small", "small"]
    else:
        places, sizes = [(dice.choice(ROWS), dice.choice(COLUMNS))], [dice.choice(list(SIZES))]
    things = [
        Thing(size, color, dice.choice(SHAPES), row, column)
        for size, color, (row, column) in zip(sizes, colors, places, strict=False)
    ]
    return Scene(width, height, background, tuple(things))


def render(scene: Scene) -> Image.Image:
    """Returns the RGB picture of a scene, drawn larger and scaled down so that edges are smooth."""
    large = Image.new("RGB", (scene.width * _OVERSAMPLING, scene.height * _OVERSAMPLING), COLORS[scene.background])
    pen = ImageDraw.Draw(large)
    for thing in scene.things:
        _draw_thing(pen, thing, COLORS[scene.background], *large.size)
    return large.resize((scene.width, scene.height), Image.Resampling.LANCZOS)


def _draw_thing(
    pen: ImageDraw.ImageDraw, thing: Thing, background: tuple[int, int, int], width: int, height: int
) -> None:
    """Draws a thing as near to its place as it fits into the picture whole."""
    radius = SIZES[thing.size] * min(width, height) / 2
    x = min(max(_PLACES[thing.column] * width, radius), width - radius)
    y = min(max(_PLACES[thing.row] * height, radius), height - radius)
    color = COLORS[thing.color]
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        if thing.shape == "ring":
            hole = 0.55 * radius
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
        return
    pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _CORNERS[thing.shape]], fill=color)


def _star() -> list[tuple[float, float]]:
    """Returns the ten corners of a five-pointed star in the unit circle, the first at the top."""
    angles = (math.pi * corner / 5 for corner in range(10))
    return [
        (length * math.sin(angle), -length * math.cos(angle))
        for angle, length in zip(angles, (1.0, 0.42) * 5, strict=True)
    ]


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "star": _star(),
}
