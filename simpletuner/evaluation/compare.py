"""Compares what a run has learned with its base model, on any prompts: the same noise, in few steps and in many.

Every picture of the student stands beside the picture that the base model draws of the same prompt from the same noise
when it may take its time. How near two pictures of the same noise can be, and how far two of other noise are, stands in
the table too: the base model's own, by another seed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.distillers._base import own_scheduler
from simpletuner.evaluation.clip import Clip, clip_score, cmmd
from simpletuner.evaluation.drawing import Progress, Sampler
from simpletuner.evaluation.finished import FinishedRun
from simpletuner.evaluation.likeness import diversity, feature_distance, psnr_db, sharpness
from simpletuner.evaluation.pipelines import base_pipeline
from simpletuner.evaluation.samplers import FEW_STEPS, label_of, student_samplers
from simpletuner.hooks.contact_sheet import write_contact_sheet

_NUM_SHOWN = 8
"""Prompts on the contact sheet."""


@dataclass(frozen=True)
class Asked:
    """What is compared."""

    prompts: Sequence[str]
    size_px: tuple[int, int]
    """Width and height."""
    seeds: Sequence[int] = (0, 1)
    """Of each prompt; the diversity needs two."""
    steps: Sequence[int] | None = None
    """Of the student; None: 1, 2, 4, 8, and as many as the run itself draws with."""
    teacher_steps: int | None = None
    """None: as the family usually draws."""
    clip: str | None = None
    """Folder or hub id of a CLIP model."""


@dataclass(frozen=True)
class Line:
    """What is said of one way to draw; None: it cannot be said of that one."""

    label: str
    num_inference_steps: int
    guidance_scale: float
    seconds: float
    """Of one picture, the prompt's encoding and the VAE included."""
    sharpness: float
    diversity: float | None
    distance: float | None = None
    """Feature distance to the teacher's own picture."""
    psnr_db: float | None = None
    """To the teacher's own picture."""
    clip: float | None = None
    cmmd: float | None = None
    """Of all pictures to all of the teacher's."""


@dataclass(frozen=True)
class Comparison:
    """All lines: the teacher in its own time first, then in few steps, then the student."""

    lines: tuple[Line, ...]
    other_seed: float | None
    """Feature distance of the teacher's pictures of one prompt by different seeds: nothing in common but the prompt."""
    num_prompts: int
    num_seeds: int
    sheet: Path = field(compare=False)

    def markdown(self) -> str:
        """Returns the table, and how to read it."""
        columns = {
            "steps": lambda line: str(line.num_inference_steps),
            "guidance": lambda line: f"{line.guidance_scale:g}",
            "distance": lambda line: _number(line.distance, 3),
            "PSNR, dB": lambda line: _number(line.psnr_db, 1),
            "sharpness": lambda line: _number(line.sharpness, 1),
            "diversity": lambda line: _number(line.diversity, 3),
            "CLIP": lambda line: _number(line.clip, 2),
            "CMMD": lambda line: _number(line.cmmd, 3),
            "s a picture": lambda line: _number(line.seconds, 2),
        }
        shown = {name: show for name, show in columns.items() if any(show(line) for line in self.lines)}
        rows = [
            ["", *shown],
            ["---", *("---:" for _ in shown)],
            *([line.label, *(show(line) for show in shown.values())] for line in self.lines),
        ]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        pictures = f"{self.num_prompts} prompts x {self.num_seeds} seeds"
        told = [f"{pictures}; distance and PSNR: to the teacher's picture of the same prompt and noise."]
        if self.other_seed is not None:
            told.append(f"The teacher's own pictures of one prompt by different seeds are {self.other_seed:.3f} apart.")
        return f"{table}\n\n{' '.join(told)}\n"

    def text(self) -> str:
        """Returns it for a terminal."""
        return f"{self.markdown()}\nside by side: {self.sheet}"

    def json(self) -> dict[str, Any]:  # Any: JSON
        """Returns the comparison for programs."""
        return {**asdict(self), "lines": [asdict(line) for line in self.lines], "sheet": str(self.sheet)}


Pictures = Mapping[tuple[int, int], Image]
"""By the number of the prompt and the seed."""


def compare(finished: FinishedRun, asked: Asked, folder: Path, progress: Progress) -> Comparison:
    """Draws and compares; writes ``comparison.md``, ``comparison.json``, the pictures and a contact sheet.

    Args:
        finished: The run.
        asked: What to draw.
        folder: Where to write.
        progress: Told how the drawing goes on.

    Raises:
        UserError: A number of steps cannot be drawn, or the base model is not to be had.
    """
    clip = Clip(asked.clip) if asked.clip is not None else None
    base = base_pipeline(finished.family, finished.source, finished.dtype)
    teachers, students = _samplers(finished, asked)
    drawn = _drawn(base, teachers, asked, progress)
    del base  # two at once may be more than the device holds
    drawn += _drawn(finished.pipeline(), students, asked, progress)
    lines = [_line(sampler, pictures, drawn[0][1], seconds, asked) for sampler, pictures, seconds in drawn]
    if clip is not None:
        lines = _judged(lines, [pictures for _, pictures, _ in drawn], asked, clip)
    sheet = _show(folder, [(sampler.label, pictures) for sampler, pictures, _ in drawn], asked)
    other_seed = lines[0].diversity
    comparison = Comparison(tuple(lines), other_seed, len(asked.prompts), len(asked.seeds), sheet)
    with files_into(folder) as made:
        (made / "comparison.md").write_text(comparison.markdown(), encoding="utf8")
        (made / "comparison.json").write_text(json.dumps(comparison.json(), indent=1) + "\n", encoding="utf8")
    return comparison


