"""Draws pictures with the stock diffusers pipeline of a family, from cached text features."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from simpletuner.batch import Cond
from simpletuner.data.cache import digest
from simpletuner.denoiser import adapters_off
from simpletuner.distillers._base import own_scheduler
from simpletuner.families._base import ModelFamily
from simpletuner.plan import Plan
from simpletuner.training.adapters import inference_dtype
from simpletuner.training.build import Run


@dataclass(frozen=True)
class SamplingSettings:
    """How a picture is drawn; everything that decides its pixels beside the weights, the prompt and the size."""

    scheduler: Any  # Any: a diffusers SchedulerMixin, which is imported only where pictures are drawn
    num_inference_steps: int
    guidance_scale: float
    """As diffusers counts it; 0 and 1 both mean off."""
    options: Mapping[str, Any]  # Any: further arguments of the pipeline's call
    """Such as guidance_rescale."""

    def identity(self, negative_prompt: str) -> str:
        """Returns a digest of all of it, and of the negative prompt."""
        scheduler = type(self.scheduler).__name__, dict(self.scheduler.config)
        numbers = self.num_inference_steps, self.guidance_scale, dict(self.options), negative_prompt
        return digest(json.dumps([scheduler, numbers], sort_keys=True, default=str))


def student_settings(plan: Plan, run: Run) -> SamplingSettings:
    """Returns how the result is drawn: as the method says, unless the config says otherwise."""
    scheduler, arguments = run.distiller.sampling(_scheduler_config(plan))
    validation = plan.validation  # its numbers are the method's own, unless the config says otherwise
    further = {key: value for key, value in arguments.items() if key not in ("num_inference_steps", "guidance_scale")}
    options = further | dict(_options(plan))
    return SamplingSettings(scheduler, validation.num_inference_steps, validation.guidance_scale, options)


def base_settings(plan: Plan) -> SamplingSettings:
    """Returns how the base model draws at its own settings, to compare with."""
    steps, guidance = plan.family.usual_sampling
    scheduler = own_scheduler(_scheduler_config(plan), plan.config.model.prediction_type)
    return SamplingSettings(scheduler, steps, guidance, _options(plan))


def _scheduler_config(plan: Plan) -> Mapping[str, Any]:
    """Returns the model's own scheduler config: by now it is on this machine."""
    config = plan.family.facts(plan.source).scheduler_config
    assert config is not None
    return config


def _options(plan: Plan) -> Mapping[str, Any]:
    rescale = plan.validation.guidance_rescale
    return {"guidance_rescale": rescale} if rescale else {}


@torch.no_grad()
def draw_picture(
    family: ModelFamily,
    module: nn.Module,
    vae: nn.Module,
    settings: SamplingSettings,
    cond: Cond,
    negative: Cond,
    size_px: tuple[int, int],
    seed: int,
    use_adapter: bool,
) -> Image:
    """Returns one picture.

    Args:
        family: Knows the pipeline of its models.
        module: The network, not wrapped; its trainable weights are rounded to its own dtype for the picture.
        vae: The decoder, on the module's device.
        settings: The sampler and its numbers.
        cond: Features of the prompt, [1, ...] each.
        negative: Features of the negative prompt, [1, ...] each; unused with guidance off.
        size_px: Width and height.
        seed: Of the initial noise, drawn on the CPU.
        use_adapter: False draws with the base model.
    """
    device, dtype = next(module.parameters()).device, base_dtype(module)
    pipeline = family.pipeline(module, settings.scheduler, vae)
    pipeline.set_progress_bar_config(disable=True)
    guided = settings.guidance_scale > 1
    inputs = family.pipeline_inputs(_moved(cond, device, dtype), _moved(negative, device, dtype) if guided else None)
    was_training = module.training
    module.eval()
    with nullcontext() if use_adapter else adapters_off(module), inference_dtype(module, dtype):
        picture = pipeline(
            **inputs,
            width=size_px[0],
            height=size_px[1],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            **settings.options,
        ).images[0]
    module.train(was_training)
    return picture


def base_dtype(module: nn.Module) -> torch.dtype:
    """Returns the dtype of the network's own weights: of the first one that is not an adapter's."""
    return next(p.dtype for name, p in module.named_parameters() if "lora_" not in name)


def _moved(cond: Cond, device: torch.device, dtype: torch.dtype) -> Cond:
    return {key: value.to(device, dtype) for key, value in cond.items()}
