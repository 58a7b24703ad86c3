"""Where consistency methods jump to, and the scheduler that samples what was trained so.

Student and target of one loss jump to the same edge. The policies differ in that edge alone: the picture (LCM), the
start of the sample's phase (PCM) or a random grid time (TCD). Each policy brings the scheduler that calls the network
at trained times only, and refuses numbers of steps that leave them. (With an eta above 0, TCD's scheduler lands between
grid times, and the noise that it then adds takes the picture back to one.)

Shapes: B batch, N solver steps, M phases, T training timesteps.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from simpletuner.distillers._base import make_scheduler
from simpletuner.randomness import Randomness
from simpletuner.schedules import CLEAN_EDGE

if TYPE_CHECKING:  # diffusers takes seconds to import, and the plan needs none of it
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

EdgePolicy = Literal["origin", "phased", "random"]

_STOCK_STEPS, _STOCK_SCALING = 50, 10.0
"""What LCMScheduler and TCDScheduler take when they are made from a base model's scheduler."""


@dataclass(frozen=True)
class Edges(ABC):
    """A policy with its numbers; the field names are the options'."""

    num_ddim_timesteps: int
    timestep_scaling_factor: float
    num_phases: int
    eta: float

    options: ClassVar[frozenset[str]]
    """Which of the fields above have an effect."""

    @property
    def num_inference_steps(self) -> int:
        """Steps that suit the policy."""
        return 4

    @abstractmethod
    def times(self, grid: Tensor, index: Tensor, position: Tensor, randomness: Randomness) -> Tensor:
        """Returns [B] the noise times to which student and target jump.

        Args:
            grid: [N + 1] solver times.
            index: [B] grid indices of the solver's results, in [0, N).
            position: [B] global sample positions.
            randomness: Of the run.
        """

    @abstractmethod
    def sampling(
        self, base_config: Mapping[str, Any], prediction_type: str
    ) -> "tuple[SchedulerMixin, dict[str, Any]]":  # Any: a scheduler's JSON, a pipeline's arguments
        """Returns (the scheduler of these jumps, further arguments of the pipeline's call)."""

    def problems(self, num_train_timesteps: int | None, num_inference_steps: int | None) -> list[str]:
        """Returns a line for each reason why these numbers could not work; None is not known, or not drawn."""
        num_steps = self.num_ddim_timesteps
        if num_inference_steps is None or num_inference_steps <= num_steps:
            return []
        return [
            f"validation_num_inference_steps: {num_inference_steps} is more than num_ddim_timesteps ({num_steps}); "
            f"set it to {num_steps} at most (4 is usual)"
        ]

    def notices(self, num_inference_steps: int | None) -> list[str]:
        """Returns a line for each thing that works, and that its user should know."""
        return []


class Origin(Edges):
    """The picture itself (LCM, arXiv 2310.04378)."""

    options = frozenset({"num_ddim_timesteps", "timestep_scaling_factor"})

    def times(self, grid: Tensor, index: Tensor, position: Tensor, randomness: Randomness) -> Tensor:
        """Returns [B] the clean edge."""
        return torch.full_like(index, CLEAN_EDGE)

    def sampling(self, base_config: Mapping[str, Any], prediction_type: str) -> "tuple[SchedulerMixin, dict[str, Any]]":
        """Returns LCMScheduler on the trained grid; it picks its steps among the N for every number of them."""
        # Imported here: it takes seconds, which the plan does not have.
        from diffusers.schedulers.scheduling_lcm import LCMScheduler

        scheduler = make_scheduler(
            LCMScheduler,
            base_config,
            original_inference_steps=self.num_ddim_timesteps,
            timestep_scaling=self.timestep_scaling_factor,
            **_of_latents(prediction_type),
        )
        return scheduler, {}

    def notices(self, num_inference_steps: int | None) -> list[str]:
        """Returns what the stock scheduler would do wrong."""
        num_steps, scaling = self.num_ddim_timesteps, self.timestep_scaling_factor
        if (num_steps, scaling) == (_STOCK_STEPS, _STOCK_SCALING):
            return []
        return [
            f"num_ddim_timesteps {num_steps}, timestep_scaling_factor {scaling:g}: load the scheduler from the run "
            "(output_dir/scheduler); LCMScheduler.from_pretrained of the base model always takes 50 and 10"
        ]


