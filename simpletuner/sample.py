"""Pictures of a finished run, by the sampler that it was trained for: nothing but a prompt has to be said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.config.validation import parse_resolutions
from simpletuner.distillers._base import own_scheduler
from simpletuner.evaluation.pipelines import result_base, result_document, result_pipeline, result_sampling
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


@torch.no_grad()
def sample(run: Path, wishes: Wishes, output: Path) -> Iterator[str]:
    """Draws every prompt with every seed, and a sheet of all; yields a line on each picture.

    Args:
        run: The output_dir of a finished run.
        wishes: What to draw.
        output: Folder for the pictures, one folder a seed.

    Raises:
        UserError: No run has finished there, or its sampler cannot do what is wished.
    """
    document = result_document(run)
    scheduler, arguments = result_sampling(run)
    asked = {
        "num_inference_steps": wishes.num_inference_steps,
        "guidance_scale": wishes.guidance_scale,
        "negative_prompt": wishes.negative_prompt,
    }
    arguments |= {key: value for key, value in asked.items() if value is not None}
    most, steps = scheduler.get("original_inference_steps"), arguments["num_inference_steps"]
    if most is not None and steps > most:
        raise UserError(f"--steps: {steps} is above the {most} steps of the grid that this run was trained on")
    if arguments.get("negative_prompt") and arguments["guidance_scale"] <= 1:
        raise UserError("--negative: it needs a guidance above 1, which this model does without; leave it out")
    try:
        ((width, height), *_) = parse_resolutions(
            wishes.size or document["config"]["validation"]["validation_resolution"]
        )
    except ValueError as error:
        raise UserError(f"--size: {error}") from error
    pipeline = result_pipeline(*result_base(document), run)
    pipeline.scheduler = own_scheduler(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    how = ", ".join(f"{key} {value}" for key, value in arguments.items())
    yield f"{type(pipeline.scheduler).__name__}, {width}x{height}, {how}"
    names: dict[str, str] = {}
    for prompt in wishes.prompts:
        for seed in wishes.seeds:
            generator = torch.Generator().manual_seed(seed)
            picture = pipeline(prompt, width=width, height=height, generator=generator, **arguments).images[0]
            names[prompt] = Request(prompt, (width, height), 0).file_name
            with files_into(output / f"seed-{seed}") as made:
                picture.save(made / names[prompt])
            yield f"{output / f'seed-{seed}' / names[prompt]}"
    columns = [(f"seed {seed}", output / f"seed-{seed}") for seed in wishes.seeds]
    write_contact_sheet(output / "contact_sheet.png", columns, list(names.items()))
    yield f"all of them: {output / 'contact_sheet.png'}"
