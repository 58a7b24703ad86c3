"""Plain fine-tuning with the model's own objective (epsilon, v, sample or flow): the method of a run without one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.batch import Batch
from simpletuner.config.errors import UserError
from simpletuner.config.schema import ObjectiveSection
from simpletuner.distillers._base import (
    Distiller,
    Draw,
    LossOutput,
    ModelType,
    Role,
    RunFacts,
    Setup,
    distance,
    draw_latents,
    own_scheduler,
    sample_posterior,
)
from simpletuner.randomness import Randomness
from simpletuner.schedules import FlowSchedule, NoiseSchedule

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class SFT(Distiller):
    """The network learns to predict what was mixed into its input."""

    Config = ObjectiveSection

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert isinstance(setup.config, ObjectiveSection)
        self.config = setup.config

    @classmethod
    def roles(cls, model_type: ModelType) -> dict[str, Role]:
        """Returns the student alone."""
        return {"student": "train"}

    @classmethod
    def check(cls, config: ObjectiveSection, facts: RunFacts) -> list[str]:
        """Returns no notices. Raises UserError for a weighting that the noise schedule has not."""
        if config.snr_gamma is not None and isinstance(facts.schedule, FlowSchedule):
            raise UserError("snr_gamma: there is no such weighting for flow models; leave the key out")
        return []

    def draw(self, batch: Batch, randomness: Randomness) -> Draw:
        """Returns noise (with its offset, if that is on) and one training time a sample."""
        noise, posterior = draw_latents(batch, randomness)
        if self.config.offset_noise:
            offset = randomness.normal("noise_offset", batch.position, (batch.mean.shape[1], 1, 1))
            noise = noise + self.config.noise_offset * offset
        schedule = self.schedule.for_size(*batch.mean.shape[-2:])
        return Draw(noise, posterior, start=schedule.time(randomness.uniform("timestep", batch.position)))

    def loss(self, role: str, batch: Batch, draw: Draw, step: int) -> LossOutput:
        """Returns the weighted distance of the network's raw prediction from its target."""
        student, schedule = self.denoisers["student"], self.schedule
        x0 = sample_posterior(batch, draw.posterior)
        x_t = schedule.add_noise(x0, draw.noise, draw.start)
        prediction = student(x_t, draw.start, batch.cond, batch.geometry)
        target = schedule.prediction_target(x0, draw.noise, draw.start, student.prediction_type)
        per_sample = distance(prediction.raw, target, self.config.loss_type, self.config.huber_c)
        if self.config.snr_gamma is not None:
            weight = min_snr_weight(schedule, draw.start, student.prediction_type, self.config.snr_gamma)
            per_sample = weight.to(per_sample.dtype) * per_sample
        return LossOutput(per_sample, {})

    def sampling(self, base_scheduler_config: Mapping[str, Any]) -> "tuple[SchedulerMixin, dict[str, Any]]":
        """Returns the base model's own scheduler, and usual settings for it."""
        flow = isinstance(self.schedule, FlowSchedule)  # flow schedulers know one prediction alone
        scheduler = own_scheduler(base_scheduler_config, None if flow else self.denoisers["student"].prediction_type)
        return scheduler, {"num_inference_steps": 30, "guidance_scale": 5.0}


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Returns [B] float32 weights that make the loss on x0 weigh min(SNR, gamma) (arXiv 2303.09556, sec. 3.4).

    The loss on epsilon is SNR times the loss on x0, the loss on v is SNR + 1 times. The formulas below are
    min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1) without a division by an SNR of 0.

    Args:
        schedule: A variance preserving schedule.
        t: [B] noise times.
        prediction_type: epsilon, v_prediction or sample.
        gamma: The bound of the signal-to-noise ratio.
    """
    alpha2, sigma2 = schedule.alpha(t) ** 2, schedule.sigma(t) ** 2
    if prediction_type == "epsilon":
        return (gamma * sigma2 / alpha2).clamp(max=1)
    if prediction_type == "v_prediction":
        return torch.minimum(alpha2, gamma * sigma2)
    return (alpha2 / sigma2).clamp(max=gamma)


PLUGIN = SFT