def _samplers(finished: FinishedRun, asked: Asked) -> tuple[list[Sampler], list[Sampler]]:
    """Returns how the base model draws, in its own time and in as few steps as the run's result, and the student."""
    usual, guidance = finished.teacher
    steps, few = asked.teacher_steps or usual, int(finished.sampling["num_inference_steps"])
    wanted = asked.steps or sorted({*FEW_STEPS, few})
    students = student_samplers(finished.scheduler_config, finished.sampling, wanted)
    if asked.steps is not None and len(students) < len(asked.steps):
        most = finished.scheduler_config.get("original_inference_steps")
        raise UserError(f"--steps: {max(asked.steps)} is above the {most} steps of the grid that was trained")
    numbers = [steps, few] if few < steps else [steps]
    config = finished.family.facts(finished.source).scheduler_config
    assert config is not None  # the base model was loaded before
    teachers = [Sampler(label_of("teacher", each), own_scheduler(config), each, guidance) for each in numbers]
    return teachers, students


@torch.no_grad()
def _drawn(
    pipeline: Any,  # Any: a diffusers pipeline
    samplers: Sequence[Sampler],
    asked: Asked,
    progress: Progress,
) -> list[tuple[Sampler, Pictures, float]]:
    """Returns each sampler with its pictures and the seconds that one took."""
    pipeline.set_progress_bar_config(disable=True)
    width, height = asked.size_px
    total = len(asked.prompts) * len(asked.seeds)
    found: list[tuple[Sampler, Pictures, float]] = []
    for sampler in samplers:
        pipeline.scheduler = sampler.scheduler
        pictures: dict[tuple[int, int], Image] = {}
        started = time.perf_counter()
        for number, prompt in enumerate(asked.prompts):
            for seed in asked.seeds:
                result = pipeline(
                    prompt,
                    width=width,
                    height=height,
                    num_inference_steps=sampler.num_inference_steps,
                    guidance_scale=sampler.guidance_scale,
                    generator=torch.Generator().manual_seed(seed),
                    **sampler.options,
                )
                pictures[number, seed] = result.images[0]
                progress(len(pictures), total, sampler.label)
        found.append((sampler, pictures, (time.perf_counter() - started) / total))
    return found


def _line(sampler: Sampler, pictures: Pictures, own: Pictures, seconds: float, asked: Asked) -> Line:
    """Returns what is said of pictures.

    Args:
        sampler: That drew them.
        pictures: All of them.
        own: The teacher's; where they are the same, they are not compared.
        seconds: Of one picture.
        asked: The prompts and seeds.
    """
    by_prompt = [[pictures[number, seed] for seed in asked.seeds] for number in range(len(asked.prompts))]
    pairs = [(pictures[key], own[key]) for key in pictures] if pictures is not own else []
    return Line(
        label=sampler.label,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        seconds=seconds,
        sharpness=_mean([sharpness(picture) for picture in pictures.values()]),
        diversity=_mean([diversity(each) for each in by_prompt]) if len(asked.seeds) > 1 else None,
        distance=_mean([feature_distance(*pair) for pair in pairs]) if pairs else None,
        psnr_db=_mean([psnr_db(*pair) for pair in pairs]) if pairs else None,
    )


def _judged(lines: Sequence[Line], drawn: Sequence[Pictures], asked: Asked, clip: Clip) -> list[Line]:
    """Returns the lines with what CLIP says of their pictures, each seen once."""
    texts = clip.texts(asked.prompts)[[number for number, _ in drawn[0]]]
    seen = [clip.pictures(list(pictures.values())) for pictures in drawn]
    return [
        replace(line, clip=clip_score(each, texts), cmmd=cmmd(each, seen[0]) if number else None)
        for number, (line, each) in enumerate(zip(lines, seen, strict=True))
    ]


def _show(folder: Path, columns: Sequence[tuple[str, Pictures]], asked: Asked) -> Path:
    """Writes all pictures, and the contact sheet of the first seed; returns the sheet."""
    folders: list[tuple[str, Path]] = []
    with files_into(folder) as made:
        for number, (label, pictures) in enumerate(columns):
            (made / f"comparison/{number}").mkdir(parents=True)
            folders.append((label, folder / f"comparison/{number}"))
            for (prompt, seed), picture in pictures.items():
                picture.save(made / f"comparison/{number}/{prompt:03}-{seed}.png")
    rows = [(prompt, f"{number:03}-{asked.seeds[0]}.png") for number, prompt in enumerate(asked.prompts[:_NUM_SHOWN])]
    write_contact_sheet(folder / "comparison.png", folders, rows)
    return folder / "comparison.png"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
