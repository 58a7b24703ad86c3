"""What a run has learnt, in the files that other programs read: ``simpletuner export``."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.distillers._base import own_scheduler
from simpletuner.evaluation.pipelines import result_base, result_document, result_pipeline, result_sampling
from simpletuner.families._base import ModelFamily
from simpletuner.families._lora_file import LORA_FILE
from simpletuner.families._source import ModelSource
from simpletuner.publishing.layouts import (
    CHECKPOINT_PREFIX,
    Blocks,
    NoLayout,
    checkpoint_unet,
    effective_alphas,
    kohya_lora,
    original_module,
)

Format = Literal["kohya", "pipeline", "checkpoint"]
_LORA_METADATA = "lora_adapter_metadata"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Result:
    """A finished run, as its folder tells it."""

    folder: Path
    document: dict[str, Any]  # Any: JSON
    family: ModelFamily
    source: ModelSource

    @property
    def family_name(self) -> str:
        return self.document["config"]["model"]["model_family"]

    @property
    def is_adapter(self) -> bool:
        return self.document["loading"]["network"] is None


def export(run: Path, to: Format, output: Path, dtype: str | None = None, force: bool = False) -> Iterator[str]:
    """Writes the result of a run in another format; yields a line for a person on each thing that was written.

    Args:
        run: The output_dir of a finished run.
        to: kohya: an adapter's file for ComfyUI and others; pipeline: a folder for ``from_pretrained``, the adapter in
            its weights; checkpoint: one file with the names of the original release.
        output: The file or the folder.
        dtype: fp32, bf16 or fp16; None: the run's own.
        force: Overwrite what is there.

    Raises:
        UserError: No run has finished there, or its result cannot be had so.
    """
    if output.exists() and not force:
        raise UserError(f"--output: '{output}' is there already; --force overwrites it")
    document = result_document(run)
    family, source, own_dtype = result_base(document)
    result = _Result(run, document, family.for_model(source), source)
    number = own_dtype if dtype is None else _DTYPES[dtype]
    ways: dict[Format, Callable[[_Result, Path, torch.dtype], Iterator[str]]] = {
        "kohya": _kohya,
        "pipeline": _pipeline,
        "checkpoint": _checkpoint,
    }
    try:
        yield from ways[to](result, output, number)
    except NoLayout as error:
        raise UserError(f"--to {to}: there is no place in that format for {error}; use pipeline") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"--to {to}: '{output}' cannot be written, or the run's files not read: {error}") from error


def _kohya(result: _Result, output: Path, dtype: torch.dtype) -> Iterator[str]:
    """Writes an adapter with kohya's names."""
    if not result.is_adapter:
        raise UserError("--to kohya: this run trained a whole model, not an adapter; use checkpoint or pipeline")
    with safe_open(result.folder / LORA_FILE, framework="pt") as file:
        state = {name.removeprefix("unet."): file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
        told = json.loads((file.metadata() or {}).get(_LORA_METADATA, "{}"))
    config = {key.removeprefix("unet."): value for key, value in told.items()}
    names = _original_names(result, state) if result.family_name == "sdxl" else {}
    alphas = effective_alphas(state, config)
    renamed = kohya_lora(state, alphas, names)
    ranks = {value.shape[0] for name, value in state.items() if name.endswith("lora_A.weight")}
    metadata = _metadata(result, "lora") | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(alphas.values())),
        "ss_base_model_version": "sdxl_base_v1-0" if result.family_name == "sdxl" else "sd_v1",
        "ss_sd_model_name": result.source.path.rstrip("/").rpartition("/")[2],
    }
    yield _write_file(output, renamed, metadata)


def _original_names(result: _Result, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns module -> its name in the original release, of the modules that an adapter is on."""
    shapes = result.family.facts(result.source).shapes  # of a single file they are not known by diffusers' names
    blocks = Blocks.of(shapes or result.family.load(result.source, torch.bfloat16).state_dict())
    modules = {name.partition(".lora_")[0] for name in state}
    return {module: original_module(module, blocks) for module in modules}


def _pipeline(result: _Result, output: Path, dtype: torch.dtype) -> Iterator[str]:
    """Writes a whole pipeline, with the adapter in the weights of its network."""
    pipeline = _fused(result, dtype)
    with files_into(output.parent) as made:
        pipeline.save_pretrained(made / output.name, safe_serialization=True)
        if output.is_dir():  # its files would stay among the new ones
            shutil.rmtree(output)
    yield f"pipeline in {str(dtype).removeprefix('torch.')}: {output}"


def _checkpoint(result: _Result, output: Path, dtype: torch.dtype) -> Iterator[str]:
    """Writes the network as a file with the names of the original release; with the rest of the model if it came so."""
    unet = _fused(result, dtype).unet
    state = {name: value.detach().cpu().contiguous() for name, value in unet.state_dict().items()}
    tensors = checkpoint_unet(state)
    place = result.source.place("unet")
    rest: dict[str, Tensor] = {}
    if place.kind == "file":
        with safe_open(place.path, framework="pt") as file:
            others = [name for name in file.keys() if not name.startswith(CHECKPOINT_PREFIX)]  # noqa: SIM118
            rest = {name: file.get_tensor(name) for name in others}
    yield _write_file(output, rest | tensors, _metadata(result, ""))
    if not rest:
        yield "it holds the UNet alone (in ComfyUI: Load Diffusion Model): the base is no file to take the rest of"


def _fused(result: _Result, dtype: torch.dtype) -> Any:  # Any: a diffusers pipeline
    """Returns the pipeline of a run with its own scheduler, the adapter added to the weights in float32."""
    pipeline = result_pipeline(result.family, result.source, torch.float32, result.folder)
    if result.is_adapter:
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    pipeline.register_modules(scheduler=own_scheduler(result_sampling(result.folder)[0]))
    return pipeline.to(dtype)


def _metadata(result: _Result, kind: str) -> dict[str, str]:
    """Returns what a file says of itself, after https://github.com/Stability-AI/ModelSpec."""
    scheduler, sampling = result_sampling(result.folder)
    method = result.document["config"]["distillation"]["distillation_method"] or "sft"
    base = result.source.path.rstrip("/").rpartition("/")[2]
    architecture = "stable-diffusion-xl-v1-base" if result.family_name == "sdxl" else "stable-diffusion-v1"
    name = scheduler.get("_class_name", "")
    how = ", ".join(f"{key} {value}" for key, value in sampling.items())
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}" if kind else architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{base}, {method}, step {result.document['step']}",
        "modelspec.prediction_type": "v" if scheduler.get("prediction_type") == "v_prediction" else "epsilon",
        "modelspec.usage_hint": f"{name}, {how}",
        "simpletuner.base_model": base,
        "simpletuner.method": method,
        "simpletuner.sampling": json.dumps({"scheduler": name, **sampling}),
    }


def _write_file(output: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Writes one safetensors file, atomically; returns a line for a person."""
    with files_into(output.parent) as made:
        save_file(dict(tensors), made / output.name, dict(metadata))
    return f"{len(tensors)} tensors, {output.stat().st_size / 1e6:.1f} MB: {output}"
