"""Writes what a run has learnt in the formats that stock diffusers loads; each file appears whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.atomic import files_into
from simpletuner.families._base import ModelFamily, Part
from simpletuner.families._source import Json, ModelSource


def write_lora(
    folder: Path, family: ModelFamily, state: Mapping[str, Tensor], metadata: Json, scheduler: Any
) -> Path:  # Any: diffusers' schedulers share no public base with types
    """Writes an adapter and the scheduler to sample it with; returns the adapter's file.

    Args:
        folder: Where to; made if need be.
        family: Knows the format.
        state: peft's state dict of the adapted network (``get_peft_model_state_dict``).
        metadata: ``LoraConfig.to_dict()``: without it alpha is lost.
        scheduler: The method's own; few-step models are sampled right with no other.
    """
    write_scheduler(folder, scheduler)
    return family.save_lora(folder, state, metadata)


def write_model(folder: Path, module: nn.Module, scheduler: Any) -> None:  # Any: see write_lora
    """Writes a whole network and its scheduler.

    ``UNet2DConditionModel.from_pretrained(folder)`` loads it as it was trained, with ``variant="fp16"`` in half the
    bytes of float32.
    """
    write_scheduler(folder, scheduler)
    write_network(folder, module)


def write_network(folder: Path, module: nn.Module) -> None:
    """Writes a network's config and weights, in its own dtype and as the variant fp16."""
    with files_into(folder) as temporary:
        _diffusers(module).save_pretrained(temporary, safe_serialization=True)
        # Made on the CPU: the device may have no room for a copy beside the optimizer.
        diffusers_class: Any = type(module)  # Any: see _diffusers
        half = nn.Module.to(diffusers_class.from_config(_diffusers(module).config), torch.float16)
        half.load_state_dict({name: value.to("cpu", torch.float16) for name, value in module.state_dict().items()})
        _diffusers(half).save_pretrained(temporary, safe_serialization=True, variant="fp16")


def whole_pipeline(family: ModelFamily, source: ModelSource, network: nn.Module, scheduler: Any) -> Any:  # diffusers'
    """Returns the stock pipeline of a network with its model's own VAE and text encoders, these in float32 on the CPU.

    transformers loads its models as they were saved, and diffusers all others in float32: what is saved in another
    dtype is mixed up; and families refuse to encode in float16.
    """
    parts = frozenset[Part]({"vae", "text"})
    encoders: Any = family.load_encoders(source, torch.device("cpu"), torch.float32, parts)  # Any: the family's own
    return family.pipeline(network, scheduler, encoders.vae, encoders)


def write_pipeline(folder: Path, pipeline: Any) -> Path:  # Any: a diffusers pipeline
    """Writes a whole pipeline, for ``DiffusionPipeline.from_pretrained``; returns its folder."""
    with files_into(folder) as temporary:
        pipeline.save_pretrained(temporary / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def write_scheduler(folder: Path, scheduler: Any) -> Path:  # Any: see write_lora
    """Writes ``scheduler/scheduler_config.json``, which ``from_pretrained(folder, subfolder="scheduler")`` reads."""
    with files_into(folder) as temporary:
        scheduler.save_pretrained(temporary / "scheduler")
    return folder / "scheduler" / "scheduler_config.json"


def _diffusers(module: nn.Module) -> Any:  # Any: ModelMixin, whose type would import diffusers here
    if not hasattr(module, "save_pretrained"):
        raise TypeError(f"{type(module).__name__} is no diffusers network; give it without its wrapper")
    return module
