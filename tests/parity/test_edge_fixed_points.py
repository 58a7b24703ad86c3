"""What the losses of phased and random edges, and the solver of second order, lead to on data N(0, s^2).

There every jump is a number times z. The numbers are derived here from the schedule's products of alphas alone: steps
of the teacher multiply up to the edge, and where one prediction serves many edges it is their least-squares line. The
method's own loss, minimised exactly, has to reach them; then the scheduler that the method saves is run with the
student that was found, and has to end where the jumps end.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.denoiser import Denoiser
from simpletuner.distillers._base import Draw, Setup
from simpletuner.distillers.lcm import LCM, LCMConfig, jump
from simpletuner.randomness import Randomness
from tests.parity import reference
from tests.parity.test_fixed_points import (
    DOUBLE,
    FIVE_DIGITS,
    VP,
    Table,
    TableFamily,
    exact_coefficients,
    one_sample_an_index,
    sweep,
)
from tests.parity.toy import SDXL_SCHEDULER, toy_batch, uncond

ACP = reference.alphas_cumprod()


def grid_times(num_steps: int) -> list[int]:
    return [0, *(1000 // num_steps * (i + 1) - 1 for i in range(num_steps))]


def picture(acp: float, s: float) -> float:
    """E[x0 | z] / z."""
    return math.sqrt(acp) * s**2 / (acp * s**2 + 1 - acp)


def ddim_factor(high: int, low: int, s: float) -> float:
    x0 = picture(ACP[high], s)
    noise = (1 - math.sqrt(ACP[high]) * x0) / math.sqrt(1 - ACP[high])
    return math.sqrt(ACP[low]) * x0 + math.sqrt(1 - ACP[low]) * noise


def dpm2s_factor(high: int, low: int, s: float) -> float:
    def guided(z: Tensor, t: float, acp: float) -> tuple[Tensor, Tensor]:
        return picture(acp, s) * z, z

    return float(reference.dpm_solver_2s(guided, torch.ones(1, dtype=DOUBLE), high, low, ACP))


def product(factor: Callable[[int, int, float], float], times: list[int], s: float) -> float:
    return math.prod(factor(high, low, s) for low, high in zip(times, times[1:], strict=False))


def make(s: float = 1.0, kind: str = "epsilon", **options: Any) -> tuple[LCM, Table]:
    """Returns the method with an exact teacher and a student that knows nothing."""
    config = LCMConfig(**options)
    grid = VP.grid(config.num_ddim_timesteps)
    student = Table(grid.to(DOUBLE), torch.zeros(len(grid), dtype=DOUBLE))
    times, coefficients = grid.to(DOUBLE), exact_coefficients(VP, kind, grid, s)
    if config.solver == "dpm2s":  # the teacher is asked half-way too
        low_high = zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)
        middles = torch.tensor([reference.half_way(high, low, ACP) for low, high in low_high], dtype=DOUBLE)
        alpha, sigma = middles[:, 1].sqrt(), (1 - middles[:, 1]).sqrt()
        x0, noise = alpha * s**2 / (alpha**2 * s**2 + sigma**2), sigma / (alpha**2 * s**2 + sigma**2)
        between = noise if kind == "epsilon" else alpha * noise - sigma * x0
        times, coefficients = torch.cat([times, middles[:, 0]]), torch.cat([coefficients, between])
    networks = {"student": student, "teacher": Table(times, coefficients).requires_grad_(False), "target": student}
    denoisers = {name: Denoiser(TableFamily(), network, None, kind, VP, None) for name, network in networks.items()}
    return LCM(Setup(config, denoisers, VP, uncond)), student


def landing(lcm: LCM, start: int, edge: int) -> float:
    """Returns where the student lands from z = 1 at a time."""
    z, t = torch.ones(1, 1, 1, 1, dtype=DOUBLE), torch.tensor([start])
    prediction = lcm.denoisers["student"](z, t, {}, torch.zeros(1, 6))
    scaling = lcm.config.timestep_scaling_factor
    return float(jump(VP, prediction, z, t, torch.tensor([edge]), scaling).detach())


def drawn(lcm: LCM, num_steps: int) -> float:
    """Returns where sampling with the method's own scheduler ends, from z = 1 and without new noise."""
    scheduler, _ = lcm.sampling(SDXL_SCHEDULER)
    scheduler.set_timesteps(num_steps)
    z = torch.ones(1, 1, 1, 1, dtype=DOUBLE)
    for t in scheduler.timesteps:
        raw = lcm.denoisers["student"](z, t[None], {}, torch.zeros(1, 6)).raw.detach()
        z = scheduler.step(raw, t, z, eta=0.0).prev_sample
    return float(z)


