"""The loss on held-out pictures, at fixed noise levels with fixed noise, so that steps and runs compare.

Nothing of it reaches training: the draws are pure functions of a seed of their own, and no module's state is changed.

Shapes: Q noise levels of one picture.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch
from simpletuner.data.dataset import CachedDataset
from simpletuner.randomness import NOISE_LEVELS, Randomness
from simpletuner.training.build import Run
from simpletuner.training.metrics import Row
from simpletuner.training.state import TrainState

_LOG = logging.getLogger(__name__)
SEED = 0
"""Of every run's held-out noise, and of the order in which the pictures meet it."""


@dataclass(frozen=True)
class FixedLevels(Randomness):
    """Draws whose noise levels are given, and all else is random."""

    levels: Tensor
    """[Q] shares of the way from picture to noise, below 1."""

    def uniform(self, stream: str, positions: Tensor) -> Tensor:
        """Returns the levels where the stream draws them."""
        return self.levels.float() if stream in NOISE_LEVELS else super().uniform(stream, positions)

    def integers(self, stream: str, positions: Tensor, high: int) -> Tensor:
        """Returns the levels' steps of a grid where the stream draws them."""
        return (self.levels * high).long() if stream in NOISE_LEVELS else super().integers(stream, positions, high)


class EvalLoss:
    """A hook that measures before the first step, at every interval, and at the end."""

    def __init__(
        self,
        run: Run,
        datasets: Sequence[CachedDataset],
        num_levels: int,
        step_interval: int,
        rows_at_once: int,
        add_row: Callable[[Row], None],
    ) -> None:
        """Keeps what it measures with.

        Args:
            run: Whose student is measured, by the run's own method.
            datasets: The held-out ones, one picture a batch.
            num_levels: Noise levels of each picture.
            step_interval: Steps between two measurements; 0: only at both ends.
            rows_at_once: Samples of one forward: not more than training takes.
            add_row: Where the numbers go; those of earlier steps may still be on the device.
        """
        self._run, self._datasets = run, datasets
        self._levels = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
        self._step_interval, self._rows_at_once = step_interval, rows_at_once
        self._add_row = add_row

    def on_start(self, state: TrainState) -> None:
        """Measures what training begins from."""
        if state.step == 0:
            self._measure(state)

    def on_step(self, state: TrainState, row: Row | None) -> None:
        """Measures where the interval or the end of the run asks for it."""
        if state.finished or (self._step_interval and state.step % self._step_interval == 0):
            self._measure(state)

    def on_end(self, state: TrainState) -> None:
        """Has nothing left to do: the last step was measured when it was made."""

    def _measure(self, state: TrainState) -> None:
        """Takes the mean over all pictures of all ranks, whole and by noise level."""
        run, sums = self._run, torch.zeros(len(self._levels), dtype=torch.float64)
        count = 0
        with torch.no_grad(), run.averaged_weights(), _without_dropout(run.module):
            for batch in self._batches():
                sums += self._losses(batch, state.step)
                count += 1
        world = torch.tensor([*sums.tolist(), count], device=run.accelerator.device, dtype=torch.float32)
        *by_level, total = run.sum_over_ranks(world).tolist()
        losses = [value / total for value in by_level]
        mean = sum(losses) / len(losses)
        names = [f"eval_loss/{100 * level:.0f}" for level in self._levels.tolist()]
        self._add_row({"step": state.step, "eval_loss": mean, **dict(zip(names, losses, strict=True))})
        if run.accelerator.is_main_process:
            parts = ", ".join(
                f"{100 * level:.0f} % noise {loss:.4f}"
                for level, loss in zip(self._levels.tolist(), losses, strict=True)
            )
            _LOG.info("held-out loss after step %d: %.4f (%s)", state.step, mean, parts)

    def _batches(self) -> Iterator[Batch]:
        """Yields this rank's pictures of one pass, each a batch of one."""
        rank, world = self._run.accelerator.process_index, self._run.accelerator.num_processes
        for dataset in self._datasets:
            (number,) = dataset.batches_per_epoch.values()
            for batch, _ in islice(dataset.batches(), rank, number, world):
                yield batch

    def _losses(self, batch: Batch, step: int) -> Tensor:
        """Returns [Q] float64 losses of one picture at all noise levels, on the CPU."""
        distiller, device = self._run.distiller, self._run.accelerator.device
        found: list[Tensor] = []
        for levels in self._levels.split(self._rows_at_once):
            rows = _repeated(batch, len(levels))
            draw = distiller.draw(rows, FixedLevels(SEED, levels))
            found.append(distiller.loss("student", rows.to(device), draw.to(device), step).per_sample)
        return torch.cat(found).double().cpu()


def _repeated(batch: Batch, number: int) -> Batch:
    """Returns a batch of one sample as a batch of so many of the same."""

    def rows(value: Tensor) -> Tensor:
        return value.expand(number, *value.shape[1:])

    return replace(
        batch,
        mean=rows(batch.mean),
        std=None if batch.std is None else rows(batch.std),
        cond={name: rows(value) for name, value in batch.cond.items()},
        dropped=rows(batch.dropped),
        geometry=rows(batch.geometry),
        position=rows(batch.position),
        weight=rows(batch.weight),
        ids=batch.ids * number,
    )


@contextmanager
def _without_dropout(module: nn.Module) -> Generator[None]:
    """Switches off the dropouts that drop anything; a compiled network that has none stays as it was compiled."""
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    for dropout in dropouts:
        dropout.train(False)
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.train(True)
