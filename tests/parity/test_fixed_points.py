"""The fixed point that lcm's own loss leads to, on data whose exact teacher is known in closed form.

For pictures of Gaussian pixels N(0, s^2) every exact quantity is linear in the latent z. So the student is a table of
one coefficient a grid time, its loss is a parabola in each, and a sweep of exact Newton steps on the method's loss
carries the solution one grid time further up. The values are products of DDIM steps (VP) or Euler steps (flow); an
off-by-one, a wrong boundary, a wrong sign of time or a teacher target misses them.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from simpletuner.batch import Batch, Cond
from simpletuner.denoiser import Denoiser
from simpletuner.distillers._base import Draw, Setup
from simpletuner.distillers.lcm import LCM, LCMConfig, jump
from simpletuner.randomness import Randomness
from simpletuner.schedules import FlowSchedule, NoiseSchedule, from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER, toy_batch, uncond

VP = from_scheduler_config(SDXL_SCHEDULER)
DOUBLE = torch.float64
FIVE_DIGITS = 6e-6


class Table(nn.Module):
    """Predicts coefficient(t) z: a student with one free number a noise time, or the exact teacher."""

    def __init__(self, times: Tensor, coefficients: Tensor) -> None:
        super().__init__()
        self.times = times
        self.coefficients = nn.Parameter(coefficients)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        row = (self.times[:, None] - t.to(DOUBLE)).abs().argmin(0)
        return self.coefficients[row].view(-1, 1, 1, 1) * z


class TableFamily:
    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None
    ) -> Tensor:
        return module(x_t, model_t)


def exact_coefficients(schedule: NoiseSchedule, kind: str, times: Tensor, s: float) -> Tensor:
    """Returns E[what a perfect network predicts | z] / z for pixels N(0, s^2), from the joint Gaussian."""
    alpha, sigma = schedule.alpha(times, DOUBLE), schedule.sigma(times, DOUBLE)
    variance = alpha**2 * s**2 + sigma**2
    x0, noise = alpha * s**2 / variance, sigma / variance
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow_prediction": noise - x0}[kind]


def one_sample_an_index(lcm: LCM) -> tuple[Batch, Draw]:
    """Returns a batch in which the method itself has drawn each grid index once, in order."""
    num_steps = lcm.config.num_ddim_timesteps
    many = toy_batch(12 * num_steps, latent_px=1)
    draw = lcm.draw(many, Randomness(5))
    grid = lcm.schedule.grid(num_steps)
    first = [int((draw.start == time).nonzero()[0, 0]) for time in grid[1:]]

    def pick(value: Tensor) -> Tensor:
        return value[first]

    changes = {f.name: getattr(many, f.name) for f in dataclasses.fields(many)}
    batch = Batch(
        **{name: pick(value) if isinstance(value, Tensor) else value for name, value in changes.items()}
        | {"cond": {name: pick(value) for name, value in many.cond.items()}}
    )
    return batch, lcm.draw(batch, Randomness(5))


def sweep(lcm: LCM, batch: Batch, draw: Draw, student: Table) -> None:
    """Minimises the method's loss exactly, as many times as the grid has steps."""
    for _ in range(lcm.config.num_ddim_timesteps):
        loss = lcm.loss("student", batch, draw, 0).per_sample.sum()
        (gradient,) = torch.autograd.grad(loss, student.coefficients, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), student.coefficients)
        moved = curvature > 0  # t = 0 is never a start: its coefficient has no say, for the boundary is the identity
        with torch.no_grad():
            student.coefficients[moved] -= (gradient / curvature)[moved]


def top_of_the_fixed_point(
    schedule: NoiseSchedule, kind: str, num_steps: int, s: float, teacher_target: bool = False, scaling: float = 10.0
) -> float:
    """Returns f(z, t) / z at the highest grid time, after as many exact sweeps as the grid has steps."""
    grid = schedule.grid(num_steps)
    times = schedule.model_t(grid).to(DOUBLE)
    student = Table(times, torch.zeros(num_steps + 1, dtype=DOUBLE))
    teacher = Table(times, exact_coefficients(schedule, kind, grid, s)).requires_grad_(False)
    networks = {"student": student, "teacher": teacher, "target": teacher if teacher_target else student}
    denoisers = {
        name: Denoiser(TableFamily(), network, None, kind, schedule, None) for name, network in networks.items()
    }
    config = LCMConfig(num_ddim_timesteps=num_steps, timestep_scaling_factor=scaling)
    lcm = LCM(Setup(config, denoisers, schedule, uncond))
    batch, draw = one_sample_an_index(lcm)
    sweep(lcm, batch, draw, student)
    assert float(lcm.loss("student", batch, draw, 0).per_sample.detach().max()) < 1e-20 or teacher_target

    z = torch.ones(1, 1, 1, 1, dtype=DOUBLE)
    prediction = denoisers["student"](z, grid[-1:], {}, torch.zeros(1, 6))
    edge = torch.full((1,), -1)
    return float(jump(schedule, prediction, z, grid[-1:], edge, scaling).detach())


VP_VALUES = [(50, 1.0, 0.97290), (40, 1.0, 0.96641), (25, 1.0, 0.94743), (10, 1.0, 0.87676), (50, 0.5, 0.47703)]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("num_steps", "s", "value"), VP_VALUES)
def test_variance_preserving(kind: str, num_steps: int, s: float, value: float) -> None:
    assert top_of_the_fixed_point(VP, kind, num_steps, s) == pytest.approx(value, abs=FIVE_DIGITS)


@pytest.mark.parametrize(("shift", "num_steps", "value"), [(1, 50, 0.97462), (1, 100, 0.98723), (3, 50, 0.96445)])
def test_flow(shift: float, num_steps: int, value: float) -> None:
    got = top_of_the_fixed_point(FlowSchedule(shift), "flow_prediction", num_steps, 1.0)
    assert got == pytest.approx(value, abs=FIVE_DIGITS)


@pytest.mark.parametrize("num_steps", [50, 40, 25, 10])
def test_a_teacher_target_misses(num_steps: int) -> None:
    """The teacher as its own target has nothing to bootstrap: f stays one teacher step, near the mean picture."""
    value = dict((n, v) for n, s, v in VP_VALUES if s == 1.0)[num_steps]
    assert abs(top_of_the_fixed_point(VP, "epsilon", num_steps, 1.0, teacher_target=True) - value) > 0.5


def test_a_scheduler_with_zero_terminal_snr_works_with_v() -> None:
    """At t = 999 z is noise alone; the first DDIM step there keeps the exact spread sigma of the next time."""
    schedule = from_scheduler_config(SDXL_SCHEDULER | {"rescale_betas_zero_snr": True})
    value = top_of_the_fixed_point(schedule, "v_prediction", 50, 1.0)
    # An independent product of DDIM steps: with s = 1 the variance of z is 1, so a step multiplies by
    # cos(angle between the two (alpha, sigma) vectors); the last is the boundary's identity at t = 0.
    angle = torch.atan2(schedule.sigma(schedule.grid(50), DOUBLE), schedule.alpha(schedule.grid(50), DOUBLE))
    assert value == pytest.approx(float(torch.cos(angle.diff()).prod()), rel=1e-10)
    assert value == pytest.approx(0.973, abs=0.005)
