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
from pydantic import model_validator
from torch import Tensor

from simpletuner.batch import Batch
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Section, setting
from simpletuner.denoiser import Prediction
from simpletuner.distillers._base import (
    Defaults,
    Distiller,
    Draw,
    LossOutput,
    ModelType,
    Role,
    RunFacts,
    Setup,
    distance,
    draw_latents,
    make_scheduler,
    sample_posterior,
)
from simpletuner.randomness import Randomness
from simpletuner.schedules import CLEAN_EDGE, DiscreteSchedule, NoiseSchedule

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

_STOCK_STEPS, _STOCK_SCALING = 50, 10.0
"""What ``LCMScheduler.from_pretrained`` of a base model's scheduler always uses."""

_WIDE_W_RANGE = 4.0
"""Above this width of [w_min, w_max] an adapter, which is not told w, visibly learns an average."""


class LCMConfig(Section):
    """Options of ``distillation_method: lcm``."""

    num_ddim_timesteps: int = setting(
        50, "must_match", "Steps of the teacher's DDIM solver from noise to picture; inference picks among them.", ge=1
    )
    # The published LCM-LoRAs (arXiv 2311.05556) used 7.5: an adapter is not told w, so a range teaches it an average.
    w_min: float = setting(
        7.5, "may_change", "Lowest guidance the teacher uses, in the paper's form: guidance_scale - 1.", ge=0
    )
    w_max: float = setting(7.5, "may_change", "Highest guidance the teacher uses; drawn uniformly between.", ge=0)
    loss_type: Literal["l2", "huber"] = setting("l2", "may_change", "Distance of student and target.")
    huber_c: float = setting(0.001, "may_change", "Where huber turns from square to linear.", gt=0)
    timestep_scaling_factor: float = setting(
        10.0, "must_match", "Scales the timestep in the boundary scalings; the scheduler must use the same.", gt=0
    )

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min ({self.w_min:g}) is above w_max ({self.w_max:g}); swap them")
        return self


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
        """Returns the student and its teacher: under LoRA the same weights without the adapter."""
        return {"student": "train", "teacher": "frozen"}

    @classmethod
    def defaults(cls, model_type: ModelType) -> Defaults:
        """Returns the shape of the published LCM-LoRAs, and four steps without guidance."""
        return Defaults(LORA_TARGETS, lora_rank=64, validation_num_inference_steps=4, validation_guidance=0.0)

    @classmethod
    def check(cls, config: LCMConfig, facts: RunFacts) -> list[str]:
        """Returns notices about sampling and guidance. Raises UserError when the run could not work."""
        problems = _problems(config, facts)
        if problems:
            raise UserError(*problems)
        return _notices(config, facts)

    def edges(self, index: Tensor, batch: Batch, randomness: Randomness) -> Tensor:
        """Returns [B] the noise times to which student and target jump: here the picture itself.

        Other consistency methods differ in this policy alone: the start of the phase that holds the sample (PCM), or a
        random time below it (TCD).

        Args:
            index: [B] grid indices of the solver's results, in [0, N).
            batch: The samples.
            randomness: Of the run; a random policy has its own stream.
        """
        return torch.full_like(index, CLEAN_EDGE)

    def draw(self, batch: Batch, randomness: Randomness) -> Draw:
        """Returns noise, two neighbouring grid times, the edge and the guidance of each sample."""
        noise, posterior = draw_latents(batch, randomness)
        config = self.config
        grid = self.schedule.for_size(*batch.mean.shape[-2:]).grid(config.num_ddim_timesteps)
        index = randomness.integers("index", batch.position, config.num_ddim_timesteps)
        return Draw(
            noise,
            posterior,
            start=grid[index + 1],
            end=grid[index],
            edge=self.edges(index, batch, randomness),
            w=config.w_min + (config.w_max - config.w_min) * randomness.uniform("w", batch.position),
        )

    def loss(self, role: str, batch: Batch, draw: Draw, step: int) -> LossOutput:
        """Returns the distance of student and target at the edge (arXiv 2310.04378, alg. 1)."""
        assert draw.end is not None
        assert draw.edge is not None
        assert draw.w is not None
        schedule, cond, geometry = self.schedule, batch.cond, batch.geometry
        x0 = sample_posterior(batch, draw.posterior)
        z_start = schedule.add_noise(x0, draw.noise, draw.start)
        # The student goes last, so that no activations are held while teacher and target run.
        with torch.no_grad():
            teacher = self.denoisers["teacher"].guided(z_start, draw.start, cond, self.uncond(cond), geometry, draw.w)
            z_end = schedule.ddim_step(teacher.x0, teacher.noise, draw.end)
            prediction = self.denoisers["target"](z_end, draw.end, cond, geometry)
            target = self._jump(prediction, z_end, draw.end, draw.edge)
        prediction = self.denoisers["student"](z_start, draw.start, cond, geometry)
        student = self._jump(prediction, z_start, draw.start, draw.edge)
        per_sample = distance(student, target, self.config.loss_type, self.config.huber_c)
        # A spread that shrinks over the steps is how a collapse, and soft pictures, announce themselves.
        return LossOutput(per_sample, {"target_std": target.std()})

    def _jump(self, prediction: Prediction, z: Tensor, t: Tensor, edge: Tensor) -> Tensor:
        """Returns [B, C, h, w] where a prediction at (z, t) lands at its edge."""
        return jump(self.schedule, prediction, z, t, edge, self.config.timestep_scaling_factor)

    def sampling(self, base_scheduler_config: Mapping[str, Any]) -> "tuple[SchedulerMixin, dict[str, Any]]":
        """Returns LCMScheduler on the grid that was trained, for four steps without guidance."""
        # Imported here: it takes seconds, which the plan does not have.
        from diffusers.schedulers.scheduling_lcm import LCMScheduler

        scheduler = make_scheduler(
            LCMScheduler,
            base_scheduler_config,
            original_inference_steps=self.config.num_ddim_timesteps,
            timestep_scaling=self.config.timestep_scaling_factor,
            prediction_type=self.denoisers["student"].prediction_type,
            # Latents are not bounded by 1, and training clips nothing; DDIM's own default would.
            clip_sample=False,
            thresholding=False,
        )
        return scheduler, {"num_inference_steps": 4, "guidance_scale": 0.0}


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
    if facts.model_type == "full":
        problems.append("model_type: 'full' is not built yet for lcm; set model_type to 'lora'")
    if facts.schedule is not None and not isinstance(facts.schedule, DiscreteSchedule):
        problems.append("distillation_method: 'lcm' is not built yet for flow models")
    if isinstance(facts.schedule, DiscreteSchedule):
        total = facts.schedule.num_train_timesteps
        if num_steps > total:
            problems.append(
                f"distillation_config.num_ddim_timesteps: {num_steps} is above the model's {total} training timesteps"
            )
        elif (top := total // num_steps * num_steps) < _LEAST_COVERAGE * total:
            problems.append(
                f"distillation_config.num_ddim_timesteps: {num_steps} steps of {total // num_steps} timesteps end at "
                f"{top} of {total}, where a picture is left; choose a divisor of {total}, such as 50 or 100"
            )
        if facts.schedule.zero_terminal_snr and facts.prediction_type == "epsilon":
            problems.append(
                "prediction_type: 'epsilon' says nothing about the picture at the last timestep of a schedule with "
                "zero terminal SNR (rescale_betas_zero_snr); use a v_prediction model, or leave out the rescaling"
            )
    steps = facts.validation_num_inference_steps
    if steps is not None and steps > num_steps:
        problems.append(
            f"validation_num_inference_steps: {steps} is more than num_ddim_timesteps ({num_steps}); "
            f"set it to {num_steps} at most (4 is usual)"
        )
    return problems


def _notices(config: LCMConfig, facts: RunFacts) -> list[str]:
    """Returns a line for each thing that works, and that its user should know."""
    notices: list[str] = []
    num_steps, scaling = config.num_ddim_timesteps, config.timestep_scaling_factor
    if (num_steps, scaling) != (_STOCK_STEPS, _STOCK_SCALING):
        notices.append(
            f"num_ddim_timesteps {num_steps}, timestep_scaling_factor {scaling:g}: load the scheduler from the run "
            "(output_dir/scheduler); LCMScheduler.from_pretrained of the base model always takes 50 and 10"
        )
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
    return notices


_LEAST_COVERAGE = 0.9
"""Least part of the training timesteps that the grid must cover: sampling starts at its top with pure noise."""

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Targets of the published LCM-LoRAs: 196.8M parameters at rank 64 on SDXL, 67.3M on SD 1.5."""

PLUGIN = LCM
