"""The pictures of the quickstart's scenes."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from simpletuner.atomic import new_folder
from simpletuner.config.errors import UserError
from simpletuner.quickstart.palette import PERIOD_PX, tones
from simpletuner.quickstart.scenes import Background, Scene, Thing, make_scene
from simpletuner.quickstart.shapes import outlines
from simpletuner.quickstart.vocabulary import COLORS

Size = tuple[int, int]

_VERSION = 2
_MARKER = ".scenes.json"
_OVERSAMPLING = 4


def draw(folder: Path, count: int = 300, seed: int = 0) -> Path:
    """Draws pictures 00000.png, ... with captions 00000.txt into a folder, once, and returns the folder.

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
            render(scene).save(made / f"{index:05}.png")
            (made / f"{index:05}.txt").write_text(f"{scene.caption}\n", encoding="utf8")
        (made / _MARKER).write_text(marker, encoding="utf8")
    return folder


def are_scenes(folder: Path | None) -> bool:
    """Returns whether a folder's pictures were drawn here."""
    return folder is not None and (folder / _MARKER).is_file()


def batches_of_one_size(sizes: Iterable[Size], batch_size: int) -> Iterator[tuple[Size, list[int]]]:
    """Yields (width, height) and the places of at most ``batch_size`` pictures of it, until each place came once."""
    by_size: dict[Size, list[int]] = defaultdict(list)
    for place, size in enumerate(sizes):
        by_size[size].append(place)
    for size, places in by_size.items():
        for start in range(0, len(places), batch_size):
            yield size, places[start : start + batch_size]


def render(scene: Scene) -> Image.Image:
    """Returns the RGB picture of a scene, drawn larger and scaled down so that edges are smooth."""
    large = _render_background(scene.background, scene.width, scene.height)
    for thing in scene.things:
        mask = Image.new("L", large.size, 0)
        draw_outlines(mask, thing, _OVERSAMPLING)
        large.paste(COLORS[thing.color], mask=mask)
    return large.reduce(_OVERSAMPLING)


def draw_outlines(mask: Image.Image, thing: Thing, scale: int) -> None:
    """Draws where a thing is, 255 on 0, into a picture that is ``scale`` times as large as the scene."""
    pen = ImageDraw.Draw(mask)
    for points, value in zip(outlines(thing.shape), (255, 0), strict=False):
        # Pillow counts from the middle of the first pixel.
        corners = [
            ((thing.x + thing.diameter_px * x) * scale - 0.5, (thing.y + thing.diameter_px * y) * scale - 0.5)
            for x, y in points
        ]
        pen.polygon(corners, fill=value)


def _render_background(background: Background, width: int, height: int) -> Image.Image:
    start, end = (np.array(tone, np.float32) for tone in tones(background.color))
    part = np.broadcast_to(_tone(background, width, height), (height * _OVERSAMPLING, width * _OVERSAMPLING))
    return Image.fromarray(np.rint(start + part[..., None] * (end - start)).astype(np.uint8))


def _tone(background: Background, width: int, height: int) -> npt.NDArray[np.float32]:
    """Returns how far each pixel is from the first tone to the second, in an array that broadcasts to the picture."""
    if background.texture == "plain":
        return np.zeros((1, 1), np.float32)
    x = ((np.arange(width * _OVERSAMPLING) + 0.5) / _OVERSAMPLING)[None, :]
    y = ((np.arange(height * _OVERSAMPLING) + 0.5) / _OVERSAMPLING)[:, None]
    if background.texture == "graded":
        part = (x / width, y / height)[background.direction % 2]
    else:
        stripes = tuple(np.floor(at / (PERIOD_PX / 2)) % 2 for at in (x, y))
        part = np.abs(stripes[0] - stripes[1]) if background.texture == "checked" else stripes[background.direction % 2]
    return (part if background.direction < 2 else 1 - part).astype(np.float32)
