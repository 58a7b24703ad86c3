"""Latent consistency distillation (arXiv 2310.04378) and LCM-LoRA (arXiv 2311.05556).

Student and target jump from two neighbouring noise times of one trajectory to the same edge, and must land on the
same spot. The trajectory is the teacher's, guided; the target is the student itself, never the teacher: with a teacher
target nothing carries what was learned at a low noise time to the next higher one, and the result is no consistency
model.

Shapes: B batch, C latent channels, h w latent size in latent pixels, N = num_ddim_timesteps.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from simpletuner.batch import Batch
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Json, Section, setting
from simpletuner.denoiser import Prediction
from simpletuner.distillers._base import (
    Defaults,
    Distiller,
    Draw,
    LossOutput,
    ModelType,
    Role,
    RunFacts,
    Setting,
    Setup,
    distance,
    draw_latents,
    sample_posterior,
)
from simpletuner.distillers._edges import EDGES, EdgePolicy, Edges
from simpletuner.distillers._solvers import SOLVERS, SolverName
from simpletuner.families._base import LORA_PRESETS
from simpletuner.randomness import Randomness
from simpletuner.schedules import CLEAN_EDGE, DiscreteSchedule, NoiseSchedule

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

_WIDE_W_RANGE = 4.0
"""Above this width of [w_min, w_max] an adapter, which is not told w, visibly learns an average."""


class LCMConfig(Section):
    """Options of ``distillation_method: lcm``."""

    num_ddim_timesteps: int = setting(
        50, "must_match", "Steps of the teacher's solver from noise to picture; inference picks among them.", ge=1
    )
    # The published LCM-LoRAs (arXiv 2311.05556) used 7.5: an adapter is not told w, so a range teaches it an average.
    w_min: float = setting(
        7.5, "may_change", "Lowest guidance the teacher uses, in the paper's form: guidance_scale - 1.", ge=0
    )
    w_max: float = setting(7.5, "may_change", "Highest guidance the teacher uses; drawn uniformly between.", ge=0)
    loss_type: Literal["l2", "huber", "cauchy"] = setting("l2", "may_change", "Distance of student and target.")
    ema_decay: float = setting(
        0.95, "may_change", "For full models: share that the target keeps of itself at each step.", ge=0, lt=1
    )
    huber_c: float = setting(0.001, "may_change", "Where huber turns from square to linear, cauchy to logarithm.", gt=0)
    timestep_scaling_factor: float = setting(
        10.0, "must_match", "Scales the timestep in the boundary scalings; the scheduler must use the same.", gt=0
    )
    edge_policy: EdgePolicy = setting(
        "origin", "must_match", "Where jumps end: the picture, the start of the phase, or a random grid time below."
    )
    num_phases: int = setting(4, "must_match", "For phased edges: parts of the way, each crossed in one step.", ge=1)
    eta: float = setting(
        0.3, "may_change", "For random edges: new noise in each step of sampling, from 0 none to 1 all.", ge=0, le=1
    )
    solver: SolverName = setting(
        "ddim", "may_change", "The teacher's solver; dpm2s is of second order and calls the teacher twice."
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        "may_change",
        "Where the teacher is guided, from 0 the picture to 1 pure noise; elsewhere it is asked once, with the "
        "caption. Saves time; what it does to pictures has to be looked at.",
    )

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min ({self.w_min:g}) is above w_max ({self.w_max:g}); swap them")
        return self

    @field_validator("guidance_interval")
    @classmethod
    def _interval_is_within_the_way(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 <= low < high <= 1:
            raise ValueError(f"[{low:g}, {high:g}] is no interval between 0 and 1, lower end first, such as [0.2, 1]")
        return value

    @property
    def edges(self) -> Edges:
        """Returns the edge policy with its numbers."""
        return EDGES[self.edge_policy](self.num_ddim_timesteps, self.timestep_scaling_factor, self.num_phases, self.eta)


class LCM(Distiller):
    """The student jumps from any noise time to the picture, consistently along the guided teacher's trajectory."""

    Config = LCMConfig
    requires = frozenset({"uncond"})

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert isinstance(setup.config, LCMConfig)
        self.config = setup.config

    @classmethod
    def roles(cls, model_type: ModelType) -> dict[str, Role]:
        """Returns the student and its teacher; a full student has an average of itself as target.

        Under LoRA the teacher is the same weights without the adapter, and the target is the student itself.
        """
        shared: dict[str, Role] = {"student": "train", "teacher": "frozen"}
        return {**shared, "target": "ema"} if model_type == "full" else shared

    @classmethod
    def guidance_embed_dim(cls, model_type: ModelType) -> int | None:
        """Returns 256 for a full student, as the published ones have; an adapter cannot add the embedding."""
        return 256 if model_type == "full" else None

    @classmethod
    def defaults(cls, config: LCMConfig, model_type: ModelType) -> Defaults:
        """Returns the shape of the published LCM-LoRAs, and four steps.

        Guidance is off for an adapter. A full student is told w, which pipelines take from guidance_scale - 1: the
        middle of the range that it was trained with.
        """
        teacher_guidance = (config.w_min + config.w_max) / 2 + 1
        return Defaults(
            LORA_PRESETS["lcm"],
            lora_rank=64,
            validation_num_inference_steps=config.edges.num_inference_steps,
            validation_guidance=teacher_guidance if model_type == "full" else 0.0,
            teacher_guidance=teacher_guidance,
        )

    @classmethod
    def configure(
        cls, given: Mapping[str, Json], objective: Section, setting: Setting | None = None
    ) -> tuple[Any, list[str]]:
        """Returns (the config, notices): a full student is told w, so its range is the family's unless it is given."""
        if setting is not None and setting.model_type == "full":
            given = dict(zip(("w_min", "w_max"), setting.guidance_range, strict=True)) | dict(given)
        return super().configure(given, objective, setting)

    @property
    def ema_decay(self) -> float:
        """The config's; 0.95 is the published scripts'."""
        return self.config.ema_decay

    @classmethod
    def check(cls, config: LCMConfig, facts: RunFacts) -> list[str]:
        """Returns notices about sampling and guidance. Raises UserError when the run could not work."""
        problems = _problems(config, facts)
        if problems:
            raise UserError(*problems)
        return _notices(config, facts)

    def edges(self, index: Tensor, batch: Batch, randomness: Randomness) -> Tensor:
        """Returns [B] the noise times to which student and target jump: in this alone LCM, PCM and TCD differ.

        Args:
            index: [B] grid indices of the solver's results, in [0, N).
            batch: The samples.
            randomness: Of the run.
        """
        return self.config.edges.times(self._grid(batch), index, batch.position, randomness)

    def _grid(self, batch: Batch) -> Tensor:
        """Returns [N + 1] the solver times of pictures of the batch's size."""
        return self.schedule.for_size(*batch.mean.shape[-2:]).grid(self.config.num_ddim_timesteps)

    def draw(self, batch: Batch, randomness: Randomness) -> Draw:
        """Returns noise, two neighbouring grid times, the edge and the guidance of each sample."""
        noise, posterior = draw_latents(batch, randomness)
        config, grid = self.config, self._grid(batch)
        index = randomness.integers("index", batch.position, config.num_ddim_timesteps)
        start, end = grid[index + 1], grid[index]
        return Draw(
            noise,
            posterior,
            start=start,
            end=end,
            middle=self._middle(start, end),
            edge=self.edges(index, batch, randomness),
            w=config.w_min + (config.w_max - config.w_min) * randomness.uniform("w", batch.position),
            guided=self._guided(index),
        )

    def _guided(self, index: Tensor) -> Tensor | None:
        """Returns [R] the places of the samples that start within the guidance interval; None: it is the whole way."""
        low, high = self.config.guidance_interval
        if (low, high) == (0.0, 1.0):
            return None
        share = (index + 1) / self.config.num_ddim_timesteps
        return ((share >= low) & (share <= high)).nonzero().flatten()

    def _middle(self, start: Tensor, end: Tensor) -> Tensor | None:
        """Returns [B] the times at which a solver of second order looks half-way, None for one of first order."""
        if self.config.solver == "ddim":
            return None
        assert isinstance(self.schedule, DiscreteSchedule)  # check refuses the others
        return self.schedule.half_way(start, end)

    def loss(self, role: str, batch: Batch, draw: Draw, step: int) -> LossOutput:
        """Returns the distance of student and target at the edge (arXiv 2310.04378, alg. 1)."""
        assert draw.end is not None
        assert draw.edge is not None
        assert draw.w is not None
        schedule, cond, geometry, w = self.schedule, batch.cond, batch.geometry, draw.w
        x0 = sample_posterior(batch, draw.posterior)
        z_start = schedule.add_noise(x0, draw.noise, draw.start)
        # The student goes last, so that no activations are held while teacher and target run.
        with torch.no_grad():
            uncond, teacher = self.uncond(cond), self.denoisers["teacher"]

            def guided(z: Tensor, t: Tensor) -> Prediction:
                return teacher.guided(z, t, cond, uncond, geometry, w, draw.guided)

            z_end = SOLVERS[self.config.solver](guided, schedule, z_start, draw)
            prediction = self.denoisers["target"](z_end, draw.end, cond, geometry, w)
            target = self._jump(prediction, z_end, draw.end, draw.edge)
        prediction = self.denoisers["student"](z_start, draw.start, cond, geometry, w)
        student = self._jump(prediction, z_start, draw.start, draw.edge)
        per_sample = distance(student, target, self.config.loss_type, self.config.huber_c)
        # A spread that shrinks over the steps is how a collapse, and soft pictures, announce themselves.
        return LossOutput(per_sample, {"target_std": target.std()})

    def _jump(self, prediction: Prediction, z: Tensor, t: Tensor, edge: Tensor) -> Tensor:
        """Returns [B, C, h, w] where a prediction at (z, t) lands at its edge."""
        return jump(self.schedule, prediction, z, t, edge, self.config.timestep_scaling_factor)

    def sampling(self, base_scheduler_config: Mapping[str, Any]) -> "tuple[SchedulerMixin, dict[str, Any]]":
        """Returns the edges' scheduler on the grid that was trained, for a few steps without guidance."""
        edges = self.config.edges
        scheduler, further = edges.sampling(base_scheduler_config, self.denoisers["student"].prediction_type)
        return scheduler, {"num_inference_steps": edges.num_inference_steps, "guidance_scale": 0.0, **further}


