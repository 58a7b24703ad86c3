"""What a run has learnt, in the files that other programs read: ``simpletuner export``."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.distillers._base import own_scheduler
from simpletuner.evaluation.finished import FinishedRun, finished_run
from simpletuner.families._lora_file import LORA_FILE
from simpletuner.importing import import_adapter
from simpletuner.publishing.layouts import (
    CHECKPOINT_PREFIX,
    Blocks,
    NoLayout,
    checkpoint_unet,
    effective_alphas,
    kohya_lora,
    original_module,
)
from simpletuner.training.lycoris import merge_lycoris

Format = Literal["kohya", "pipeline", "checkpoint", "diffusers"]
_VERSIONS = {
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
}
"""ModelSpec's architecture -> kohya's version of the base."""
_SD2_WIDTH = 1024
"""Of its text features."""
_LORA_METADATA = "lora_adapter_metadata"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    run: str | Path,
    to: Format,
    output: Path,
    dtype: str | None = None,
    force: bool = False,
    base: str | None = None,
    variant: str | None = None,
) -> Iterator[str]:
    """Writes the result of a run in another format; yields a line for a person on each thing that was written.

    Args:
        run: The output_dir of a finished run, or the hub id that its result was uploaded to.
        to: kohya: an adapter's file for ComfyUI and others; pipeline: a folder for ``from_pretrained``, the adapter in
            its weights; checkpoint: one file with the names of the original release; diffusers: of an adapter's file
            in place of a run, a folder for ``load_lora_weights``.
        output: The file or the folder.
        dtype: fp32, bf16 or fp16; None: the run's own (of a file: fp32).
        force: Overwrite what is there.
        base: Where the base model is; None: where the run had it.
        variant: Of a pipeline: the word in its weights' names, by which ``from_pretrained`` finds them.

    Raises:
        UserError: No run has finished there, or its result cannot be had so.
    """
    if variant is not None and to != "pipeline":
        raise UserError(f"--variant: --to {to} writes one file, which has none; leave it out")
    if (Path(run).suffix == ".safetensors") != (to == "diffusers"):
        raise UserError(
            "--to diffusers: it is for an adapter's .safetensors file, and the others are for finished runs"
        )
    if to == "diffusers":
        yield from import_adapter(Path(run), base, output, _DTYPES[dtype or "fp32"], force)
        return
    if output.exists() and not force:
        raise UserError(f"--output: '{output}' is there already; --force overwrites it")
    result = finished_run(run, base)
    number = result.dtype if dtype is None else _DTYPES[dtype]
    ways: dict[Format, Callable[[FinishedRun, Path, torch.dtype], Iterator[str]]] = {
        "kohya": _kohya,
        "pipeline": partial(_pipeline, variant),
        "checkpoint": _checkpoint,
    }
    try:
        yield from ways[to](result, output, number)
    except NoLayout as error:
        raise UserError(f"--to {to}: there is no place in that format for {error}; use pipeline") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"--to {to}: '{output}' cannot be written, or the run's files not read: {error}") from error


def _kohya(result: FinishedRun, output: Path, dtype: torch.dtype) -> Iterator[str]:
    """Writes an adapter with kohya's names."""
    if result.is_lycoris:
        raise UserError("--to kohya: this adapter is LyCORIS's, whose own file other programs read as it is")
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
        "ss_base_model_version": _VERSIONS[_architecture(result)],
        "ss_sd_model_name": result.source.path.rstrip("/").rpartition("/")[2],
    }
    yield _write_file(output, renamed, metadata)


def _original_names(result: FinishedRun, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns module -> its name in the original release, of the modules that an adapter is on."""
    shapes = result.family.facts(result.source).shapes  # of a single file they are not known by diffusers' names
    blocks = Blocks.of(shapes or result.family.load(result.source, torch.bfloat16).state_dict())
    modules = {name.partition(".lora_")[0] for name in state}
    return {module: original_module(module, blocks) for module in modules}


def _pipeline(variant: str | None, result: FinishedRun, output: Path, dtype: torch.dtype) -> Iterator[str]:
    """Writes a whole pipeline, with the adapter in the weights of its network."""
    pipeline = _fused(result, dtype)
    with files_into(output.parent) as made:
        pipeline.save_pretrained(made / output.name, safe_serialization=True, variant=variant)
        if output.is_dir():  # its files would stay among the new ones
            shutil.rmtree(output)
    yield f"pipeline in {str(dtype).removeprefix('torch.')}: {output}"


def _checkpoint(result: FinishedRun, output: Path, dtype: torch.dtype) -> Iterator[str]:
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


def _fused(result: FinishedRun, dtype: torch.dtype) -> Any:  # Any: a diffusers pipeline
    """Returns the pipeline of a run with its own scheduler, the adapter added to the weights in float32."""
    pipeline = result.pipeline(torch.float32)
    if result.is_lycoris:
        merge_lycoris(pipeline.unet)
    elif result.is_adapter:
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    pipeline.register_modules(scheduler=own_scheduler(result.scheduler_config))
    return pipeline.to(dtype)


def _architecture(result: FinishedRun) -> str:
    """Returns what ModelSpec calls the base model's kind; of a single file the config of its UNet says which."""
    if result.family_name == "sdxl":
        return "stable-diffusion-xl-v1-base"
    unet = result.source.read_json("unet", "config.json") or {}
    return "stable-diffusion-v2" if unet.get("cross_attention_dim") == _SD2_WIDTH else "stable-diffusion-v1"


def _metadata(result: FinishedRun, kind: str) -> dict[str, str]:
    """Returns what a file says of itself, after https://github.com/Stability-AI/ModelSpec."""
    scheduler, sampling = result.scheduler_config, result.sampling
    base = result.source.path.rstrip("/").rpartition("/")[2]
    architecture = _architecture(result)
    name = scheduler.get("_class_name", "")
    how = ", ".join(f"{key} {value}" for key, value in sampling.items())
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}" if kind else architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{base}, {result.method}, step {result.document['step']}",
        "modelspec.resolution": str(result.option("validation_resolution")).partition(",")[0],
        "modelspec.prediction_type": "v" if scheduler.get("prediction_type") == "v_prediction" else "epsilon",
        "modelspec.usage_hint": f"{name}, {how}",
        "simpletuner.base_model": base,
        "simpletuner.method": result.method,
        "simpletuner.sampling": json.dumps({"scheduler": name, **sampling}),
    }


def _write_file(output: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Writes one safetensors file, atomically; returns a line for a person."""
    with files_into(output.parent) as made:
        save_file(dict(tensors), made / output.name, dict(metadata))
    return f"{len(tensors)} tensors, {output.stat().st_size / 1e6:.1f} MB: {output}"