PHASES = [
    (0.96641,),
    (0.97279, 0.99343),
    (0.98101, 0.99163, 0.99499, 0.99844),
    (0.98611, 0.99483, 0.99549, 0.99612, 0.99699, 0.99800, 0.99891, 0.99953),
]
"""Where the top of each phase lands at its start, the lowest phase first: N = 40, s = 1."""


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("values", PHASES, ids=len)
def test_phases(kind: str, values: tuple[float, ...]) -> None:
    """A student of phases crosses each as its solver steps do; M steps of trailing DDIM cross them all."""
    num_phases = len(values)
    lcm, student = make(kind=kind, num_ddim_timesteps=40, edge_policy="phased", num_phases=num_phases)
    batch, draw = one_sample_an_index(lcm)
    sweep(lcm, batch, draw, student)
    assert float(lcm.loss("student", batch, draw, 0).per_sample.detach().max()) < 1e-20
    times, length = grid_times(40), 40 // num_phases
    for phase, value in enumerate(values):
        inside = times[phase * length : (phase + 1) * length + 1]
        edge = inside[0] if phase else -1  # the first phase begins at the picture itself
        got = landing(lcm, inside[-1], edge)
        assert got == pytest.approx(product(ddim_factor, inside, 1.0), rel=1e-10)
        assert got == pytest.approx(value, abs=FIVE_DIGITS)
    # The whole way is the same for any number of phases; float32 tables of diffusers leave 1e-5.
    assert drawn(lcm, num_phases) == pytest.approx(0.96641, abs=2e-5)


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("lowest", [0, 3, 8])
def test_any_edge_is_reached_by_the_product_of_steps(lowest: int, s: float) -> None:
    lcm, student = make(s, num_ddim_timesteps=10, edge_policy="random")
    batch, draw = one_sample_an_index(lcm)
    times = grid_times(10)
    assert draw.end is not None
    draw = dataclasses.replace(draw, edge=draw.end.clamp(max=times[lowest]))
    sweep(lcm, batch, draw, student)
    assert landing(lcm, 999, times[lowest]) == pytest.approx(product(ddim_factor, times[lowest:], s), rel=1e-10)


def one_sample_a_pair(lcm: LCM) -> tuple[Any, Draw]:
    """Returns samples of one latent, in which the method has drawn each pair of start and edge once."""
    num_steps = lcm.config.num_ddim_timesteps
    many = toy_batch(60 * num_steps**2, latent_px=1)
    draw = lcm.draw(many, Randomness(5))
    assert draw.edge is not None
    pairs = {pair: i for i, pair in enumerate(zip(draw.start.tolist(), draw.edge.tolist(), strict=True))}
    times = grid_times(num_steps)
    assert set(pairs) == {(start, edge) for i, start in enumerate(times) for edge in times[:i]}
    first = torch.zeros(len(pairs), dtype=torch.int64)
    chosen = torch.tensor(list(pairs.values()))
    batch = dataclasses.replace(
        many,
        mean=many.mean[first],
        std=None,
        cond={name: value[first] for name, value in many.cond.items()},
        geometry=many.geometry[first],
    )
    changed = {name: getattr(draw, name)[chosen] for name in ("start", "end", "edge", "w")}
    return batch, dataclasses.replace(draw, noise=draw.noise[first], posterior=None, **changed)


