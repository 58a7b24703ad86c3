"""Time of a training step against a bare loop that does the same forwards and backwards, in alternation.

    python -m tests.benchmarks.step [--config PATH] [--rounds 7] [--steps 10] [--key value ...]

The bare loop keeps one batch on the device, draws its noise there, and knows of no cache, sampler, metric or schedule:
it is what the arithmetic costs. Both use the same network, adapter and optimizer. Prints one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from simpletuner import run as way
from simpletuner.config.load import load
from simpletuner.config.schema import Config
from simpletuner.training.build import build, make_accelerator
from simpletuner.training.state import TrainState
from simpletuner.training.trainer import Trainer


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """Returns a function that makes one step of the method's three forwards, backward, clipping and update."""
    run = trainer.run
    learner = run.learners["student"]
    batch, _ = next(iter(run.dataset.batches(None)))
    batch = batch.to(run.accelerator.device)
    denoisers, schedule = run.distiller.denoisers, run.schedule
    uncond = run.distiller.uncond(batch.cond)
    grid = schedule.grid(50)
    size = len(batch.mean)
    w = torch.full((size,), 7.5)

    def step() -> None:
        index = torch.randint(0, 50, (size,))
        start, end = grid[index + 1], grid[index]
        noisy = schedule.add_noise(batch.mean, torch.randn_like(batch.mean), start)
        with torch.no_grad():
            teacher = denoisers["teacher"].guided(noisy, start, batch.cond, uncond, batch.geometry, w)
            reached = schedule.ddim_step(teacher.x0, teacher.noise, end)
            target = denoisers["target"](reached, end, batch.cond, batch.geometry).x0
        student = denoisers["student"](noisy, start, batch.cond, batch.geometry).x0
        ((student - target) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], object], count: int) -> float:
    """Returns the time of one of ``count`` steps."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


def make_trainer(config: Config) -> Trainer:
    """Returns the trainer of a config, its caches filled, before the first step."""
    accelerator = make_accelerator()
    plan = way._plan(config, accelerator)
    cache = way._cache(plan, accelerator)
    run = build(plan, accelerator, cache, way._dataset(plan, cache, accelerator))
    return way._trainer(plan, run, cache, TrainState(plan.max_steps))


def main() -> None:
    """Measures in alternation, so that whatever else the machine does falls on both alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("config/examples/quickstart"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    arguments, rest = parser.parse_known_args()
    overrides = dict(zip((key.removeprefix("--") for key in rest[::2]), rest[1::2], strict=True))
    trainer = make_trainer(load(arguments.config, overrides))
    batches = trainer.run.dataset.batches(None)
    trainer.settings = replace(trainer.settings, gradient_accumulation_steps=1)
    bare = bare_step(trainer)
    pairs: list[tuple[float, float]] = []
    for _ in range(arguments.rounds + 1):
        ours = seconds(lambda: trainer._optimizer_step(batches), arguments.steps)
        pairs.append((ours, seconds(bare, arguments.steps)))
    ours, plain = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    ratio = statistics.median(plain / ours for ours, plain in pairs[1:])
    print(
        json.dumps(
            {"ours_ms": round(ours * 1e3, 2), "bare_ms": round(plain * 1e3, 2), "bare_over_ours": round(ratio, 3)}
        )
    )


if __name__ == "__main__":
    main()