class Phased(Edges):
    """The start of the phase that holds the sample: M phases of N / M solver steps (PCM, arXiv 2405.18407)."""

    options = frozenset({"num_ddim_timesteps", "timestep_scaling_factor", "num_phases"})

    @property
    def num_inference_steps(self) -> int:
        """One step a phase: exactly the jumps that were trained."""
        return self.num_phases

    def times(self, grid: Tensor, index: Tensor, position: Tensor, randomness: Randomness) -> Tensor:
        """Returns [B] the grid times at which the phases of (index, index + 1) start.

        The first phase starts at the clean edge, not at the grid's t = 0: so one phase is LCM, exactly.
        """
        length = self.num_ddim_timesteps // self.num_phases
        first = index // length * length
        return torch.where(first == 0, torch.full_like(index, CLEAN_EDGE), grid[first])

    def sampling(self, base_config: Mapping[str, Any], prediction_type: str) -> "tuple[SchedulerMixin, dict[str, Any]]":
        """Returns DDIM with trailing steps: T - 1, then the starts of the phases, then the clean edge."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        # set_alpha_to_one: the last step ends where the first phase starts, at alpha 1. Stable Diffusion's own config
        # says False, which would leave the noise of t = 0 in the picture, with standard deviation 0.029.
        scheduler = make_scheduler(
            DDIMScheduler,
            base_config,
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            **_of_latents(prediction_type),
        )
        return scheduler, {}

    def problems(self, num_train_timesteps: int | None, num_inference_steps: int | None) -> list[str]:
        """Returns why phases, grid and sampling times would not meet."""
        num_steps, num_phases = self.num_ddim_timesteps, self.num_phases
        if num_steps % num_phases:
            return [
                f"distillation_config.num_phases: {num_phases} phases do not divide num_ddim_timesteps ({num_steps}); "
                "40 steps serve 1, 2, 4, 5, 8, 10, 20 and 40 phases"
            ]
        if num_train_timesteps is not None and num_train_timesteps % num_steps:
            return [
                f"distillation_config.num_ddim_timesteps: {num_steps} does not divide the model's "
                f"{num_train_timesteps} training timesteps, so sampling would leave the trained grid; take 40 or 50"
            ]
        if num_inference_steps is None or (num_inference_steps % num_phases, num_steps % num_inference_steps) == (0, 0):
            return []
        allowed = [n for n in range(num_phases, num_steps + 1, num_phases) if num_steps % n == 0]
        return [
            f"validation_num_inference_steps: {num_inference_steps} steps jump over the start of a phase, or between "
            f"the trained times; with {num_phases} phases of {num_steps} solver steps set it to one of "
            f"{', '.join(map(str, allowed))}"
        ]

    def notices(self, num_inference_steps: int | None) -> list[str]:
        """Returns what more steps than phases mean."""
        if num_inference_steps is None or num_inference_steps == self.num_phases:
            return []
        return [
            f"validation_num_inference_steps: {num_inference_steps} steps for {self.num_phases} phases end inside of "
            "phases, where no jump was trained to end; one step a phase is what the student has learned"
        ]


class Random(Edges):
    """A random grid time at or below the solver's result (TCD, arXiv 2402.19159, with its TCF(1)).

    The network is not told the edge, so one prediction has to serve all of them.
    """

    options = frozenset({"num_ddim_timesteps", "eta"})

    def times(self, grid: Tensor, index: Tensor, position: Tensor, randomness: Randomness) -> Tensor:
        """Returns [B] grid times, uniform over the indices 0 ... index.

        The lowest is the grid's t = 0 and not the clean edge, for that is where TCDScheduler's last step ends.
        """
        # In double precision u (index + 1) cannot be rounded up to index + 1.
        chosen = (randomness.uniform("edge", position).double() * (index + 1)).long()
        return grid[chosen]

    def sampling(self, base_config: Mapping[str, Any], prediction_type: str) -> "tuple[SchedulerMixin, dict[str, Any]]":
        """Returns TCDScheduler on the trained grid, and ``eta``, which pipelines leave at 0 otherwise."""
        from diffusers.schedulers.scheduling_tcd import TCDScheduler

        scheduler = make_scheduler(
            TCDScheduler,
            base_config,
            original_inference_steps=self.num_ddim_timesteps,
            **_of_latents(prediction_type),
        )
        return scheduler, {"eta": self.eta}

    def notices(self, num_inference_steps: int | None) -> list[str]:
        """Returns what the stock scheduler would do wrong."""
        if self.num_ddim_timesteps == _STOCK_STEPS:
            return []
        return [
            f"num_ddim_timesteps {self.num_ddim_timesteps}: load the scheduler from the run (output_dir/scheduler); "
            "TCDScheduler.from_pretrained of the base model always takes 50"
        ]


EDGES: Mapping[EdgePolicy, type[Edges]] = {"origin": Origin, "phased": Phased, "random": Random}


def _of_latents(prediction_type: str) -> dict[str, Any]:  # Any: a scheduler's options
    """Returns what every scheduler needs: latents are not bounded by 1, and training clips nothing."""
    return {"prediction_type": prediction_type, "clip_sample": False, "thresholding": False}