def least_squares_lines(num_steps: int, s: float) -> list[Callable[[int], float]]:
    """Returns for each grid time where the prediction that suits all edges below best lands at an edge.

    A prediction is one free number q: x0 = (1 - sigma q) / alpha and noise = q, so that it lands at an edge e on
    A_e + q B_e. It has to meet D L(e): one teacher step D, then the next lower time's landing L.
    """
    times = grid_times(num_steps)

    def parts(t: int, edge: int) -> tuple[float, float]:
        a = math.sqrt(ACP[edge] / ACP[t])
        return a, math.sqrt(1 - ACP[edge]) - a * math.sqrt(1 - ACP[t])

    lines: list[Callable[[int], float]] = [lambda edge: 1.0]
    for low, high in zip(times, times[1:], strict=False):
        step, below = ddim_factor(high, low, s), lines[-1]
        wanted = [(*parts(high, edge), step * below(edge)) for edge in times if edge <= low]
        q = sum(b * (y - a) for a, b, y in wanted) / sum(b * b for _, b, _ in wanted)
        lines.append(lambda edge, q=q, t=high: parts(t, edge)[0] + q * parts(t, edge)[1])
    return lines


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("num_steps", "s", "value"), [(8, 1.0, 0.63520), (8, 0.5, 0.26244), (4, 1.0, 0.56753)])
def test_random_edges(kind: str, num_steps: int, s: float, value: float) -> None:
    lcm, student = make(s, kind, num_ddim_timesteps=num_steps, edge_policy="random")
    batch, draw = one_sample_a_pair(lcm)
    sweep(lcm, batch, draw, student)
    lines, times = least_squares_lines(num_steps, s), grid_times(num_steps)
    for high in range(1, num_steps + 1):
        for low in range(high):
            assert landing(lcm, times[high], times[low]) == pytest.approx(lines[high](times[low]), rel=1e-9)
    assert landing(lcm, 999, 0) == pytest.approx(value, abs=FIVE_DIGITS)
    for steps in (1, 2, 4):
        stops = times[:: num_steps // steps]
        ways = [lines[i * num_steps // steps](stops[i - 1]) for i in range(1, steps + 1)]
        assert drawn(lcm, steps) == pytest.approx(math.prod(ways), abs=2e-5)


def test_one_line_for_all_edges_keeps_little_in_one_step_and_nearly_all_in_two() -> None:
    """What documentation/distillers/TCD.md says: the price of a network that is not told the edge."""
    lines, times = least_squares_lines(50, 1.0), grid_times(50)
    assert lines[50](0) == pytest.approx(0.68116, abs=FIVE_DIGITS)
    assert lines[50](times[25]) * lines[25](0) == pytest.approx(0.99512, abs=FIVE_DIGITS)


DPM2S = [(50, 1.0, 0.99737), (40, 1.0, 0.99625), (25, 1.0, 0.99218), (10, 1.0, 0.96827), (50, 0.5, 0.49715)]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("num_steps", "s", "value"), DPM2S)
def test_a_solver_of_second_order_keeps_more_of_the_spread(kind: str, num_steps: int, s: float, value: float) -> None:
    lcm, student = make(s, kind, num_ddim_timesteps=num_steps, solver="dpm2s")
    batch, draw = one_sample_an_index(lcm)
    sweep(lcm, batch, draw, student)
    got = landing(lcm, 999, -1)
    assert got == pytest.approx(value, abs=FIVE_DIGITS)
    assert got == pytest.approx(product(dpm2s_factor, grid_times(num_steps), s), rel=1e-9)


def test_phases_and_the_solver_of_second_order_go_together() -> None:
    lcm, student = make(num_ddim_timesteps=40, edge_policy="phased", num_phases=4, solver="dpm2s")
    batch, draw = one_sample_an_index(lcm)
    sweep(lcm, batch, draw, student)
    assert landing(lcm, 999, 749) == pytest.approx(product(dpm2s_factor, grid_times(40)[30:], 1.0), rel=1e-9)
    assert drawn(lcm, 4) == pytest.approx(0.99625, abs=2e-5)
