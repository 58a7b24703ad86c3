"""The plan for a person, as lines of text, and for programs, as JSON."""

import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from simpletuner.adapter_plan import LoraPlan
from simpletuner.config.errors import printable
from simpletuner.data.precompute import Outstanding
from simpletuner.data.streaming import live_parts
from simpletuner.data.summary import DatasetSummary
from simpletuner.families._base import Part
from simpletuner.plan import Plan
from simpletuner.quantization import NONE

_WIDTH = 96
_NUM_BUCKETS = 20
"""Buckets listed for a dataset; the rest is one line, and all of them are in the JSON."""


def plan_json(plan: Plan) -> dict[str, Any]:  # Any: JSON
    """Returns what the plan knows as JSON values."""
    run, lora = plan.config.run, plan.lora
    return {
        "model": plan.source.path,
        "model_family": plan.config.model.model_family,
        "model_type": plan.config.model.model_type,
        "method": plan.method,
        "lora": None
        if lora is None
        else {**lora.settings, "num_modules": lora.num_modules, "num_parameters": lora.num_parameters},
        "datasets": [_dataset_json(summary, plan.world) for summary in plan.datasets],
        "held_out": [_dataset_json(summary, plan.world) for summary in plan.held_out],
        "buckets": [
            {"dataset": summary.config.id, "target": bucket.name, "images": len(bucket)}
            for summary in plan.datasets
            for bucket in summary.buckets
        ],
        "batches_per_epoch": plan.batches_per_epoch,
        "max_steps": plan.max_steps,
        "epochs": plan.epochs,
        "effective_batch": plan.effective_batch,
        "processes": plan.world,
        "output_dir": str(run.output_dir),
        "validation": {
            "prompts": list(plan.validation.prompts),
            "sizes": [f"{width}x{height}" for width, height in plan.validation.sizes_px],
            "num_inference_steps": plan.validation.num_inference_steps,
            "other_steps": list(plan.validation.other_steps),
            "guidance_scale": plan.validation.guidance_scale,
        },
        "caches": [{**vars(cache), "folder": str(cache.folder)} for cache in plan.caches],
        "encoders_loaded": _live(plan),
        "notices": list(plan.notices),
    }


def _dataset_json(summary: DatasetSummary, world: int) -> dict[str, Any]:
    return {
        "id": summary.config.id,
        "images": summary.num_images,
        "complete": summary.complete,
        "left_out": {reason: len(ids) for reason, ids in summary.problems.items()},
        "batches_per_epoch": summary.batches_per_epoch(world),
    }


def plan_rows(plan: Plan) -> dict[str, str]:
    """Returns what a model card says of the training: heading -> text."""
    run, section = plan.config.run, plan.optimizer_section
    precision = plan.config.model.base_model_precision
    packed = "" if precision == NONE else f", its weights in {precision} while training"
    rows = {
        "base model": f"{plan.source.path}{packed}",
        "method": plan.method,
        "steps": f"{plan.max_steps} of {plan.effective_batch} samples",
        "learning rate": f"{section.learning_rate:g}, {section.lr_scheduler}",
        "optimizer": section.optimizer,
        "precision": run.mixed_precision,
        "images": str(sum(summary.num_images for summary in plan.datasets)),
        "seed": str(run.seed),
    }
    if plan.lora is not None:
        rows["adapter"] = _adapter(plan.lora)
    return rows


