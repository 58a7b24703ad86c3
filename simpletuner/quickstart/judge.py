"""Reads from the pixels of a picture what a scene's caption says, without having learned anything.

The background's colour is the frame's. What is nearer to another colour of the palette, in blobs, is an object; its
size is its area; its shape is the outline that it covers best. What is in doubt is not read, and not right.
[h, w] are the picture's pixels, G * G the points of a grid that is laid over an object.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import numpy.typing as npt
from PIL import Image

from simpletuner.quickstart.drawing import draw_outlines
from simpletuner.quickstart.palette import PERIOD_PX, tones
from simpletuner.quickstart.scenes import Scene, Thing, place, relation
from simpletuner.quickstart.vocabulary import COLORS, SHAPES, SIZES

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_PALETTE: Floats = np.array(list(COLORS.values()), np.float32)
_MIN_CORE_PX = 25
"""Pixels of one colour whose four neighbours have it too, of which an object has at least so many. The smallest star
has 146, and a blurred edge, whose colours lie between two others, none."""
_REACH_PX = 6
"""How far an object reaches from its core: the tips of a star have none."""
_OTHERS_REACH_PX = 3
_MAX_MISFIT = 0.15
"""Mean square difference to the best shape, as a part of the shape's own mean square."""
_MIN_SLOPE, _MIN_WAVE = 0.5, 0.3
"""Of a gradient over the picture and of a pattern's fundamental, as parts of the step between two tones."""


@dataclass(frozen=True)
class Seen:
    """One object as it was read; ``None`` is what could not be."""

    size: str | None
    color: str
    shape: str | None
    x: float
    y: float
    misfit: float
    """0 for an outline as it is drawn; above 0.15 no shape is read."""


@dataclass(frozen=True)
class Reading:
    """What was read from a picture."""

    background: str
    texture: str
    things: tuple[Seen, ...]


def read(picture: Image.Image) -> Reading:
    """Returns what an RGB picture shows."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    background, from_background = _read_background(pixels)
    distances = np.stack([_length(pixels - color) for color in _PALETTE])
    distances[list(COLORS).index(background)] = np.inf
    cores, labels = _cores(distances, from_background)
    things: list[Seen] = []
    windows = [_grown(core, _REACH_PX) for core in cores]
    for index, (window, label) in enumerate(zip(windows, labels, strict=True)):
        for other in (*cores[:index], *cores[index + 1 :]):
            window &= ~_grown(other, _OTHERS_REACH_PX)
        near = from_background / (from_background + distances[label] + 1e-6)
        things.append(_read_thing(np.where(window, np.clip(near * 1.6 - 0.3, 0, 1), 0), list(COLORS)[label]))
    behind = ~np.logical_or.reduce([np.zeros(pixels.shape[:2], bool), *windows])
    return Reading(background, _read_texture(pixels, behind, background), tuple(things))


def score(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Returns for each attribute of a scene whether the picture shows it so; with two objects both must be right.

    The attributes are number, size, color, shape, position (of one object) or relation (of two), background, texture.
    """
    seen = read(picture)
    common = {
        "number": len(seen.things) == len(scene.things),
        "background": seen.background == scene.background.color,
        "texture": seen.texture == scene.background.texture,
    }
    # An object too many is told by the number; the others may still be right.
    orders = permutations(seen.things, len(scene.things)) if len(seen.things) < 5 else ()
    return max((common | _compare(things, scene) for things in orders), key=_right, default=common | _missing(scene))


@dataclass(frozen=True)
class Accuracy:
    """Parts of pictures, from 0 to 1."""

    all_right: float
    attributes: Mapping[str, float]
    """Of the pictures that have the attribute."""
    num_pictures: int


