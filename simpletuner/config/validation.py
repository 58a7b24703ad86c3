"""The options of what tells how good a run is while it goes on: pictures, and losses on held-out images."""

import re
from pathlib import Path

from pydantic import field_validator

from simpletuner.config.fields import Section, setting


class ValidationSection(Section):
    """The images that are sampled while training."""

    validation_prompt: str | None = setting(None, "free", "Prompt to sample. Without any prompt nothing is sampled.")
    validation_negative_prompt: str = setting("", "free", "Negative prompt; it needs a guidance above 1.")
    validation_prompt_library: bool = setting(False, "free", "Sample twelve built-in prompts too.")
    user_prompt_library: Path | None = setting(
        None,
        "free",
        "JSON file of prompts to sample: {name: prompt}, or objects with prompt, negative_prompt, guidance, seed and "
        "resolution in place of the prompt.",
    )
    validation_step_interval: int = setting(500, "free", "Steps between two validations; 0: only at the end.", ge=0)
    validation_num_inference_steps: tuple[int, ...] = setting(
        (),
        "free",
        "Sampling steps; of several, such as 1,2,4,8, each is a column, and the result is drawn in as many as the "
        "method advises, or else the last. Default: what the method advises.",
    )
    validation_guidance: float | None = setting(
        None, "free", "Guidance scale; 0 or 1: off. Default: what the method advises.", ge=0
    )
    validation_guidance_rescale: float = setting(0.0, "free", "Rescaling of guided noise; 0: off.", ge=0, le=1)
    validation_resolution: str = setting(
        "1024x1024",
        "free",
        "Sizes in pixels, width x height, comma-separated; `1024` is 1024x1024. Default: the square of `resolution`.",
    )
    validation_seed: int | None = setting(None, "free", "Seed of the sampled images. Default: seed.", ge=0, lt=2**63)
    num_validation_images: int = setting(1, "free", "Images of each prompt and size.", ge=1, le=64)
    validation_noise_scheduler: str | None = setting(
        None, "free", "Sampler.", inert="validation samples with the method's own scheduler"
    )
    validation_on_startup: bool = setting(False, "free", "Validate before the first step too.")
    validation_disable: bool = setting(False, "free", "Sample nothing.")
    eval_steps_interval: int | None = setting(
        None,
        "free",
        "Steps between two measurements of the loss on datasets of dataset_type eval; 0: only at both ends. "
        "Default: validation_step_interval.",
        ge=0,
    )
    eval_timesteps: int = setting(4, "free", "Noise levels at which each held-out image is measured.", ge=1, le=100)
    num_eval_images: int = setting(32, "free", "Images of each held-out dataset that are measured.", ge=1)
    eval_dataset_id: str | None = setting(None, "free", "Measure this held-out dataset alone.")
    evaluation_prompts: int = setting(
        0,
        "free",
        "Prompts by which the finished run is judged, as by `simpletuner evaluate`; 0: it is not. "
        "For models of the quickstart's scenes.",
        ge=0,
        le=512,
    )

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """The sizes of validation_resolution as (width, height) in pixels."""
        return parse_resolutions(self.validation_resolution)

    @field_validator("validation_num_inference_steps")
    @classmethod
    def _are_steps(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 1 <= steps <= 1000 for steps in value) or len(set(value)) < len(value):
            raise ValueError(f"{', '.join(map(str, value))}: give different whole numbers from 1 to 1000")
        return value

    @field_validator("validation_resolution")
    @classmethod
    def _is_parsed(cls, value: str) -> str:
        parse_resolutions(value)
        return value


def parse_resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """Returns (width, height) of each size in ``1024x1024,1280x768`` or ``1024``."""
    sizes: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*[xX]\s*(\d+))?\s*", part)
        if match is None or int(match[1]) < 64 or int(match[2] or match[1]) < 64:
            raise ValueError(f"'{part.strip()}' is not a size such as 1024x768 (pixels, at least 64 each)")
        if int(match[1]) % 8 or int(match[2] or match[1]) % 8:
            raise ValueError(f"'{part.strip()}' has an edge that is no multiple of 8, which pipelines cannot draw")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    return tuple(sizes)
