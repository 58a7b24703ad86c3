"""What each saving of a step brings: the same step with one of them undone at a time, in alternation in one process.

    python -m tests.benchmarks.savings {a,b} [--rounds 7] [--steps 2] [--batch 4]

The step is the floor of ``tests.benchmarks.step`` with its update: teacher, target, student, backward, clipping and the
optimizer, on tensors that are there. A row's ratio is its time over the whole step's: above 1 the saving is one.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from simpletuner.batch import Batch
from simpletuner.denoiser import adapters_off, checkpoint_with_adapters
from simpletuner.training.adapters import trainable_parameters
from simpletuner.training.build import Run
from tests.benchmarks.step import make_trainer, seconds, write_model


@dataclass(frozen=True)
class Way:
    """How a step is made; the defaults are how the trainer makes it."""

    asks_teacher_once: bool = True
    flips_flags: bool = True
    reads_loss: bool = False
    optimizer: Literal["fused", "foreach", "for-loop"] = "fused"
    fuses_attention: bool = True
    channels_last: bool = False
    recomputes: bool = False
    guides: bool = True


WAYS: Mapping[str, Way] = {
    "the step": Way(),
    "the teacher asked twice": Way(asks_teacher_once=False),
    "adapters switched by peft": Way(flips_flags=False),
    "the loss read in each step": Way(reads_loss=True),
    "optimizer: foreach": Way(optimizer="foreach"),
    "optimizer: a loop": Way(optimizer="for-loop"),
    "attention without the fused kernel": Way(fuses_attention=False),
    "channels_last": Way(channels_last=True),
    "gradient checkpointing": Way(recomputes=True),
    "outside the guidance interval": Way(guides=False),
}


class Step:
    """One step on a network of its own."""

    def __init__(self, run: Run, batch: Batch, way: Way) -> None:
        self.run, self.batch, self.way = run, batch, way
        self.module: Any = copy.deepcopy(run.module)
        self.parameters = list(trainable_parameters(self.module).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, fused=way.optimizer == "fused", foreach=way.optimizer == "foreach"
        )
        if not way.fuses_attention:
            self.module.set_attn_processor(AttnProcessor())
        if way.channels_last:
            nn.Module.to(self.module, memory_format=torch.channels_last)
        if way.recomputes:
            self.module.enable_gradient_checkpointing(checkpoint_with_adapters(self.module))

    def forward(self, rows: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Returns the network's prediction of the samples at some places of the batch."""
        x, geometry = self.batch.mean[rows], self.batch.geometry[rows]
        return self.run.family.forward(self.module, x, torch.full((len(rows),), 499), cond, geometry, None)

    def teacher(self, rows: Tensor) -> None:
        """Asks the base weights, with and without the captions."""
        cond = dict(self.batch.cond)
        uncond = dict(self.run.distiller.uncond(cond))
        if not self.way.guides:
            self.forward(rows, cond)
        elif self.way.asks_teacher_once:
            both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}
            self.forward(torch.cat([rows, rows]), both)
        else:
            self.forward(rows, cond)
            self.forward(rows, uncond)

    def __call__(self) -> None:
        """Makes a step."""
        rows, cond = torch.arange(len(self.batch.mean)), dict(self.batch.cond)
        with torch.no_grad():
            if not self.way.flips_flags:
                self.module.disable_adapters()
            with adapters_off(self.module) if self.way.flips_flags else nullcontext():
                self.teacher(rows)
            if not self.way.flips_flags:
                self.module.enable_adapters()
            self.forward(rows, cond)
        loss = self.forward(rows, cond).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.way.reads_loss:
            loss.item()


def measure(steps: Mapping[str, Callable[[], None]], rounds: int, count: int) -> dict[str, tuple[float, float]]:
    """Returns name -> (seconds, ratio to the first): medians over rounds after one that warms up."""
    found = [{name: seconds(step, count) for name, step in steps.items()} for _ in range(rounds + 1)][1:]
    first = next(iter(steps))
    return {
        name: (
            statistics.median(each[name] for each in found),
            statistics.median(each[name] / each[first] for each in found),
        )
        for name in steps
    }


def main() -> None:
    """Measures one size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("size", choices=["a", "b"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = write_model(arguments.size, Path(name))
        trainer = make_trainer(arguments.size, Path(name), model, arguments.batch, compiles=False)
        batch, _ = next(iter(trainer.run.dataset.batches(None)))
        batch = replace(batch, mean=batch.mean.float())
        found = measure(
            {name: Step(trainer.run, batch, way) for name, way in WAYS.items()}, arguments.rounds, arguments.steps
        )
    print(f"{'':36} seconds   ratio")
    for name, (time, ratio) in found.items():
        print(f"{name:36} {time:7.4f} {ratio:7.3f}")


if __name__ == "__main__":
    main()