def accuracy(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Accuracy:
    """Returns how many pictures show their scenes rightly, in all attributes and in each."""
    scores = [score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    names = sorted({name for each in scores for name in each})
    parts = {name: float(np.mean([each[name] for each in scores if name in each])) for name in names}
    return Accuracy(float(np.mean([all(each.values()) for each in scores])), parts, len(scores))


def _right(attributes: Mapping[str, bool]) -> int:
    return sum(attributes.values())


def _compare(seen: Sequence[Seen], scene: Scene) -> dict[str, bool]:
    pairs = list(zip(seen, scene.things, strict=True))
    found = {
        "size": all(one.size == thing.size for one, thing in pairs),
        "color": all(one.color == thing.color for one, thing in pairs),
        "shape": all(one.shape == thing.shape for one, thing in pairs),
    }
    first = scene.things[0]
    if len(pairs) == 1:
        where = place(seen[0].x / scene.width, seen[0].y / scene.height)
        return found | {"position": where == place(first.x / scene.width, first.y / scene.height)}
    return found | {"relation": relation(seen[0].x - seen[1].x, seen[0].y - seen[1].y) == scene.relation}


def _missing(scene: Scene) -> dict[str, bool]:
    where = "position" if len(scene.things) == 1 else "relation"
    return dict.fromkeys(("size", "color", "shape", where), False)


def _read_background(pixels: Floats) -> tuple[str, Floats]:
    """Returns the frame's colour, and [h, w] the RGB distance of each pixel from that colour's tones."""
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    frame = np.concatenate([frame, pixels[2:-2, :2].reshape(-1, 3), pixels[2:-2, -2:].reshape(-1, 3)])
    color = min(COLORS, key=lambda name: float(np.median(_from_tones(frame, name))))
    return color, _from_tones(pixels, color)


def _from_tones(pixels: Floats, color: str) -> Floats:
    """Returns [...] the distance of [..., 3] pixels from the line between a colour's tones."""
    start, step = _tone_line(color)
    part = np.clip(_tone_part(pixels, color), 0, 1, dtype=np.float32)
    return _length(pixels - start - part[..., None] * step)


def _length(vectors: Floats) -> Floats:
    """Returns [...] the length of [..., 3] vectors."""
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))


def _tone_part(pixels: Floats, color: str) -> Floats:
    """Returns [...] where [..., 3] pixels lie between the first tone, 0, and the second, 1."""
    start, step = _tone_line(color)
    return np.dot(pixels - start, step) / np.dot(step, step)


@lru_cache(maxsize=16)
def _tone_line(color: str) -> tuple[Floats, Floats]:
    start, end = (np.array(tone, np.float32) for tone in tones(color))
    return start, end - start


def _cores(distances: Floats, from_background: Floats) -> tuple[list[Bools], list[int]]:
    """Returns the objects' pixels less their edges, [h, w] each, and the objects' colours as rows of the palette."""
    cores: list[Bools] = []
    labels: list[int] = []
    nearest = np.where(distances.min(0) < from_background, distances.argmin(0), -1)
    present = [label for label in range(len(distances)) if _eroded(nearest == label).sum() >= _MIN_CORE_PX]
    for label in present:
        rivals = [distances[each] for each in present if each != label]
        others = np.minimum.reduce([from_background, *rivals])
        for blob in _blobs(_eroded(distances[label] < others)):
            if blob.sum() >= _MIN_CORE_PX:
                cores.append(blob)
                labels.append(label)
    return cores, labels


def _eroded(mask: Bools) -> Bools:
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return inner


def _grown(mask: Bools, num_pixels: int) -> Bools:
    """Returns a mask grown by a square of 2 n + 1 pixels."""
    for _ in range(2):
        rows = mask.copy()
        for step in range(1, num_pixels + 1):
            rows[step:] |= mask[:-step]
            rows[:-step] |= mask[step:]
        mask = rows.T
    return mask


def _blobs(mask: Bools) -> list[Bools]:
    """Returns the connected parts of a mask, diagonal neighbours included."""
    parents: list[int] = []
    runs: list[tuple[int, int, int]] = []
    above: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            run = parents[run]
        return run

    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for row in np.flatnonzero(mask.any(1)):
        here: list[int] = []
        starts, ends = np.flatnonzero(edges[row] == 1).tolist(), np.flatnonzero(edges[row] == -1).tolist()
        for start, end in zip(starts, ends, strict=True):
            run = len(runs)
            runs.append((int(row), start, end))
            parents.append(run)
            for other in above:
                at, left, right = runs[other]
                if at == row - 1 and left <= end and start <= right:
                    parents[root(other)] = root(run)
            here.append(run)
        above = here
    blobs: dict[int, Bools] = {}
    for run, (row, start, end) in enumerate(runs):
        blobs.setdefault(root(run), np.zeros_like(mask))[row, start:end] = True
    return list(blobs.values())


