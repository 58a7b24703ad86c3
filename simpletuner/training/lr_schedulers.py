"""Learning rate schedules as pure functions of the optimizer step.

So a resumed run needs no saved schedule, and a changed rate or length of the run takes effect when resuming.

``factor(step)`` multiplies the rate of the update that follows ``step`` finished ones. With ``warmup`` updates of
warm-up, update number n (from 1) has rate n / warmup: the first is not zero, number ``warmup`` is the full rate. After
that, progress p goes from 0 to 1 over the rest of the run, and a decaying schedule from the full rate to ``end``:

    linear                 end + (1 - end) (1 - p)
    cosine                 end + (1 - end) (1 + cos(pi p)) / 2
    cosine_with_restarts   the same, ``num_cycles`` times over the run, each time from the full rate
    sine                   end + (1 - end) (1 + cos(2 pi num_cycles p)) / 2: swings down and up again
    polynomial             end + (1 - end) (1 - p)^power

Update number n + 1 has p = (n - warmup) / (num_steps - warmup), so the last update is one step short of ``end``: an
update at rate zero would be wasted. Steps are optimizer steps, whatever the number of processes or of micro-batches.
"""

import math
from collections.abc import Callable, Mapping

from simpletuner.config.schema import OptimizerSection

Shape = Callable[[float, float, float], float]
"""(progress in [0, 1], num_cycles, power) -> 1 for the full rate, 0 for the end rate."""


def _constant(_progress: float, _num_cycles: float, _power: float) -> float:
    return 1.0


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _cosine_with_restarts(progress: float, num_cycles: float, _power: float) -> float:
    return 0.0 if progress >= 1 else _cosine(progress * num_cycles % 1)


SHAPES: Mapping[str, Shape] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": lambda progress, _num_cycles, _power: 1 - progress,
    "cosine": lambda progress, _num_cycles, _power: _cosine(progress),
    "cosine_with_restarts": _cosine_with_restarts,
    "sine": lambda progress, num_cycles, _power: _cosine(2 * num_cycles * progress),
    "polynomial": lambda progress, _num_cycles, power: (1 - progress) ** power,
}
"""The values of ``lr_scheduler``."""


def factor(section: OptimizerSection, num_steps: int, step: int) -> float:
    """Returns the factor on ``learning_rate`` for the update after ``step`` of ``num_steps`` optimizer steps."""
    warmup = section.lr_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    end = section.lr_end / section.learning_rate
    return end + (1 - end) * SHAPES[section.lr_scheduler](progress, section.lr_num_cycles, section.lr_power)


def learning_rate(section: OptimizerSection, num_steps: int, step: int) -> float:
    """Returns the rate of the update after ``step`` of ``num_steps`` optimizer steps."""
    return section.learning_rate * factor(section, num_steps, step)
