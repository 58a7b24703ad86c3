"""Draws the pictures of many scenes with a stock diffusers pipeline, each from the same noise whatever draws it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image

from simpletuner.quickstart.drawing import batches_of_one_size
from simpletuner.quickstart.scenes import Scene

BATCH_SIZE = 32

Progress = Callable[[int, int, str], None]
"""Called with the number of finished pictures, of all pictures, and what is drawn."""


@dataclass(frozen=True)
class Sampler:
    """One way to draw; everything that decides a picture beside the weights, the caption, the size and the noise."""

    label: str
    scheduler: Any  # Any: a diffusers SchedulerMixin, which is imported only where pictures are drawn
    num_inference_steps: int
    guidance_scale: float
    """As diffusers counts it; up to 1 is off."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # Any: further arguments of the pipeline's call


@torch.no_grad()
def draw_scenes(pipeline: Any, sampler: Sampler, scenes: Sequence[Scene], progress: Progress) -> list[Image]:
    """Returns a picture for each scene's caption, in the scene's size; the noise is a function of the scene's place.

    Args:
        pipeline: A diffusers text-to-image pipeline; its scheduler is replaced.
        sampler: How to draw.
        scenes: What to draw.
        progress: Told after each batch.
    """
    pipeline.scheduler = sampler.scheduler
    pipeline.set_progress_bar_config(disable=True)
    pictures: dict[int, Image] = {}
    sizes = [(scene.width, scene.height) for scene in scenes]
    for (width, height), batch in batches_of_one_size(sizes, BATCH_SIZE):
        drawn = pipeline(
            [scenes[index].caption for index in batch],
            width=width,
            height=height,
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            generator=[torch.Generator().manual_seed(index) for index in batch],
            **sampler.options,
        )
        pictures |= dict(zip(batch, drawn.images, strict=True))
        progress(len(pictures), len(scenes), sampler.label)
    return [pictures[index] for index in range(len(scenes))]
