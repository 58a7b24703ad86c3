import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.quickstart.drawing import render
from simpletuner.quickstart.frechet import Moments, distance, features, frechet_distance, moments
from simpletuner.quickstart.scenes import make_scene
from tests.unit.quickstart.damage import blurred, noisy


@pytest.fixture(scope="module")
def real() -> list[list[Image.Image]]:
    return [[render(make_scene(seed, index)) for index in range(512)] for seed in (1, 2)]


def test_distance_of_gaussians_is_the_formula():
    """For covariances that commute it is the sum over axes of (m1 - m2)^2 + (s1 - s2)^2."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    spreads = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    means = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    sets = [Moments(turn @ m, turn @ torch.diag(s**2) @ turn.T) for m, s in zip(means, spreads, strict=True)]
    expected = (means[0] - means[1]).square().sum() + (spreads[0] - spreads[1]).square().sum()
    assert distance(*sets) == pytest.approx(float(expected), rel=1e-10)


def test_distance_is_that_of_the_matrix_root(real: list[list[Image.Image]]):
    from scipy.linalg import sqrtm

    first, second = (moments(pictures[:256]) for pictures in real)
    one, two = first.covariance.numpy(), second.covariance.numpy()
    expected = np.square((first.mean - second.mean).numpy()).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_identical_sets_are_at_zero_in_any_order(real: list[list[Image.Image]]):
    first, second = real
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, first[::-1]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first[7:] + first[:7], second[::-1]) == pytest.approx(
        frechet_distance(second, first), rel=1e-5
    )


def test_blur_and_noise_move_a_set_above_the_floor(real: list[list[Image.Image]]):
    first, second = moments(real[0]), real[1]
    floor = distance(first, moments(second))
    assert 0.2 < floor < 1  # two real sets of 512
    blur = [distance(first, moments([blurred(each, sigma) for each in second])) for sigma in (0.5, 0.7, 1, 2)]
    noise = [distance(first, moments([noisy(each, sigma) for each in second])) for sigma in (6, 8, 16, 32)]
    assert floor < blur[0] < blur[1] < blur[2] < blur[3]
    assert floor < noise[0] < noise[1] < noise[2] < noise[3]
    assert blur[1] > 5 * floor
    assert noise[1] > 3 * floor


def test_other_contents_are_away_too(real: list[list[Image.Image]]):
    first, second = moments(real[0]), real[1]
    floor = distance(first, moments(second))
    alone = [picture for index, picture in enumerate(second) if len(make_scene(2, index).things) == 1]
    red = [picture for index, picture in enumerate(second) if make_scene(2, index).background.color != "red"]
    assert distance(first, moments(alone)) > 2 * floor
    assert distance(first, moments(red)) > 1.2 * floor


def test_features_are_fixed_and_leave_random_numbers_alone(real: list[list[Image.Image]]):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    values = features(real[0][:10])
    assert torch.equal(torch.rand(3), expected)
    assert values.dtype == torch.float64
    one_by_one = torch.cat([features([picture]) for picture in real[0][:10]])
    torch.testing.assert_close(values, one_by_one, rtol=1e-4, atol=1e-5)
    assert bool((values[0] != values[1]).any())
