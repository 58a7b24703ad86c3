"""The teacher's way from one grid time down to the next.

Shapes: B batch, C latent channels, h w latent size in latent pixels.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from torch import Tensor

from simpletuner.denoiser import Prediction
from simpletuner.distillers._base import Draw
from simpletuner.schedules import NoiseSchedule

SolverName = Literal["ddim", "dpm2s"]

Teacher = Callable[[Tensor, Tensor], Prediction]
"""The guided teacher at ([B, C, h, w] noisy latents, [B] noise times)."""


class Solver(Protocol):
    """One step from ``draw.start`` to ``draw.end``."""

    def __call__(self, teacher: Teacher, schedule: NoiseSchedule, z: Tensor, draw: Draw) -> Tensor:
        """Returns [B, C, h, w] the latents at ``draw.end`` on the path through z at ``draw.start``."""
        ...


def ddim(teacher: Teacher, schedule: NoiseSchedule, z: Tensor, draw: Draw) -> Tensor:
    """Returns [B, C, h, w] the result of one DDIM step: one call of the teacher, first order."""
    assert draw.end is not None
    first = teacher(z, draw.start)
    return schedule.ddim_step(first.x0, first.noise, draw.end)


def dpm2s(teacher: Teacher, schedule: NoiseSchedule, z: Tensor, draw: Draw) -> Tensor:
    """Returns [B, C, h, w] the result of one DPM-Solver++(2S) step: two calls, second order.

    arXiv 2211.01095, algorithm 1 with r = 1/2: the whole step is made with the picture that is seen half-way in
    log(alpha / sigma). Its exponentials are those of a DDIM step: exp(-h) = alpha(t) sigma(s) / (sigma(t) alpha(s)).
    """
    assert draw.middle is not None
    assert draw.end is not None
    first = teacher(z, draw.start)
    half_way = teacher(schedule.ddim_step(first.x0, first.noise, draw.middle), draw.middle)
    # The noise that z holds, were that its picture.
    x0, noise = schedule.split(half_way.x0, z, draw.start, "sample")
    return schedule.ddim_step(x0, noise, draw.end)


SOLVERS: Mapping[SolverName, Solver] = {"ddim": ddim, "dpm2s": dpm2s}