def _read_thing(cover: Floats, color: str) -> Seen:
    """Returns the object whose part of each pixel is ``cover`` [h, w]."""
    area, x, y, grid = _normalised(cover)
    patterns, grids = _patterns()
    misfits = np.square(grid - grids).sum(1) / np.square(grids).sum(1)
    best = int(np.argmin(misfits))
    pattern, misfit = patterns[best], float(misfits[best])
    root = float(np.sqrt(area))
    middle = x + pattern.to_middle[0] * root, y + pattern.to_middle[1] * root
    if misfit > _MAX_MISFIT:
        return Seen(None, color, None, *middle, misfit)
    diameter = root * pattern.diameter
    size = min(SIZES, key=lambda name: abs(float(np.log(diameter / SIZES[name]))))
    return Seen(size, color, pattern.shape, *middle, misfit)


@dataclass(frozen=True)
class _Pattern:
    """A shape of area 1 around its centre of gravity."""

    shape: str
    diameter: float
    to_middle: tuple[float, float]
    """From the centre of gravity to the middle of the box."""


@lru_cache(maxsize=1)
def _patterns() -> tuple[list[_Pattern], Floats]:
    """Returns the P patterns of all shapes in all sizes, which differ in how wide the edge is, and [P, G * G] grids."""
    patterns: list[_Pattern] = []
    grids: list[Floats] = []
    for shape in SHAPES:
        for size, diameter in SIZES.items():
            large = Image.new("L", (64 * 8, 64 * 8), 0)
            draw_outlines(large, Thing(size, "white", shape, 32, 32, diameter), 8)
            cover = np.asarray(large.reduce(8), np.float32) / np.float32(255)
            area, x, y, grid = _normalised(cover)
            root = float(np.sqrt(area))
            patterns.append(_Pattern(shape, diameter / root, ((32 - x) / root, (32 - y) / root)))
            grids.append(grid)
    return patterns, np.stack(grids)


_GRID: Floats = np.stack(np.meshgrid(*[np.linspace(-1.15, 1.15, 17, dtype=np.float32)] * 2), -1).reshape(-1, 2)
"""[G * G, 2] points (x, y), in square roots of the object's area."""


def _normalised(cover: Floats) -> tuple[float, float, float, Floats]:
    """Returns of [h, w] parts of pixels the area, the centre of gravity (x, y), and [G * G] the parts on the grid."""
    area = max(float(cover.sum()), 1.0)
    columns, rows = cover.sum(0), cover.sum(1)
    x = float(columns @ (np.arange(len(columns)) + 0.5)) / area
    y = float(rows @ (np.arange(len(rows)) + 0.5)) / area
    # Between the middles of four pixels; outside of the picture there is nothing.
    padded = np.pad(cover, 2)
    at = np.clip(_GRID * np.sqrt(area) + (x + 1.5, y + 1.5), 0, np.array(padded.shape[::-1]) - 1.001)
    low = at.astype(np.intp)
    (right, down), (i, j) = (at - low).astype(np.float32).T, (low[:, 0], low[:, 1])
    top = padded[j, i] * (1 - right) + padded[j, i + 1] * right
    bottom = padded[j + 1, i] * (1 - right) + padded[j + 1, i + 1] * right
    return area, x, y, top * (1 - down) + bottom * down


def _read_texture(pixels: Floats, behind: Bools, color: str) -> str:
    """Returns the texture of the pixels that are ``behind`` [h, w] the objects."""
    rows, columns = np.nonzero(behind)
    if len(rows) < 200:
        return "plain"
    part = _tone_part(pixels[rows, columns], color)
    height, width = behind.shape
    plane = np.stack([np.ones_like(part), columns / width - 0.5, rows / height - 0.5], 1)
    level = np.linalg.lstsq(plane, part, rcond=None)[0]
    rest = part - plane @ level
    turn = np.exp(2j * np.pi * np.arange(max(height, width)) / PERIOD_PX)
    waves = (turn[columns], turn[rows], turn[columns] * turn[rows], turn[columns] / turn[rows])
    to_right, down, rising, falling = (2 * abs(complex(wave @ rest)) / len(rest) for wave in waves)
    strengths = {"striped": max(to_right, down), "checked": float(np.hypot(rising, falling))}
    strongest = max(strengths, key=lambda name: strengths[name])
    if strengths[strongest] > _MIN_WAVE:
        return strongest
    return "graded" if float(np.abs(level[1:]).max()) > _MIN_SLOPE else "plain"
