"""Resolution arithmetic: which target size an image is trained at, and what is cut from it.

Sizes are (width, height) in pixels after EXIF orientation. An image is scaled, keeping its aspect, until it covers the
target, and cropped to it. A portrait is treated as the mirror image of the landscape of the same edges.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from simpletuner.config.backends import SQUARE_EDGES_PX, DatasetConfig, ResolutionType

Size = tuple[int, int]
"""(width, height) in pixels."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Told = npt.NDArray[np.float32]

_SQUARE_TOLERANCE = 0.05  # megapixels within which an area means one of the usual squares, not its square root


@dataclass(frozen=True)
class Geometry:
    """What is done to one image: scaled from ``original`` to ``resized``, then ``target`` cut at (left, top)."""

    original: Size
    resized: Size
    left: int
    top: int
    target: Size

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """Original height, width; crop top, left; target height, width, as SDXL's time ids have them.

        The crop is in pixels of the resized image and the original size is the file's (arXiv 2307.01952, section 2.2).
        """
        return self.original[1], self.original[0], self.top, self.left, self.target[1], self.target[0]


def target_size(dataset: DatasetConfig, width: int, height: int) -> Size:
    """Returns the size that an image of this size is trained at."""
    target = target_sizes(dataset, np.array([width]), np.array([height]))[0]
    return int(target[0]), int(target[1])


def geometry(dataset: DatasetConfig, image_id: str, width: int, height: int) -> Geometry:
    """Returns what is done to an image; a random crop depends on the image's id only, so it is the same every run."""
    target = target_size(dataset, width, height)
    cut = cuts(dataset, [image_id], np.array([width]), np.array([height]), target)[0].tolist()
    return Geometry((width, height), (cut[0], cut[1]), cut[2], cut[3], target)


def target_sizes(dataset: DatasetConfig, width: Ints, height: Ints) -> Ints:
    """Returns [n, 2] the (width, height) that n images are trained at."""
    # Not 1 / (w / h): a portrait's aspect must not differ from its mirror image's in the last bit.
    aspect, portrait = np.maximum(width, height) / np.minimum(width, height), height > width
    if dataset.crop and dataset.crop_aspect == "square":
        aspect, portrait = np.ones_like(aspect), np.zeros_like(portrait)
    elif dataset.crop and dataset.crop_aspect == "closest":
        chosen = _closest(width / height, dataset.crop_aspect_buckets)
        aspect, portrait = np.maximum(chosen, 1 / chosen), chosen < 1
    # Few aspects remain once they are rounded: the arithmetic is done once for each.
    rounded, which = np.unique(np.round(aspect, dataset.aspect_bucket_rounding), return_inverse=True)
    settings = dataset.resolution, dataset.resolution_type, dataset.alignment
    landscape = np.array([_landscape(float(a), *settings) for a in rounded], np.int64).reshape(-1, 2)[which]
    return np.where(portrait[:, None], landscape[:, ::-1], landscape)


def _closest(aspect: Floats, choices: Sequence[float]) -> Floats:
    """Returns for each aspect the choice nearest in ratio: 0.5 and 2 are equally far from 1.

    Between two that are equally far the squarer one is taken, so that portraits mirror landscapes.
    """
    squarest_first = np.array(sorted(choices, key=lambda choice: (max(choice, 1 / choice), choice)))
    distance = np.abs(np.log(squarest_first[None] / aspect[:, None])).round(9)
    return squarest_first[distance.argmin(axis=1)]


@lru_cache(maxsize=4096)
def _landscape(aspect: float, resolution: float, kind: ResolutionType, alignment: int) -> Size:
    """Returns the target for aspect = width / height >= 1, both edges multiples of the alignment."""
    square = square_edge(resolution, kind, alignment)
    if kind == "pixel":
        return _multiple(square * aspect, alignment), square
    if aspect == 1:
        return square, square
    edge = _multiple(math.isqrt(round(area_px(resolution, kind))), alignment)
    return _multiple(edge * math.sqrt(aspect), alignment), _multiple(edge / math.sqrt(aspect), alignment)


def square_edge(resolution: float, kind: ResolutionType, alignment: int) -> int:
    """Returns the edge of the square target."""
    if kind == "pixel":
        return _multiple(resolution, alignment)
    if kind == "area":
        for megapixels, edge in SQUARE_EDGES_PX.items():
            if abs(resolution - megapixels) <= _SQUARE_TOLERANCE:
                return _multiple(edge, alignment)
    return _multiple(math.isqrt(round(area_px(resolution, kind))), alignment)


def area_px(size: float, kind: ResolutionType) -> float:
    """Returns the number of pixels that a size in ``area`` (megapixels of 10^6) or ``pixel_area`` means."""
    return size * 1e6 if kind == "area" else size * size


