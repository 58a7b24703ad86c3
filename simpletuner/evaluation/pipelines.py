"""The stock diffusers pipelines that are compared: of a run's base model, and of what the run has written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simpletuner import registry
from simpletuner.chosen import source_of
from simpletuner.config.errors import UserError
from simpletuner.config.sections import ModelSection
from simpletuner.families._base import ModelFamily, Part
from simpletuner.families._fingerprint import fingerprint
from simpletuner.families._source import ModelSource
from simpletuner.plan import Plan
from simpletuner.publishing.export import whole_pipeline
from simpletuner.publishing.result import CONFIG


def base_pipeline(family: ModelFamily, source: ModelSource, dtype: torch.dtype) -> Any:  # Any: the family's pipeline
    """Returns the pipeline of the model that a run starts from, in the dtype of its weights."""
    family = family.for_model(source)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return whole_pipeline(family, source, family.load(source, dtype), None).to(device, dtype)


def result_pipeline(family: ModelFamily, source: ModelSource, dtype: torch.dtype, folder: Path) -> Any:  # Any: as above
    """Returns the pipeline of a finished run: its files, loaded as any user of diffusers loads them.

    Raises:
        UserError: No run has finished in the folder.
    """
    is_adapter = result_document(folder)["loading"]["network"] is None
    pipeline = base_pipeline(family, source, dtype)
    if is_adapter:
        pipeline.load_lora_weights(folder)
        return pipeline
    network = type(pipeline.unet).from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    pipeline.register_modules(unet=network.to(pipeline.device))
    return pipeline


def result_base(document: Mapping[str, Any]) -> tuple[ModelFamily, ModelSource, torch.dtype]:  # Any: JSON
    """Returns the family and the place of the model that a finished run started from, and the dtype of its weights."""
    model = ModelSection.model_validate(document["config"]["model"])
    family = registry.load("families", model.model_family)()
    return family, source_of(model), getattr(torch, document["loading"]["dtype"])


def result_document(folder: Path) -> dict[str, Any]:  # Any: JSON
    """Returns what a finished run says of itself. Raises UserError when none has finished in the folder."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"output_dir: '{folder}' holds no finished run: train first")
    return json.loads((folder / CONFIG).read_text(encoding="utf8"))


def result_sampling(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:  # Any: JSON
    """Returns the config of a result's scheduler, and the arguments of the call with which it is drawn."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf8"))
    return scheduler, result_document(folder)["sampling"]


def identity(plan: Plan) -> str:
    """Returns a digest of everything of the base model that decides its pictures."""
    parts: tuple[Part, ...] = ("vae", "text")
    digests = [plan.family.fingerprint(plan.source, part) for part in parts]
    return "-".join([fingerprint(plan.source.weights("unet"), ()), *digests])
