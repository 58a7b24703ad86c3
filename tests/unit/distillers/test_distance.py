import math

import pytest
import torch

from simpletuner.distillers._base import distance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cauchy_is_the_logarithm_of_a_samples_root_mean_square(dtype: torch.dtype) -> None:
    a, b = torch.tensor([[3.0, 1.0], [0.0, 0.5]]).to(dtype), torch.zeros(2, 2, dtype=dtype)
    got = distance(a, b, "cauchy", 0.5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Mean squares 5 and 1/8; log(1 + d^2 / (2 c^2)) with c = 1/2.
    assert got.tolist() == pytest.approx([math.log(11), math.log(1.25)], rel=1e-6)


def test_cauchy_is_square_near_zero_and_bounded_in_its_pull() -> None:
    assert float(distance(torch.full((1, 4), 1e-6), torch.zeros(1, 4), "cauchy", 1e-2)) == pytest.approx(5e-9, rel=1e-5)
    far = torch.full((1, 1), 100.0, requires_grad=True)
    distance(far, torch.zeros(1, 1), "cauchy", 1e-3).sum().backward()
    assert far.grad is not None
    assert float(far.grad) == pytest.approx(2 / 100, rel=1e-6)  # d / (c^2 + d^2 / 2): falls as 2 / d


def test_cauchy_has_a_gradient_at_zero_and_keeps_the_direction_within_a_sample() -> None:
    zero = torch.zeros(1, 3, requires_grad=True)
    distance(zero, torch.zeros(1, 3), "cauchy", 1e-3).sum().backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad, torch.zeros(1, 3))
    d = torch.tensor([[0.1, -2.0, 30.0]], requires_grad=True)
    distance(d, torch.zeros(1, 3), "cauchy", 1e-3).sum().backward()
    assert d.grad is not None
    torch.testing.assert_close(d.grad / d.detach(), (d.grad / d.detach())[:, :1].expand(1, 3))
