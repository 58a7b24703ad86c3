"""A finished run as its folder, or its repository of the hub, tells it: with this its result is drawn and exported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from simpletuner import registry
from simpletuner.chosen import source_of
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Json
from simpletuner.config.files import read_json
from simpletuner.config.schema import SECTIONS
from simpletuner.config.sections import ModelSection
from simpletuner.config.validation import parse_resolutions
from simpletuner.evaluation.pipelines import base_pipeline
from simpletuner.families._base import ModelFamily
from simpletuner.families._lora_file import LORA_FILE
from simpletuner.families._source import ModelSource
from simpletuner.publishing.model_card import looks_like_hub_id
from simpletuner.publishing.result import CONFIG
from simpletuner.training.lycoris import load_lycoris

_DTYPES = ("float32", "bfloat16", "float16")
_NOT_THE_RESULT = ["checkpoint-*", "pipeline/*", "validation/*"]


@dataclass(frozen=True)
class FinishedRun:
    """What a run has written, and what it says of itself."""

    folder: Path
    document: Mapping[str, Any]  # Any: JSON
    other_base: str | None = None
    """Where the base model is, if not where the run had it."""

    def option(self, key: str) -> Json:
        """Returns an option of the config: in sections as the run wrote it, flat as it was published."""
        config = self.document["config"]
        sections = [config[name] for name in SECTIONS] if isinstance(config.get("model"), dict) else [config]
        return next((section[key] for section in sections if key in section), None)

    @cached_property
    def _model(self) -> ModelSection:
        values = {key: self.option(key) for key in ModelSection.model_fields}
        if self.other_base is not None:
            values["pretrained_model_name_or_path"] = self.other_base
        return ModelSection.model_validate({key: value for key, value in values.items() if value is not None})

    @property
    def family_name(self) -> str:
        """The ``model_family``."""
        return self._model.model_family

    @cached_property
    def source(self) -> ModelSource:
        """Where the model is that the run started from."""
        return source_of(self._model)

    @cached_property
    def family(self) -> ModelFamily:
        """The family of that model."""
        return registry.load("families", self.family_name)().for_model(self.source)

    @property
    def dtype(self) -> torch.dtype:
        """Of the result's weights."""
        return getattr(torch, self.document["loading"]["dtype"])

    @property
    def is_adapter(self) -> bool:
        """Whether the result is an adapter, and not a whole network."""
        return self.document["loading"]["network"] is None

    @property
    def is_lycoris(self) -> bool:
        """Whether that adapter is one of LyCORIS."""
        return self.is_adapter and self.option("lora_type") == "lycoris"

    @property
    def method(self) -> str:
        """The name of the method that made it."""
        return str(self.option("distillation_method") or "sft")

    @property
    def scheduler_config(self) -> dict[str, Any]:  # Any: JSON
        """Of the scheduler that is to sample it."""
        return json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf8"))

    @property
    def sampling(self) -> dict[str, Any]:  # Any: JSON
        """The arguments of the pipeline's call with which it is drawn."""
        return dict(self.document["sampling"])

    @property
    def teacher(self) -> tuple[int, float]:
        """Steps and guidance at which the base model draws what the result is to draw; of older runs the usual ones."""
        steps, guidance = self.family.usual_sampling
        told = self.document.get("teacher", {})
        return int(told.get("num_inference_steps", steps)), float(told.get("guidance_scale", guidance))

    def size_px(self, asked: str | None) -> tuple[int, int]:
        """Returns width and height of ``--size``, else of the run's own pictures. Raises UserError."""
        try:
            return parse_resolutions(asked or str(self.option("validation_resolution")))[0]
        except ValueError as error:
            raise UserError(f"--size: {error}") from error

    def pipeline(self, dtype: torch.dtype | None = None) -> Any:  # Any: a diffusers pipeline
        """Returns the pipeline of the result: its files, loaded as any user of diffusers loads them.

        Args:
            dtype: Of all weights; None: the result's own.
        """
        dtype = dtype or self.dtype
        pipeline = base_pipeline(self.family, self.source, dtype)
        if self.is_lycoris:
            load_lycoris(pipeline.unet, self.folder / LORA_FILE)
            return pipeline
        if self.is_adapter:
            pipeline.load_lora_weights(self.folder)
            return pipeline
        network = type(pipeline.unet).from_pretrained(self.folder, torch_dtype=dtype, use_safetensors=True)
        pipeline.register_modules(unet=network.to(pipeline.device))
        return pipeline


def finished_run(name: str | Path, base: str | None = None) -> FinishedRun:
    """Returns the run whose result is in a folder, or in a repository of the hub, which is downloaded first.

    Args:
        name: The output_dir of a run, or the hub id that its result was uploaded to.
        base: Where the base model is; None: where the run had it.

    Raises:
        UserError: No run has finished there, or the hub does not give it.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and looks_like_hub_id(str(name)):
        folder = _downloaded(str(name))
    if not (folder / CONFIG).is_file():
        raise UserError(f"output_dir: '{name}' holds no finished run: train first")
    return FinishedRun(folder, _document(folder / CONFIG), base)


def _document(path: Path) -> dict[str, Any]:  # Any: JSON
    """Returns what a run says of itself. Raises UserError for a file that no run wrote: it may be a stranger's."""
    content: Any = read_json(path, "output_dir")
    has_parts = isinstance(content, dict) and all(
        isinstance(content.get(key), dict) for key in ("config", "loading", "sampling")
    )
    if not has_parts or content["loading"].get("dtype") not in _DTYPES:
        raise UserError(f"output_dir: '{path}' is not what a run writes of itself")
    return content


def _downloaded(repo_id: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, ignore_patterns=_NOT_THE_RESULT))
    except OSError as error:  # what all errors of the hub are, and those of the network
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"output_dir: there is no folder '{repo_id}', and the hub gives no repository of that name ({reason})"
        ) from error
