"""The stock diffusers pipeline of the model that a run starts from, and what tells one such model from another."""

from typing import Any

import torch

from simpletuner.families._base import ModelFamily, Part
from simpletuner.families._fingerprint import fingerprint
from simpletuner.families._source import ModelSource
from simpletuner.plan import Plan
from simpletuner.publishing.export import whole_pipeline


def base_pipeline(family: ModelFamily, source: ModelSource, dtype: torch.dtype) -> Any:  # Any: the family's pipeline
    """Returns the pipeline of the model that a run starts from, in the dtype of its weights."""
    family = family.for_model(source)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return whole_pipeline(family, source, family.load(source, dtype), None).to(device, dtype)


def identity(plan: Plan) -> str:
    """Returns a digest of everything of the base model that decides its pictures."""
    parts: tuple[Part, ...] = ("vae", "text")
    digests = [plan.family.fingerprint(plan.source, part) for part in parts]
    return "-".join([fingerprint(plan.source.weights("unet"), ()), *digests])
