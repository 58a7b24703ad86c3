"""The stock diffusers pipelines that are compared: of a run's base model, and of what the run has written."""

import json
from pathlib import Path
from typing import Any

import torch

from simpletuner.config.errors import UserError
from simpletuner.families._base import Part
from simpletuner.families._fingerprint import fingerprint
from simpletuner.plan import Plan
from simpletuner.publishing.export import whole_pipeline
from simpletuner.publishing.result import CONFIG


def base_pipeline(plan: Plan) -> Any:  # Any: of the family's pipeline class
    """Returns the pipeline of the model that a run starts from, in the dtype of its weights."""
    family = plan.family.for_model(plan.source)
    network = family.load(plan.source, plan.weight_dtype)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return whole_pipeline(family, plan.source, network, None).to(device, plan.weight_dtype)


def result_pipeline(plan: Plan, folder: Path) -> Any:  # Any: of the family's pipeline class
    """Returns the pipeline of a finished run: its files, loaded as any user of diffusers loads them.

    Raises:
        UserError: No run has finished in the folder.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"output_dir: '{folder}' holds no finished run to evaluate: train first")
    pipeline = base_pipeline(plan)
    if plan.lora is not None:
        pipeline.load_lora_weights(folder)
        return pipeline
    network = type(pipeline.unet).from_pretrained(folder, torch_dtype=plan.weight_dtype, use_safetensors=True)
    pipeline.register_modules(unet=network.to(pipeline.device))
    return pipeline


def result_sampling(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:  # Any: JSON
    """Returns the config of a result's scheduler, and the arguments of the call with which it is drawn."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf8"))
    return scheduler, json.loads((folder / CONFIG).read_text(encoding="utf8"))["sampling"]


def identity(plan: Plan) -> str:
    """Returns a digest of everything of the base model that decides its pictures."""
    parts: tuple[Part, ...] = ("vae", "text")
    digests = [plan.family.fingerprint(plan.source, part) for part in parts]
    return "-".join([fingerprint(plan.source.weights("unet"), ()), *digests])