def jump(schedule: NoiseSchedule, prediction: Prediction, z: Tensor, t: Tensor, edge: Tensor, scaling: float) -> Tensor:
    """Returns [B, C, h, w] the consistency function: where (z, t) lands at the edge.

    At the clean edge that is c_skip z + c_out x0 (arXiv 2310.04378, eq. 9); at any other the DDIM step to it (phased
    and trajectory consistency, arXiv 2405.18407 and 2402.19159).

    Args:
        schedule: Of the model.
        prediction: Of the network at (z, t).
        z: [B, C, h, w] noisy latents.
        t: [B] their noise times.
        edge: [B] noise times, or CLEAN_EDGE.
        scaling: ``timestep_scaling_factor``.
    """
    column = (-1, *(1 for _ in z.shape[1:]))
    c_skip, c_out = schedule.boundary(t, scaling, prediction.x0.dtype)
    clean = c_skip.reshape(column) * z + c_out.reshape(column) * prediction.x0
    landed = schedule.ddim_step(prediction.x0, prediction.noise, edge)
    return torch.where((edge == CLEAN_EDGE).reshape(column), clean, landed)


def _problems(config: LCMConfig, facts: RunFacts) -> list[str]:
    """Returns a line for each reason why the run could not work."""
    problems: list[str] = []
    num_steps = config.num_ddim_timesteps
    if facts.schedule is not None and not isinstance(facts.schedule, DiscreteSchedule):
        problems.append("distillation_method: consistency distillation is not built yet for flow models")
    if isinstance(facts.schedule, DiscreteSchedule):
        total = facts.schedule.num_train_timesteps
        if facts.schedule.zero_terminal_snr and config.solver != "ddim":
            problems.append(
                f"distillation_config.solver: '{config.solver}' has no middle of a step from pure noise, where a "
                "schedule with zero terminal SNR begins; set it to 'ddim'"
            )
        if num_steps > total:
            problems.append(
                f"distillation_config.num_ddim_timesteps: {num_steps} is above the model's {total} training timesteps"
            )
        elif (top := total // num_steps * num_steps) < _LEAST_COVERAGE * total:
            problems.append(
                f"distillation_config.num_ddim_timesteps: {num_steps} steps of {total // num_steps} timesteps end at "
                f"{top} of {total}, where a picture is left; choose a divisor of {total}, such as 50 or 100"
            )
        low, high = config.guidance_interval
        if not any(low <= (index + 1) / num_steps <= high for index in range(num_steps)):
            problems.append(
                f"distillation_config.guidance_interval: none of the {num_steps} steps from noise to picture starts "
                f"between {low:g} and {high:g}; widen it, or set w_min and w_max to 0 for a teacher without guidance"
            )
        if facts.schedule.zero_terminal_snr and facts.prediction_type == "epsilon":
            problems.append(
                "prediction_type: 'epsilon' says nothing about the picture at the last timestep of a schedule with "
                "zero terminal SNR (rescale_betas_zero_snr); use a v_prediction model, or leave out the rescaling"
            )
    total = facts.schedule.num_train_timesteps if facts.schedule is not None else None
    return problems + config.edges.problems(total, facts.validation_num_inference_steps)


def _notices(config: LCMConfig, facts: RunFacts) -> list[str]:
    """Returns a line for each thing that works, and that its user should know."""
    edges, num_steps = config.edges, config.num_ddim_timesteps
    notices = [
        f"distillation_config.{key}: has no effect with edge_policy '{config.edge_policy}'"
        for key in ("timestep_scaling_factor", "num_phases", "eta")
        if key in config.model_fields_set and key not in edges.options
    ]
    notices += edges.notices(facts.validation_num_inference_steps)
    if isinstance(facts.schedule, DiscreteSchedule) and (total := facts.schedule.num_train_timesteps) % num_steps:
        top = total // num_steps * num_steps - 1
        notices.append(f"num_ddim_timesteps: {num_steps} does not divide {total}; the grid ends at timestep {top}")
    if facts.model_type == "lora" and config.w_max - config.w_min > _WIDE_W_RANGE:
        notices.append(
            f"w_min {config.w_min:g}, w_max {config.w_max:g}: an adapter is not told w, so it learns the average over "
            "the range; the published LCM-LoRAs used 7.5 for both"
        )
    guidance = facts.validation_guidance
    if facts.model_type == "lora" and guidance is not None and guidance > 1:
        notices.append(
            f"validation_guidance: {guidance:g} guides a student that has learned guidance already; 0 is off"
        )
    if facts.model_type == "lora" and "ema_decay" in config.model_fields_set:
        notices.append("distillation_config.ema_decay: has no effect: an adapter's target is the adapter itself")
    scale = (config.w_min + 1, config.w_max + 1)
    if facts.model_type == "full" and guidance is not None and not scale[0] <= guidance <= scale[1]:
        notices.append(
            f"validation_guidance: {guidance:g} was never trained: a full model is told w = guidance_scale - 1, here "
            f"{config.w_min:g} to {config.w_max:g}, so draw with {scale[0]:g} to {scale[1]:g}"
        )
    return notices


_LEAST_COVERAGE = 0.9
"""Least part of the training timesteps that the grid must cover: sampling starts at its top with pure noise."""

PLUGIN = LCM