def _multiple(value: float, alignment: int) -> int:
    """Returns the multiple of the alignment nearest to the value, at least one (halves go up)."""
    return max(1, math.floor(value / alignment + 0.5)) * alignment


def cuts(dataset: DatasetConfig, image_ids: Iterable[str], width: Ints, height: Ints, target: Size) -> Ints:
    """Returns [n, 4] resized width, height, crop left, top of n images with the same target."""
    scale = np.maximum(target[0] / width, target[1] / height)
    scale = np.maximum(scale, _downsample_scale(dataset, width, height))
    resized = np.stack([np.rint(width * scale), np.rint(height * scale)], axis=1).astype(np.int64)
    resized = np.maximum(resized, np.array(target))
    slack: Ints = resized - np.array(target)
    place: Ints = np.zeros_like(slack)
    if dataset.crop_style == "center":
        place = slack // 2
    elif dataset.crop_style == "random":
        place = _random(image_ids) % (slack + 1)
    return np.concatenate([resized, place], axis=1)


def time_ids(width: Ints, height: Ints, cut: Ints, target: Size, mirrored: Bools) -> Told:
    """Returns [n, 6] what the network is told of n images, in the order of ``Geometry.numbers``.

    Of a mirrored image what is cut off on the right is on the left.

    Args:
        width: Of the upright images.
        height: Of the upright images.
        cut: As ``cuts`` returns it.
        target: Of all of them.
        mirrored: Which are shown mirrored.
    """
    left = np.where(mirrored, cut[:, 0] - cut[:, 2] - target[0], cut[:, 2])
    columns = [height, width, cut[:, 3], left, np.full(len(cut), target[1]), np.full(len(cut), target[0])]
    return np.stack(columns, axis=1).astype(np.float32)


def cut_anew(dataset: DatasetConfig, crop_ids: Sequence[str], numbers: Told, mirrored: Bools) -> Told:
    """Returns ``time_ids`` [n, 6] of the same images with random crops that other ids decide."""
    height, width = numbers[:, :2].T.astype(np.int64)
    target = int(numbers[0, 5]), int(numbers[0, 4])
    return time_ids(width, height, cuts(dataset, crop_ids, width, height, target), target, mirrored)


def _random(image_ids: Iterable[str]) -> Ints:
    """Returns [n, 2] integers below 2^62 that depend on the ids only."""
    hashed = (hashlib.blake2b(f"crop/{name}".encode(), digest_size=16).digest() for name in image_ids)
    return (np.fromiter(hashed, "S16").view("<u8") >> np.uint64(2)).astype(np.int64).reshape(-1, 2)


def _downsample_scale(dataset: DatasetConfig, width: Ints, height: Ints) -> Floats:
    """Returns the scale to ``target_downsample_size`` for crops from images above ``maximum_image_size``, else 0.

    Without a crop there is nothing to gain from a size above the target's.
    """
    size, maximum = dataset.target_downsample_size, dataset.maximum_image_size
    if not dataset.crop or size is None or maximum is None:
        return np.zeros(len(width))
    ratio = _in_units(dataset, size) / _sizes(dataset, width, height)
    scale = ratio if dataset.resolution_type == "pixel" else np.sqrt(ratio)
    return np.where(_sizes(dataset, width, height) > _in_units(dataset, maximum), np.minimum(scale, 1.0), 0.0)


def _sizes(dataset: DatasetConfig, width: Ints, height: Ints) -> Ints:
    """Returns what limits are compared with: the shorter edge for ``pixel``, the number of pixels otherwise."""
    return np.minimum(width, height) if dataset.resolution_type == "pixel" else width * height


def _in_units(dataset: DatasetConfig, size: float) -> float:
    """Returns a size of the config as ``_sizes`` counts."""
    return size if dataset.resolution_type == "pixel" else area_px(size, dataset.resolution_type)


def outside_limits(dataset: DatasetConfig, width: Ints, height: Ints) -> npt.NDArray[np.object_]:
    """Returns [n] the limit that leaves an image out, "" for those that are used."""
    reasons = np.full(len(width), "", dtype=object)
    aspect = width / height
    if (limit := dataset.maximum_aspect_ratio) is not None:
        reasons[aspect > limit] = f"wider than maximum_aspect_ratio {limit:g}"
    if (limit := dataset.minimum_aspect_ratio) is not None:
        reasons[aspect < limit] = f"narrower than minimum_aspect_ratio {limit:g}"
    if (limit := dataset.minimum_image_size) is not None:
        small = _sizes(dataset, width, height) < _in_units(dataset, limit)
        reasons[small] = f"smaller than minimum_image_size {limit:g} ({dataset.resolution_type})"
    return reasons
