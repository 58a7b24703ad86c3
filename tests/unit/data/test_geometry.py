import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.backends import DatasetConfig
from simpletuner.data.geometry import geometry, outside_limits, square_edge, target_size
from tests.unit.data.support import dataset

ROOT = Path("/nowhere")
EDGES = st.integers(16, 6000)
RESOLUTIONS = st.sampled_from([("area", 0.25), ("area", 0.5), ("area", 1.0), ("pixel", 512), ("pixel_area", 768)])


def of(kind: str, resolution: float, **values: Any) -> DatasetConfig:
    return dataset(ROOT, resolution_type=kind, resolution=resolution, **{"alignment": 64, **values})


@pytest.mark.parametrize(
    ("kind", "resolution", "image", "target"),
    [
        ("area", 1.0, (1024, 1024), (1024, 1024)),
        ("area", 1.0, (4000, 3000), (1152, 896)),
        ("area", 1.0, (1920, 1080), (1344, 768)),
        ("area", 1.0, (1080, 1920), (768, 1344)),
        ("area", 1.0, (640, 480), (1152, 896)),
        ("area", 0.5, (4000, 3000), (832, 640)),
        ("pixel", 1024, (1920, 1080), (1792, 1024)),
        ("pixel_area", 1024, (1024, 1024), (1024, 1024)),
        ("pixel_area", 1024, (1920, 1080), (1344, 768)),
    ],
)
def test_published_examples(kind: str, resolution: float, image: tuple[int, int], target: tuple[int, int]):
    assert target_size(of(kind, resolution), *image) == target
    assert target_size(of(kind, resolution), *image[::-1]) == target[::-1]


@pytest.mark.parametrize(
    ("megapixels", "edge"),
    [(0.25, 512), (0.5, 768), (1.0, 1024), (2.0, 1536), (4.0, 2048), (1.05, 1024), (0.96, 1024), (1.5, 1216)],
)
def test_square_targets_of_area(megapixels: float, edge: int):
    assert square_edge(megapixels, "area", 64) == edge


@given(EDGES, EDGES, RESOLUTIONS)
def test_portrait_mirrors_landscape(width: int, height: int, resolution: tuple[str, float]):
    settings = of(*resolution)
    assert target_size(settings, height, width) == target_size(settings, width, height)[::-1]


@given(EDGES, EDGES, RESOLUTIONS, st.sampled_from(["random", "center", "corner"]), st.booleans(), st.text(max_size=9))
def test_cut_lies_within_an_image_that_just_covers_the_target(
    width: int, height: int, resolution: tuple[str, float], style: str, crop: bool, name: str
):
    cut = geometry(of(*resolution, crop=crop, crop_style=style), name, width, height)
    assert cut.original == (width, height)
    assert cut.target[0] % 64 == cut.target[1] % 64 == 0
    assert 0 <= cut.left <= cut.resized[0] - cut.target[0]
    assert 0 <= cut.top <= cut.resized[1] - cut.target[1]
    # It just covers: one edge fits, and the other is the image's own aspect to the nearest pixel.
    assert cut.resized[0] == cut.target[0] or cut.resized[1] == cut.target[1]
    scale = max(cut.target[0] / width, cut.target[1] / height)
    assert abs(cut.resized[0] - width * scale) <= 0.5
    assert abs(cut.resized[1] - height * scale) <= 0.5


