"""A training step against its own arithmetic, and against a plain script's step, in alternation in one process.

    python -m tests.benchmarks.step {a,b,c} [--rounds 5] [--steps 3] [--batch 4] [--compile] [--peak {trainer,floor}]

a: the quickstart's SDXL; b: an SDXL-shaped UNet of middle size with latents of 32 x 32; c: SDXL's own UNet with random
weights in bf16 at 256 px. The floor makes the same forwards and the same backward on tensors that are there, by the
same network, and knows of no trainer, method, sampler, cache or schedule; "update" is clipping and the optimizer.
With --peak the process makes the steps of one of the two alone, and says the most memory that it held.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from simpletuner import run as way
from simpletuner.config.load import load
from simpletuner.denoiser import adapters_off
from simpletuner.families._base import LORA_PRESETS
from simpletuner.quickstart import TEACHER
from simpletuner.quickstart.model import TINY, make_pipeline
from simpletuner.training.build import make_accelerator
from simpletuner.training.meter import FlopCounter
from simpletuner.training.trainer import Trainer
from tests.benchmarks.memory import megabytes
from tests.benchmarks.script_step import ScriptStep

NUM_IMAGES = 32
MIDDLE: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (96, 192, 384),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 3, 6),
}
REAL: dict[str, Any] = MIDDLE | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
}


def write_model(size: str, folder: Path) -> Path:
    """Returns the folder of a model with the UNet of a size; its encoders are tiny."""
    if size == "a":
        return TEACHER
    widths = (768, 1280) if size == "c" else TINY.text_widths
    pipeline = make_pipeline(architecture=replace(TINY, text_widths=widths))
    time_width = 256 if size == "c" else TINY.time_id_width
    torch.set_default_dtype(torch.bfloat16 if size == "c" else torch.float32)
    pipeline.unet = UNet2DConditionModel(
        **(REAL if size == "c" else MIDDLE),
        use_linear_projection=True,
        cross_attention_dim=sum(widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + widths[1],
    )
    torch.set_default_dtype(torch.float32)
    print(f"UNet: {sum(p.numel() for p in pipeline.unet.parameters()) / 1e6:.1f}M parameters", flush=True)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def make_trainer(size: str, folder: Path, model: Path, batch_size: int, compiles: bool) -> Trainer:
    """Returns the trainer of an LCM-LoRA on random pictures, its caches filled, before the first step."""
    edge = 64 if size == "a" else 256
    (folder / "images").mkdir()
    for index in range(NUM_IMAGES):
        pixels = torch.randint(0, 256, (edge, edge, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"images/{index}.png")
    settings = {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(folder / "output"),
        "distillation_method": "lcm",
        "max_train_steps": 1000,
        "resolution": edge,
        "resolution_type": "pixel",
        "train_batch_size": batch_size,
        "gradient_checkpointing": False,
        "mixed_precision": "bf16" if size == "c" else "no",
        "optimizer": "adamw",
        "dynamo_backend": "inductor" if compiles else "no",
    }
    dataset = {"id": "images", "instance_data_dir": str(folder / "images"), "caption_strategy": "filename"}
    (folder / "multidatabackend.json").write_text(json.dumps([dataset]))
    (folder / "config.json").write_text(json.dumps(settings))
    accelerator = make_accelerator()
    plan = way._plan(load(folder), accelerator)
    cache = way._cache(plan, accelerator)
    dataset = way._dataset(plan, cache, accelerator)
    prepared = way._Prepared(plan, None, dataset, None, way.Trackers([], 0))
    return way._trainer(prepared, way.build(plan, accelerator, dataset), way.TrainState(plan.max_steps))


def make_floor(trainer: Trainer, dtype: torch.dtype | None) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns what makes the forwards and the backward of a step, and what updates the weights."""
    run = trainer.run
    learner, module = run.learners["student"], run.module
    batch, _ = next(iter(run.dataset.batches(None)))
    x, cond, geometry = batch.mean, batch.cond, batch.geometry
    t = torch.full((len(x),), 499)
    uncond = run.distiller.uncond(cond)
    both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}
    x2, t2, geometry2 = torch.cat([x, x]), torch.cat([t, t]), torch.cat([geometry, geometry])

    def precision() -> Any:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def floor() -> None:
        with torch.no_grad(), adapters_off(module), precision():
            run.family.forward(module, x2, t2, both, geometry2)
        with torch.no_grad(), precision():
            run.family.forward(module, x, t, cond, geometry)
        with precision():
            out = run.family.forward(module, x, t, cond, geometry)
        out.float().square().mean().backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)

    return floor, update


