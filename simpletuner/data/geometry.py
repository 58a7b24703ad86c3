"""Resolution arithmetic: which target size an image is trained at, and what is cut from it.

Sizes are (width, height) in pixels after EXIF orientation. An image is scaled, keeping its aspect, until it covers the
target, and cropped to it. A portrait is treated as the mirror image of the landscape of the same edges.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from simpletuner.config.backends import SQUARE_EDGES_PX, DatasetConfig, ResolutionType

Size = tuple[int, int]
"""(width, height) in pixels."""

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

    @property
    def key(self) -> str:
        """What of the geometry changes the pixels; the original size does not beyond the content itself."""
        return f"{self.resized[0]}x{self.resized[1]}-{self.left}-{self.top}-{self.target[0]}x{self.target[1]}"


def target_size(dataset: DatasetConfig, width: int, height: int) -> Size:
    """Returns the size that an image of this size is trained at."""
    if dataset.crop and dataset.crop_aspect == "square":
        aspect = 1.0
    elif dataset.crop and dataset.crop_aspect == "closest":
        aspect = closest_aspect(width / height, dataset.crop_aspect_buckets)
    else:
        aspect = width / height
    landscape = _landscape(
        round(max(aspect, 1 / aspect), dataset.aspect_bucket_rounding),
        dataset.resolution,
        dataset.resolution_type,
        dataset.alignment,
    )
    return landscape if aspect >= 1 else (landscape[1], landscape[0])


def closest_aspect(aspect: float, choices: Iterable[float]) -> float:
    """Returns the choice nearest in ratio: 0.5 and 2 are equally far from 1, so portraits mirror landscapes."""
    return min(choices, key=lambda choice: (round(abs(math.log(choice / aspect)), 9), max(choice, 1 / choice)))


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


def geometry(dataset: DatasetConfig, image_id: str, width: int, height: int) -> Geometry:
    """Returns what is done to an image; a random crop depends on the image's id only, so it is the same every run."""
    target = target_size(dataset, width, height)
    resized = _cover(target, width, height, _downsample_scale(dataset, width, height))
    slack = resized[0] - target[0], resized[1] - target[1]
    left, top = 0, 0
    if dataset.crop_style == "center":
        left, top = slack[0] // 2, slack[1] // 2
    elif dataset.crop_style == "random":
        digest = hashlib.blake2b(f"crop/{image_id}".encode(errors="surrogateescape"), digest_size=16).digest()
        left = int.from_bytes(digest[:8], "little") % (slack[0] + 1)
        top = int.from_bytes(digest[8:], "little") % (slack[1] + 1)
    return Geometry((width, height), resized, left, top, target)


def _cover(target: Size, width: int, height: int, least_scale: float) -> Size:
    """Returns the size, in the image's aspect, that covers the target and is scaled by ``least_scale`` at least."""
    scale = max(target[0] / width, target[1] / height, least_scale)
    return max(target[0], round(width * scale)), max(target[1], round(height * scale))


def _downsample_scale(dataset: DatasetConfig, width: int, height: int) -> float:
    """Returns the scale to ``target_downsample_size`` for a crop from an image above ``maximum_image_size``, else 0.

    Without a crop there is nothing to gain from a size above the target's.
    """
    size, maximum = dataset.target_downsample_size, dataset.maximum_image_size
    if not dataset.crop or size is None or maximum is None or not is_larger(dataset, width, height, maximum):
        return 0.0
    if dataset.resolution_type == "pixel":
        return min(1.0, size / min(width, height))
    return min(1.0, math.sqrt(area_px(size, dataset.resolution_type) / (width * height)))


def is_larger(dataset: DatasetConfig, width: int, height: int, size: float) -> bool:
    """Returns whether an image is larger than a size in the dataset's unit."""
    if dataset.resolution_type == "pixel":
        return min(width, height) > size
    return width * height > area_px(size, dataset.resolution_type)


def is_smaller(dataset: DatasetConfig, width: int, height: int, size: float) -> bool:
    """Returns whether an image is smaller than a size in the dataset's unit."""
    if dataset.resolution_type == "pixel":
        return min(width, height) < size
    return width * height < area_px(size, dataset.resolution_type)


def outside_limits(dataset: DatasetConfig, width: int, height: int) -> str | None:
    """Returns the limit that leaves an image of this size out, or None when it is used."""
    aspect = width / height
    if dataset.minimum_image_size is not None and is_smaller(dataset, width, height, dataset.minimum_image_size):
        return f"smaller than minimum_image_size {dataset.minimum_image_size:g} ({dataset.resolution_type})"
    if dataset.minimum_aspect_ratio is not None and aspect < dataset.minimum_aspect_ratio:
        return f"narrower than minimum_aspect_ratio {dataset.minimum_aspect_ratio:g}"
    if dataset.maximum_aspect_ratio is not None and aspect > dataset.maximum_aspect_ratio:
        return f"wider than maximum_aspect_ratio {dataset.maximum_aspect_ratio:g}"
    return None