def test_numbers_are_original_size_crop_in_resized_pixels_and_target_height_first():
    cut = geometry(of("area", 1.0, crop_style="center"), "x", 4000, 3000)
    assert (cut.resized, cut.target) == ((1195, 896), (1152, 896))
    assert cut.numbers == (3000, 4000, 0, (1195 - 1152) // 2, 896, 1152)
    corner = geometry(of("area", 1.0, crop_style="corner"), "x", 4000, 3000)
    assert corner.numbers == (3000, 4000, 0, 0, 896, 1152)


def test_random_crops_differ_by_image_and_are_the_same_in_every_run():
    settings = of("area", 1.0, crop=True, crop_aspect="square", crop_style="random")
    lefts = [geometry(settings, f"{n}.png", 3000, 1000).left for n in range(300)]
    assert lefts == [geometry(settings, f"{n}.png", 3000, 1000).left for n in range(300)]
    assert len(set(lefts)) > 250
    slack = 3072 - 1024
    assert min(lefts) < 0.05 * slack
    assert max(lefts) > 0.95 * slack
    assert abs(sum(lefts) / 300 - slack / 2) < 0.1 * slack


def test_crop_aspects():
    assert target_size(of("area", 1.0, crop=True, crop_aspect="square"), 1920, 1080) == (1024, 1024)
    assert target_size(of("area", 1.0, crop=True, crop_aspect="preserve"), 1920, 1080) == (1344, 768)
    assert target_size(of("area", 1.0, crop=False, crop_aspect="square"), 1920, 1080) == (1344, 768)
    closest = of("area", 1.0, crop=True, crop_aspect="closest", crop_aspect_buckets=(0.5, 1.0, 2.0))
    assert target_size(closest, 1920, 1080) == target_size(of("area", 1.0), 2000, 1000)
    assert target_size(closest, 1080, 1920) == target_size(of("area", 1.0), 1000, 2000)
    assert target_size(closest, 1100, 1000) == (1024, 1024)


def test_aspect_rounding_decides_what_counts_as_the_same_bucket():
    assert target_size(of("pixel", 1024, aspect_bucket_rounding=1), 1280, 1000) == (1344, 1024)
    assert target_size(of("pixel", 1024, aspect_bucket_rounding=2), 1280, 1000) == (1280, 1024)


def test_downsampling_before_a_crop_leaves_more_of_the_image_out():
    limits = {"maximum_image_size": 4.0, "target_downsample_size": 2.0}
    cropped = of("area", 1.0, crop=True, crop_aspect="square", crop_style="center", **limits)
    large = geometry(cropped, "x", 4000, 3000)  # 12 megapixels: scaled to 2, of which a square of 1024 is cut
    assert large.resized == (1633, 1225)
    assert math.isclose(large.resized[0] * large.resized[1], 2e6, rel_tol=1e-3)
    assert large.numbers == (3000, 4000, 100, 304, 1024, 1024)
    assert geometry(cropped, "x", 2000, 1500).resized == (1365, 1024)  # 3 megapixels: not above the maximum
    assert geometry(of("area", 1.0, crop=False, **limits), "x", 4000, 3000).resized == (1195, 896)
    pixel = of("pixel", 512, crop=True, maximum_image_size=2048, target_downsample_size=768)
    assert geometry(pixel, "x", 4000, 3000).resized == (1024, 768)


@pytest.mark.parametrize(
    ("values", "image", "reason"),
    [
        ({"resolution_type": "area", "minimum_image_size": 0.5}, (800, 600), "smaller than minimum_image_size"),
        ({"resolution_type": "area", "minimum_image_size": 0.5}, (1000, 500), None),
        ({"resolution_type": "pixel", "minimum_image_size": 512}, (4000, 500), "smaller than minimum_image_size"),
        ({"resolution_type": "pixel", "minimum_image_size": 512}, (512, 512), None),
        ({"resolution_type": "pixel_area", "minimum_image_size": 512}, (1024, 256), None),
        ({"resolution_type": "pixel_area", "minimum_image_size": 512}, (1023, 256), "smaller than minimum_image_size"),
        ({"minimum_aspect_ratio": 0.5}, (499, 1000), "narrower than minimum_aspect_ratio 0.5"),
        ({"maximum_aspect_ratio": 2.0}, (2001, 1000), "wider than maximum_aspect_ratio 2"),
        ({"minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 2.0}, (2000, 1000), None),
        ({"maximum_image_size": 1.0, "resolution_type": "area"}, (4000, 3000), None),
    ],
)  # fmt: skip
def test_limits(values: dict[str, Any], image: tuple[int, int], reason: str | None):
    (found,) = outside_limits(dataset(ROOT, **values), np.array([image[0]]), np.array([image[1]]))
    assert found == "" if reason is None else str(found).startswith(reason)
