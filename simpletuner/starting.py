"""Writes the two files of a new run from five answers: images, base model, purpose, memory, folder for the results."""

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from simpletuner.atomic import files_into
from simpletuner.backends._base import is_image
from simpletuner.config.errors import UserError, suggestion

PURPOSES = {
    "lcm-lora": "an adapter that makes the base model draw in 4 steps",
    "lcm-full": "a model of its own that draws in 4 steps",
    "lora": "an adapter that teaches the base model your pictures",
    "full": "a model of its own that has learned your pictures",
}
_NUM_LOOKED_AT = 500
_SMALL_MEMORY_GIB, _LARGE_MEMORY_GIB = 16, 40
_AREAS = {1.0: 1024, 0.5: 768, 0.25: 512}
"""Megapixels -> edge of the square in pixels."""


@dataclass(frozen=True)
class Answers:
    """What a user wants."""

    images: Path
    base: str
    """A hub id, a folder or a file."""
    purpose: str
    """One of PURPOSES."""
    memory_gib: int
    """Of the GPU; 0: there is none."""
    output: Path


def answers(images: Path, base: str, purpose: str, memory_gib: int, output: Path) -> Answers:
    """Returns the answers. Raises UserError for a purpose that there is not."""
    if purpose not in PURPOSES:
        known = "; ".join(f"{name}: {what}" for name, what in PURPOSES.items())
        raise UserError(f"--for: unknown purpose '{purpose}'{suggestion(purpose, PURPOSES)} ({known})")
    return Answers(images, base, purpose, memory_gib, output)


@dataclass(frozen=True)
class Found:
    """What is in a folder of images, by a look at the first of them."""

    num_images: int
    num_shards: int
    captioned: float
    """Part of the images with a text file beside them."""
    edge_px: int
    """Edge of the square with the median image's area."""
    caption: str
    """The first caption; empty when there is none."""


def look(folder: Path) -> Found:
    """Returns what is in a folder. Raises UserError when there is no such folder, or nothing to train on in it."""
    if not folder.is_dir():
        raise UserError(f"--images: there is no folder '{folder}'")
    names = list(islice(_names(folder), _NUM_LOOKED_AT))
    images, shards = [path for path in names if is_image(path.name)], [path for path in names if path.suffix == ".tar"]
    if not images and not shards:
        raise UserError(f"--images: no image and no .tar shard in '{folder}', nor in the folders below it")
    edges: list[float] = []
    texts: list[str] = []
    for path in images:
        try:
            with Image.open(path) as image:
                edges.append((image.width * image.height) ** 0.5)
            texts.append(path.with_suffix(".txt").read_text(encoding="utf-8-sig"))
        except (OSError, UnidentifiedImageError, UnicodeDecodeError):
            continue  # the scan names what is wrong with it
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    edge_px = round(statistics.median(edges)) if edges else 1024
    return Found(len(images), len(shards), len(texts) / max(1, len(images)), edge_px, lines[0] if lines else "")


def _names(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if is_image(name) or name.endswith(".tar"):
                yield Path(place) / name


def files(answers: Answers, found: Found) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Returns the config, the data backend file, and a line on each choice that was made."""
    family = family_name(answers.base)
    area = _area(family, found)
    edge = _AREAS[area]
    distils, adapter = answers.purpose.startswith("lcm"), answers.purpose.endswith("lora")
    gpu = answers.memory_gib > 0
    roomy = answers.memory_gib >= _LARGE_MEMORY_GIB
    config: dict[str, Any] = {
        "model_family": family,
        "model_type": "lora" if adapter else "full",
        "pretrained_model_name_or_path": answers.base,
        "output_dir": str(answers.output),
        **({"distillation_method": "lcm"} if distils else {}),
        "resolution": area,
        "resolution_type": "area",
        "max_train_steps": 2000 if distils else 1000,
        "train_batch_size": 4 if roomy else 1,
        "gradient_accumulation_steps": 1 if roomy else 4,
        "gradient_checkpointing": not roomy,
        "mixed_precision": "bf16" if gpu else "no",
        "learning_rate": 1e-4 if adapter else 1e-5,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 100,
        "optimizer": "adamw_bf16",
        **({"lora_rank": 64 if distils else 16} if adapter else {}),
        "validation_prompt": found.caption or "a photograph of a cat on a wooden table",
        "validation_resolution": f"{edge}x{edge}",
        "validation_step_interval": 250,
        "checkpoint_step_interval": 250,
        "seed": 42,
        "push_to_hub": False,
        "report_to": "none",
    }
    said = [
        f"model_family {family}, {area:g} megapixels ({edge} x {edge}): the median image is {found.edge_px} px square"
    ]
    if adapter and 0 < answers.memory_gib < _SMALL_MEMORY_GIB:
        config["base_model_precision"] = "int8-quanto"
        said.append(f"base_model_precision int8-quanto: {answers.memory_gib} GiB is little for a base in 16 bits")
    return config, _datasets(answers, found, said), said


def family_name(base: str) -> str:
    """Returns the family of a base model: by its pipeline's name where it is here, else by its own."""
    index = Path(base) / "model_index.json"
    name = json.loads(index.read_text(encoding="utf8")).get("_class_name", "") if index.is_file() else base
    return "sdxl" if "xl" in name.lower() else "sd1x"


def _area(family: str, found: Found) -> float:
    """Returns the largest usual area, in megapixels, that the family was trained on and that most images have."""
    usual = [area for area in _AREAS if family == "sdxl" or area <= 0.25]
    return next((area for area in usual if found.edge_px >= 0.9 * _AREAS[area]), usual[-1])


def _datasets(answers: Answers, found: Found, said: list[str]) -> list[dict[str, Any]]:
    entry: dict[str, Any] = {"id": answers.images.resolve().name or "images", "type": "local"}
    if found.num_shards:
        entry |= {"type": "webdataset", "instance_data_dir": str(answers.images), "shards": "**/*.tar"}
        said.append(f"{found.num_shards} shards, with their captions in them")
    else:
        strategy = "textfile" if found.captioned >= 0.5 else "filename"
        entry |= {"instance_data_dir": str(answers.images), "caption_strategy": strategy}
        many = f"{found.num_images}{' or more' if found.num_images >= _NUM_LOOKED_AT else ''} images"
        why = "text file" if strategy == "textfile" else "file name: most have no text file"
        said.append(f"{many}, each captioned by its {why}")
    return [entry, {"id": "text-embeds", "dataset_type": "text_embeds", "default": True}]


def write(answers: Answers, folder: Path, overwrite: bool) -> list[str]:
    """Writes config.json and multidatabackend.json into a folder; returns what is to be said.

    Raises:
        UserError: One of them is there already, or there is nothing to train on.
    """
    found = look(answers.images)
    paths = folder / "config.json", folder / "multidatabackend.json"
    if (taken := [str(path) for path in paths if path.exists()]) and not overwrite:
        raise UserError(f"--to: {' and '.join(taken)} would be overwritten; give another folder, or --force")
    config, datasets, said = files(answers, found)
    with files_into(folder) as made:
        for path, document in zip(paths, (config, datasets), strict=True):
            (made / path.name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")
    return [*said, f"written: {paths[0]} and {paths[1]}", f"look at it: simpletuner plan --config {folder}"]