def plan_text(plan: Plan) -> str:
    """Returns the plan as text, in the order in which a person would ask."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    run = plan.config.run
    precision = "float32" if plan.compute_dtype is None else run.mixed_precision
    yield f"model       {plan.source.path} ({plan.config.model.model_family})"
    base = plan.config.model.base_model_precision
    packed = "" if base == NONE else f", the base in {base}"
    yield f"method      {plan.method}, {plan.config.model.model_type}, computing in {precision}{packed}"
    yield from _trained(plan)
    section = plan.optimizer_section
    yield (
        f"optimizer   {section.optimizer}, learning rate {section.learning_rate:g}, {section.lr_scheduler}"
        + (f", warmup {section.lr_warmup_steps} steps" if section.lr_warmup_steps else "")
    )
    for summary in plan.datasets:
        yield from _dataset_lines(summary, plan.world)
        yield from _window_lines(plan, summary)
    yield from _held_out_lines(plan)
    yield from _cache_lines(plan)
    yield from _live_lines(plan)
    processes = _some(plan.world, "process", "processes")
    batch = f"batch {run.train_batch_size} x {run.gradient_accumulation_steps} accumulated x {processes}"
    yield f"steps       {plan.max_steps} of {_some(plan.effective_batch, 'sample')} ({batch}): {_epochs(plan)}"
    yield from _validation_lines(plan)
    every = f"every {_some(run.checkpoint_step_interval, 'step')} and " if run.checkpoint_step_interval else ""
    yield f"output      {run.output_dir}, a checkpoint {every}at the end"
    yield from _publishing_lines(plan)
    if plan.notices:
        yield "notices"
        yield from (f"  - {notice}" for notice in plan.notices)


def _publishing_lines(plan: Plan) -> Iterator[str]:
    publish = plan.config.publish
    if publish.push_to_hub:
        kind = "private" if publish.model_card_private else "public"
        yield f"hub         the result goes to {publish.hub_model_id or plan.config.run.output_dir.name}, {kind}"
    if publish.report_to:
        yield f"trackers    {', '.join(publish.report_to)}"


def _trained(plan: Plan) -> Iterator[str]:
    lora = plan.lora
    if lora is None:
        shapes = plan.facts.shapes
        counted = f": {_count(sum(map(math.prod, shapes.values())))} parameters" if shapes is not None else ""
        yield f"trains      all weights{counted}"
        return
    counted = "counted when the model has been loaded"
    if lora.num_parameters is not None:
        counted = f"{_count(lora.num_parameters)} parameters in {lora.num_modules} layers"
    yield f"trains      {_adapter(lora)}: {counted}"
    if lora.is_lycoris:
        return
    targets = "on " + " ".join(lora.settings["target_modules"])
    yield textwrap.indent(textwrap.fill(targets, _WIDTH, subsequent_indent="   "), " " * 12)


def _adapter(lora: LoraPlan) -> str:
    """Returns what kind of adapter is trained."""
    settings = lora.settings
    if lora.is_lycoris:
        numbers = [f"{key} {settings[key]}" for key in ("linear_dim", "linear_alpha", "factor") if key in settings]
        return ", ".join([f"LyCORIS {settings.get('algo', 'lora')}", *numbers])
    return f"LoRA rank {settings['r']}, alpha {settings['lora_alpha']:g}"


def _dataset_lines(summary: DatasetSummary, world: int) -> Iterator[str]:
    config = summary.config
    so_far = "" if summary.complete else " so far (not all are counted yet)"
    images, buckets = _some(summary.num_images, "image"), _some(len(summary.buckets), "bucket")
    yield f"dataset     {config.id}: {images}{so_far} in {buckets}"
    for bucket in summary.buckets[:_NUM_BUCKETS]:
        yield f"              {bucket.name:>11}  {_some(len(bucket), 'image')}"
    if len(summary.buckets) > _NUM_BUCKETS:
        rest = summary.buckets[_NUM_BUCKETS:]
        yield f"              and {sum(map(len, rest))} images in {len(rest)} more buckets"
    repeats = f", {_some(config.repeats, 'repeat')}" if config.repeats else ""
    batches = _some(summary.batches_per_epoch(world), "batch", "batches")
    yield f"            batch {config.train_batch_size}{repeats}: {batches} an epoch"
    if short := summary.num_short(world):
        yield f"            {_some(short, 'bucket')} smaller than a batch: trained as a short batch, nothing is dropped"
    for reason, ids in summary.problems.items():
        yield f"            {len(ids)} left out: {reason} (such as {printable(ids[0])})"


def _window_lines(plan: Plan, summary: DatasetSummary) -> Iterator[str]:
    window, accumulation = plan.windows[summary.config.id], plan.config.run.gradient_accumulation_steps
    if window.start or window.end is not None:
        until = "" if window.end is None else f" until step {min(window.end // accumulation, plan.max_steps)}"
        yield f"            shown from step {window.start // accumulation} on{until}"


def _held_out_lines(plan: Plan) -> Iterator[str]:
    levels, interval = plan.config.validation.eval_timesteps, plan.eval_step_interval
    every = f"before training, every {_some(interval, 'step')}" if interval else "before training"
    for summary in plan.held_out:
        images = _some(summary.num_images, "image")
        yield f"held out    {summary.config.id}: {images}, their loss at {_some(levels, 'noise level')}"
        yield f"            {every} and at the end"


def cached_lines(caches: Iterable[Outstanding]) -> Iterator[str]:
    """Yields what is in the caches now that they are filled; what could not be encoded has been named before."""
    for number, cache in enumerate(caches):
        what = f"{cache.what} of {cache.id}: {cache.missing or 'nothing'} missing of {cache.total}"
        size = _bytes(cache.total_bytes - cache.missing_bytes)
        yield f"{'' if number else 'cached':12}{what}, {size} in {cache.folder}"


def _cache_lines(plan: Plan) -> Iterator[str]:
    for number, cache in enumerate(plan.caches):
        heading = "" if number else "to cache"
        yield (
            f"{heading:12}{cache.missing} of {cache.total} {cache.what} of {cache.id}: {_bytes(cache.missing_bytes)} "
            f"of {_bytes(cache.total_bytes)}"
        )


def _live(plan: Plan) -> dict[Part, dict[str, Any]]:
    """Returns encoder -> for which datasets it stays loaded, and its bytes on each device; None: not known yet."""
    dtypes: dict[Part, torch.dtype] = {"vae": plan.vae_dtype, "text": plan.weight_dtype}
    numbers, packed = plan.facts.encoder_numbers, {"text"} if plan.text_precisions else set[str]()
    return {
        part: {
            "datasets": list(ids),
            "bytes": numbers[part] * dtypes[part].itemsize if part in numbers and part not in packed else None,
        }
        for part, ids in live_parts(summary.config for summary in plan.datasets).items()
    }


def _live_lines(plan: Plan) -> Iterator[str]:
    heading = "streaming"
    for part, told in _live(plan).items():
        what, encoder = ("images", "the VAE stays") if part == "vae" else ("captions", "the text encoders stay")
        taken = "" if told["bytes"] is None else f", {_bytes(told['bytes'])} on each device"
        yield f"{heading:12}{what} of {', '.join(told['datasets'])} are not cached: {encoder} loaded{taken}"
        heading = ""


def _validation_lines(plan: Plan) -> Iterator[str]:
    validation = plan.validation
    if not validation.prompts:
        yield "validation  none"
        return
    sizes = ", ".join(f"{width}x{height}" for width, height in validation.sizes_px)
    every = f"every {_some(validation.step_interval, 'step')} and " if validation.step_interval else ""
    guidance = "off" if validation.guidance_scale <= 1 else f"{validation.guidance_scale:g}"
    yield f"validation  {_some(len(validation.prompts), 'prompt')} at {sizes}, {every}at the end:"
    others = f", and in {', '.join(map(str, validation.other_steps))}" if validation.other_steps else ""
    yield f"            {_some(validation.num_inference_steps, 'step')}{others}, guidance {guidance}"


def _epochs(plan: Plan) -> str:
    if plan.epochs is None:
        return "the epochs are known when the images are counted"
    each = _some(plan.batches_per_epoch, "batch", "batches")
    return f"{plan.epochs:{'.0f' if plan.epochs >= 100 else '.3g'}} epochs of {each}"


def _some(number: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun: ``1 image``, ``3 images``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _count(number: int) -> str:
    """Returns a number of parameters as a person says it: 196.8M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