class Waiting:
    """An iterator that counts the time in which the next item is waited for."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> "Waiting":
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        item = next(self.items)
        self.seconds += time.perf_counter() - started
        return item


def seconds(step: Callable[[], object], count: int) -> float:
    """Returns the time of one of ``count`` steps."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


def peak_mb(trainer: Trainer, dtype: torch.dtype | None, whose: str) -> int:
    """Returns the high-water mark of the process, in MB, over three steps of the trainer or of the floor."""
    floor, update = make_floor(trainer, dtype)
    batches = trainer.run.dataset.batches(None)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(3):
        if whose == "trainer":
            trainer._optimizer_step(batches)
        else:
            floor()
            update()
    return megabytes("VmHWM")


def measure(trainer: Trainer, script: ScriptStep | None, dtype: torch.dtype | None, arguments: Any) -> dict[str, Any]:
    """Returns the figures: medians over rounds, each of which runs everything in turn."""
    floor, update = make_floor(trainer, dtype)
    batches = Waiting(trainer.run.dataset.batches(None))
    ours = {"trainer": lambda: trainer._optimizer_step(batches), "floor": floor, "update": update}
    with FlopCounter() as counter:
        floor()
    update()
    works = {**ours, **({"script": script, "script, encoded": lambda: script(encodes=False)} if script else {})}
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds + 1):
        if number == 1:
            batches.seconds = 0.0
        rounds.append({name: seconds(work, arguments.steps) for name, work in works.items()})
    median = {name: statistics.median(each[name] for each in rounds[1:]) for name in works}

    def ratio(over: Callable[[dict[str, float]], float]) -> float:
        return round(statistics.median(over(each) for each in rounds[1:]), 3)

    waited = batches.seconds / sum(each["trainer"] * arguments.steps for each in rounds[1:])
    return {
        **{f"{name} s": round(value, 4) for name, value in median.items()},
        "trainer / floor": ratio(lambda each: each["trainer"] / each["floor"]),
        "trainer / (floor + update)": ratio(lambda each: each["trainer"] / (each["floor"] + each["update"])),
        **{f"{name} / trainer": ratio(lambda each, n=name: each[n] / each["trainer"]) for name in list(works)[3:]},
        "TFLOP": round(counter.total / 1e12, 4),
        "TFLOP/s": round(counter.total / 1e12 / median["trainer"], 4),
        "data wait": round(waited, 4),
    }


def main() -> None:
    """Measures one size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("size", choices=["a", "b", "c"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="the trainer's and the floor's network, by inductor")
    parser.add_argument("--peak", choices=["trainer", "floor"], help="only the memory of one of the two")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = write_model(arguments.size, Path(name))
        trainer = make_trainer(arguments.size, Path(name), model, arguments.batch, arguments.compile)
        dtype = torch.bfloat16 if arguments.size == "c" else None
        if arguments.peak:
            print(f"peak MB, {arguments.peak}: {peak_mb(trainer, dtype, arguments.peak)}")
            return
        script = None
        if arguments.size != "c":
            batch, _ = next(iter(trainer.run.dataset.batches(None)))
            tokens, targets = tuple(batch.cond["prompt_embeds"].shape), list(LORA_PRESETS["lcm"])
            script = ScriptStep(model / "unet", 64, targets, tokens, batch.mean.shape[-1])
        figures = measure(trainer, script, dtype, arguments)
    for key, value in figures.items():
        print(f"{key:28} {value}")
    threads = torch.get_num_threads()
    print(json.dumps({"size": arguments.size, "batch": arguments.batch, "threads": threads, **figures}))


if __name__ == "__main__":
    main()
