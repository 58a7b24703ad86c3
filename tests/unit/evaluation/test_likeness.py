"""How alike and how sharp pictures are: known values, and the order of known changes."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from simpletuner.evaluation.likeness import diversity, feature_distance, psnr_db, sharpness
from simpletuner.quickstart.drawing import render
from simpletuner.quickstart.scenes import make_prompt

PICTURES = [render(make_prompt(0, index)) for index in range(6)]


def noisy(picture: Image.Image, deviation: float) -> Image.Image:
    values = np.asarray(picture, np.float64)
    values = values + np.random.default_rng(0).normal(0, deviation, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def test_psnr_is_its_formula():
    grey = Image.new("RGB", (16, 8), (100, 100, 100))
    assert psnr_db(grey, Image.new("RGB", (16, 8), (110, 110, 110))) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr_db(grey, Image.new("RGB", (16, 8), (100, 100, 130))) == pytest.approx(10 * math.log10(255**2 / 300))
    assert psnr_db(grey, grey) == 100


def test_the_same_picture_is_at_no_distance_and_another_one_far():
    for picture in PICTURES:
        assert feature_distance(picture, picture) == 0
    size = PICTURES[0].size
    others = [picture for picture in PICTURES[1:] if picture.size == size]
    assert others
    for other in others:
        distance = feature_distance(PICTURES[0], other)
        assert 0.5 < distance < 1.2
        assert distance == pytest.approx(feature_distance(other, PICTURES[0]))


@pytest.mark.parametrize("picture", PICTURES[:3])
def test_the_distance_grows_with_blur_and_with_noise(picture: Image.Image):
    blurred = [picture.filter(ImageFilter.GaussianBlur(radius)) for radius in (0.5, 1, 2, 4)]
    noised = [noisy(picture, deviation) for deviation in (2, 8, 32)]
    for changed in (blurred, noised):
        distances = [feature_distance(picture, each) for each in changed]
        assert distances == sorted(distances)
        assert 0 < distances[0] < 0.1 < distances[-1]


def test_large_pictures_are_compared_at_256_pixels():
    large = [picture.resize((1024, 512), Image.Resampling.BICUBIC) for picture in PICTURES[:2]]
    small = [picture.resize((256, 128), Image.Resampling.LANCZOS) for picture in large]
    assert feature_distance(*large) == pytest.approx(feature_distance(*small))


def test_blur_is_less_sharp_and_noise_more():
    for picture in PICTURES:
        blurred = picture.filter(ImageFilter.GaussianBlur(1))
        assert sharpness(blurred) < 0.7 * sharpness(picture)
        assert sharpness(noisy(picture, 10)) > sharpness(picture)
    assert sharpness(Image.new("RGB", (16, 16), (9, 99, 199))) == pytest.approx(0, abs=1e-3)


def test_diversity_is_the_mean_over_pairs():
    one, two = PICTURES[0], noisy(PICTURES[0], 32)
    distance = feature_distance(one, two)
    assert diversity([one, two]) == pytest.approx(distance)
    assert diversity([one, one, two]) == pytest.approx(2 / 3 * distance)
