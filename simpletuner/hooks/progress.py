"""How a run goes on, for a person: a bar where stderr is a terminal, else a plain line every few seconds."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LINE_SECONDS = 10.0
"""Least time between two plain lines: a log of a day stays below 9,000 lines."""


class HasStep(Protocol):
    """What this hook reads of the train state."""

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        ...


@dataclass
class ProgressHook:
    """Shows step, loss, gradient norm, rate, samples a second and time left.

    The pace is the median over the last intervals between two logged rows, at which the device has caught up: so
    loading, compiling, validation and checkpoints, which fall into few of them, do not stretch the time left.
    """

    num_steps: int
    samples_per_step: int
    console: Console = field(default_factory=lambda: Console(stderr=True))
    clock: Callable[[], float] = time.monotonic
    _bar: Progress | None = None
    _task: TaskID = TaskID(0)
    _mark: tuple[int, float] | None = None
    _step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=21))
    _last_line: float = -LINE_SECONDS

    def on_start(self, state: HasStep) -> None:
        """Shows an empty bar, or nothing where there is no terminal."""
        if self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=self.num_steps, completed=state.step)
            self._bar.start()

    def on_step(self, state: HasStep, row: Mapping[str, float] | None) -> None:
        """Shows the newest row of metrics, if one was read from the device at this step."""
        now = self.clock()
        if self._mark is None:
            # The first step compiles kernels and fills caches: the pace counts from its end.
            self._mark = (state.step, now)
        elif row is not None:
            step, since = self._mark
            self._step_seconds.append((now - since) / max(1, state.step - step))
            self._mark = (state.step, now)
        if self._bar is not None:
            text = {} if row is None else {"description": self.text(state, row)}
            self._bar.update(self._task, completed=state.step, **text)  # pyright: ignore[reportArgumentType]
        elif row is not None and (now - self._last_line >= LINE_SECONDS or state.step >= self.num_steps):
            self._last_line = now
            print(f"step {state.step}/{self.num_steps}  {self.text(state, row)}", file=self.console.file, flush=True)

    def on_end(self, state: HasStep) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.step)
            self._bar.stop()

    def text(self, state: HasStep, row: Mapping[str, float]) -> str:
        """Returns loss, gradient norm, rate, samples a second and time left, as far as they are known."""
        parts = [
            f"{label} {row[key]:{form}}"
            for key, label, form in (
                ("loss", "loss", ".4f"),
                ("grad_norm", "grad norm", ".3g"),
                ("learning_rate", "lr", ".2e"),
            )
            if key in row
        ]
        if self._step_seconds:
            seconds = statistics.median(self._step_seconds)
            parts.append(f"{self.samples_per_step / max(seconds, 1e-9):.3g} samples/s")
            parts.append(f"{duration(seconds * (self.num_steps - state.step))} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Returns a time span in the two units that a person would say, such as ``2 h 05 min``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600:02d} h"
