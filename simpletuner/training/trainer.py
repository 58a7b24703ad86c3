"""The loop: it owns time (steps, accumulation, hooks, checkpoints) and knows no family and no method."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.batch import Batch
from simpletuner.config.errors import UserError
from simpletuner.data.sampler import Position
from simpletuner.distillers._base import Draw
from simpletuner.randomness import Randomness
from simpletuner.training.build import Run
from simpletuner.training.meter import StepMeter
from simpletuner.training.metrics import MetricsBuffer, Row
from simpletuner.training.state import StopRequest, TrainState


class Hook(Protocol):
    """What wants to act while a run trains; every rank calls it, at the same steps."""

    def on_start(self, state: TrainState) -> None:
        """Acts before the first step of this process."""
        ...

    def on_step(self, state: TrainState, row: Row | None) -> None:
        """Acts after an optimizer step; ``row`` holds its metrics when they were just read from the device."""
        ...

    def on_end(self, state: TrainState) -> None:
        """Acts after the last step of this process, also when it was stopped by a signal."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of the loop, derived by the plan."""

    seed: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    """Limit of the gradient's norm, or of each of its values; 0: no limit."""
    clips_values: bool
    """Whether the limit is on each value."""
    checkpoint_step_interval: int
    logging_steps: int
    """Optimizer steps between two reads of the metrics from the device."""
    learning_rate: Callable[[int], float]
    """Rate of the update that follows so many finished optimizer steps."""


class Trainer:
    """Trains the student of a run to its last step, or to the step at which it is asked to stop."""

    def __init__(
        self,
        run: Run,
        settings: LoopSettings,
        state: TrainState,
        hooks: Sequence[Hook],
        save_checkpoint: Callable[[TrainState], None],
        write_rows: Callable[[Sequence[Row]], None],
        meter: StepMeter,
    ) -> None:
        self.run = run
        self.settings = settings
        self.state = state
        self.hooks = hooks
        self._save_checkpoint = save_checkpoint
        self._write_rows = write_rows
        self._randomness = Randomness(settings.seed)
        self._metrics = MetricsBuffer()
        self._meter = meter

    def train(self) -> TrainState:
        """Returns the state after the last step of this process."""
        state = self.state
        for hook in self.hooks:
            hook.on_start(state)
        drawn = state.step * self.settings.gradient_accumulation_steps
        batches = self.run.dataset.batches(state.position, drawn)
        self._meter.start()
        with StopRequest() as stop:
            while not state.finished and state.stopped_by is None:
                self._optimizer_step(batches)
                state.stopped_by = stop.agreed(self.run.host_group)
                saves = state.finished or state.stopped_by is not None
                saves = saves or _is_due(state.step, self.settings.checkpoint_step_interval)
                row = self._flush() if saves or _is_due(state.step, self.settings.logging_steps) else None
                with self._meter.pausing():
                    if saves:
                        self._save_checkpoint(state)
                    if state.stopped_by is None:
                        for hook in self.hooks:
                            hook.on_step(state, row)
        for hook in self.hooks:
            hook.on_end(state)
        return state

    def _optimizer_step(self, batches: Iterator[tuple[Batch, Position]]) -> None:
        """Makes one optimizer step of every role whose turn it is, from one window of micro-batches."""
        state, run = self.state, self.run
        with self._meter.waiting():
            window = [self._next(batches) for _ in range(self.settings.gradient_accumulation_steps)]
        num_samples = int(sum(batch.global_weight for batch, _ in window))
        # Modules' own randomness (lora_dropout) is the one draw that no sample position can seed.
        torch.manual_seed(_step_seed(self.settings.seed, state.step, run.accelerator.process_index))
        metrics: dict[str, Tensor | float] = {}
        roles = run.distiller.updates(state.step)
        shapes = [(tuple(batch.mean.shape), draw.num_guided) for batch, draw in window]
        with self._meter.step((roles, *shapes), num_samples):
            for role in roles:
                metrics |= self._update(role, window)
        state.step += 1
        state.samples += num_samples
        for average in run.averages.values():
            average.update()
        run.distiller.after_step(state.step)
        self._metrics.add(state.step, metrics)

    def _next(self, batches: Iterator[tuple[Batch, Position]]) -> tuple[Batch, Draw]:
        """Returns the next micro-batch and its draws, on the device, and moves the position behind it."""
        batch, self.state.position = next(batches)
        draw = self.run.distiller.draw(batch, self._randomness)
        device = self.run.accelerator.device
        return batch.to(device), draw.to(device)

    def _update(self, role: str, window: Sequence[tuple[Batch, Draw]]) -> dict[str, Tensor | float]:
        """Steps one role's optimizer; its gradient is the weighted mean over all micro-batches and ranks.

        Returns:
            Numbers, and 0-d tensors on the device whose sums over the ranks are the step's metrics.
        """
        run, learner = self.run, self.run.learners[role]
        world = run.accelerator.num_processes
        total = sum(batch.global_weight for batch, _ in window)
        loss = torch.zeros((), device=run.accelerator.device)
        metrics: dict[str, Tensor | float] = {}
        for index, (batch, draw) in enumerate(window):
            last = index == len(window) - 1
            with nullcontext() if last else run.accelerator.no_sync(learner.module):
                output = run.distiller.loss(role, batch, draw, self.state.step)
                part = (batch.weight.to(output.per_sample) * output.per_sample).sum() / total
                # DDP takes the mean over the ranks; the window's total weight already counts them all.
                learner.scaler.scale(part * world).backward()
            loss += part.detach()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() / (len(window) * world)
        learner.scaler.unscale_(learner.optimizer)
        norm = self._clip(learner.parameters)
        rate = self.settings.learning_rate(self.state.step)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        metrics |= {"loss": loss, "grad_norm": norm / world, "learning_rate": rate}
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)
        prefix = "" if len(self.run.learners) == 1 else f"{role}/"
        return {prefix + name: value for name, value in metrics.items()}

    def _clip(self, parameters: Sequence[Tensor]) -> Tensor:
        """Returns the norm of all gradients before they are clipped, 0-d on the device."""
        limit = self.settings.max_grad_norm or math.inf
        if not self.settings.clips_values:
            return torch.nn.utils.clip_grad_norm_(parameters, limit)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_value_(parameters, limit)
        return norm

    def _flush(self) -> Row | None:
        """Returns the newest row of metrics, after all that waited on the device were read and written.

        Raises:
            UserError: The loss is not finite any more, so that going on (or saving) would be worthless.
        """
        waiting = self._metrics.flush(self.run.sum_over_ranks)
        rates = self._meter.read()
        rows = [{**row, **rates} for row in waiting]
        self._write_rows(rows)
        for row in rows:
            if not all(math.isfinite(value) for name, value in row.items() if name.endswith("loss")):
                raise UserError(
                    f"the loss is not finite at step {row['step']:.0f}: nothing was saved after the last checkpoint; "
                    "lower learning_rate, lengthen lr_warmup_steps, or set mixed_precision to bf16 or no"
                )
        return rows[-1] if rows else None


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}/modules/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
