"""Pictures of a finished run, by the sampler that it was trained for: nothing but a prompt has to be said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.distillers._base import own_scheduler
from simpletuner.evaluation.finished import FinishedRun, finished_run
from simpletuner.hooks.contact_sheet import write_contact_sheet
from simpletuner.hooks.validation import Request


@dataclass(frozen=True)
class Wishes:
    """What to draw; None: as the run's own validation does."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    size: str | None = None
    """Width x height in pixels."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    image: Path | None = None
    """A picture to begin from, in place of noise."""
    strength: float = 0.6
    """How much of the way that is noised again: 1 leaves nothing of the picture."""
    controlnet: str | None = None
    """Folder or hub id of a ControlNet for the base model."""
    control_image: Path | None = None


@torch.no_grad()
def sample(run: str | Path, wishes: Wishes, output: Path, base: str | None = None) -> Iterator[str]:
    """Draws every prompt with every seed, and a sheet of all; yields a line on each picture.

    Args:
        run: The output_dir of a finished run, or the hub id that its result was uploaded to.
        wishes: What to draw.
        output: Folder for the pictures, one folder a seed.
        base: Where the base model is; None: where the run had it.

    Raises:
        UserError: No run has finished there, or its sampler cannot do what is wished.
    """
    finished = finished_run(run, base)
    width, height = finished.size_px(wishes.size)
    arguments = _arguments(finished, wishes)
    images = _images(wishes, (width, height))
    pipeline = _pipeline(finished, wishes)
    pipeline.scheduler = own_scheduler(finished.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    how = ", ".join(f"{key} {value}" for key, value in arguments.items())
    yield f"{type(pipeline.scheduler).__name__}, {width}x{height}, {how}"
    size = {} if wishes.image is not None else {"width": width, "height": height}
    names: dict[str, str] = {}
    for prompt in wishes.prompts:
        for seed in wishes.seeds:
            generator = torch.Generator().manual_seed(seed)
            picture = pipeline(prompt, generator=generator, **size, **images, **arguments).images[0]
            names[prompt] = Request(prompt, (width, height), 0).file_name
            with files_into(output / f"seed-{seed}") as made:
                picture.save(made / names[prompt])
            yield f"{output / f'seed-{seed}' / names[prompt]}"
    columns = [(f"seed {seed}", output / f"seed-{seed}") for seed in wishes.seeds]
    write_contact_sheet(output / "contact_sheet.png", columns, list(names.items()))
    yield f"all of them: {output / 'contact_sheet.png'}"


def _arguments(finished: FinishedRun, wishes: Wishes) -> dict[str, Any]:  # Any: of the pipeline's call
    """Returns how each picture is drawn, beside prompt, size and noise."""
    asked = {
        "num_inference_steps": wishes.num_inference_steps,
        "guidance_scale": wishes.guidance_scale,
        "negative_prompt": wishes.negative_prompt,
        "strength": wishes.strength if wishes.image is not None else None,
    }
    arguments: dict[str, Any] = finished.sampling
    arguments |= {key: value for key, value in asked.items() if value is not None}
    most, steps = finished.scheduler_config.get("original_inference_steps"), arguments["num_inference_steps"]
    if most is not None and steps > most:
        raise UserError(f"--steps: {steps} is above the {most} steps of the grid that this run was trained on")
    if arguments.get("negative_prompt") and arguments["guidance_scale"] <= 1:
        raise UserError("--negative: it needs a guidance above 1, which this model does without; leave it out")
    if wishes.image is not None and int(steps * wishes.strength) < 1:
        raise UserError(
            f"--strength: {wishes.strength:g} of {steps} steps is none; raise it to {1 / steps:g} or more, or --steps"
        )
    return arguments


def _images(wishes: Wishes, size_px: tuple[int, int]) -> dict[str, Image.Image]:
    """Returns the pictures that the pipeline's call takes, in the size that is drawn."""
    if (wishes.controlnet is None) != (wishes.control_image is None):
        raise UserError("--controlnet, --control-image: a ControlNet needs both; give the network and its picture")
    if wishes.image is None:
        named = {"image": ("--control-image", wishes.control_image)}
    else:
        named = {"image": ("--image", wishes.image), "control_image": ("--control-image", wishes.control_image)}
    found: dict[str, Image.Image] = {}
    for key, (option, path) in named.items():
        if path is None:
            continue
        try:
            with Image.open(path) as opened:
                found[key] = opened.convert("RGB").resize(size_px, Image.Resampling.LANCZOS)
        except OSError as error:
            raise UserError(f"{option}: '{path}' cannot be read as a picture") from error
    return found


def _pipeline(finished: FinishedRun, wishes: Wishes) -> Any:  # Any: a diffusers pipeline
    """Returns the pipeline of the result for what it is to begin from and to hold to."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, ControlNetModel

    further: dict[str, Any] = {}
    if wishes.controlnet is not None:
        try:
            network: Any = ControlNetModel.from_pretrained(
                wishes.controlnet, torch_dtype=finished.dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--controlnet: '{wishes.controlnet}' cannot be loaded: {reason}") from error
        further["controlnet"] = network
    pipeline = finished.pipeline()
    for network in further.values():
        network.to(pipeline.device)
    if wishes.image is not None:
        return AutoPipelineForImage2Image.from_pipe(pipeline, **further)
    return AutoPipelineForText2Image.from_pipe(pipeline, **further) if further else pipeline
