"""How long a run is, and when each dataset is shown in it."""

import math
from collections.abc import Iterable, Mapping

from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.config.schema import Config
from simpletuner.data.sampler import Window


def count_steps(config: Config, batches_per_epoch: int | None, notices: list[str]) -> int:
    """Returns the optimizer steps of the run: of ``max_train_steps`` and ``num_train_epochs`` the smaller.

    Without a number of batches, as long as no shard has been downloaded, ``max_train_steps`` has to say.
    """
    run = config.run
    if batches_per_epoch == 0:
        raise UserError("no dataset has an image to train on; see the lines on each dataset")
    if batches_per_epoch is None:
        if run.max_train_steps is None:
            raise UserError("num_train_epochs: no image is counted yet: give max_train_steps, or fill the cache first")
        return run.max_train_steps
    by_epochs = (
        math.ceil(run.num_train_epochs * batches_per_epoch / run.gradient_accumulation_steps)
        if run.num_train_epochs is not None
        else None
    )
    if run.max_train_steps is not None and by_epochs is not None:
        shorter = "max_train_steps" if run.max_train_steps <= by_epochs else "num_train_epochs"
        notices.append(
            f"max_train_steps and num_train_epochs: {run.max_train_steps} steps and {by_epochs} steps "
            f"({run.num_train_epochs} epochs): {shorter} is the smaller and holds"
        )
    given = [steps for steps in (run.max_train_steps, by_epochs) if steps is not None]
    if not given:
        raise UserError("max_train_steps: give the length of the run by max_train_steps or num_train_epochs")
    shown = windows(config.datasets, batches_per_epoch, run.gradient_accumulation_steps)
    notices.extend(never_shown(config.datasets, shown, run.gradient_accumulation_steps, min(given)))
    return min(given)


def warmup_notices(warmup_steps: int, steps: int) -> list[str]:
    """Returns a notice when the learning rate would never be reached."""
    if warmup_steps < steps:
        return []
    return [
        f"lr_warmup_steps: the learning rate is still rising when the run ends ({steps} steps); "
        f"full rate is reached at step {warmup_steps}"
    ]


def windows(datasets: Iterable[DatasetConfig], batches_per_epoch: int, accumulation: int) -> dict[str, Window]:
    """Returns dataset id -> when it is shown: after both of its starts, and until the first of its ends.

    Args:
        datasets: Of the run.
        batches_per_epoch: Of all datasets together: an epoch of the run.
        accumulation: Batches of a step.
    """

    def window(dataset: DatasetConfig) -> Window:
        start = max(dataset.start_step * accumulation, (dataset.start_epoch - 1) * batches_per_epoch)
        ends = [] if dataset.end_step is None else [dataset.end_step * accumulation]
        ends += [] if dataset.end_epoch is None else [dataset.end_epoch * batches_per_epoch]
        return Window(start, min(ends, default=None))

    return {dataset.id: window(dataset) for dataset in datasets}


def never_shown(
    datasets: Iterable[DatasetConfig], shown: Mapping[str, Window], accumulation: int, steps: int
) -> list[str]:
    """Returns a notice for each dataset that begins after the run has ended.

    Raises:
        UserError: There is a time at which no dataset is shown.
    """
    end, drawn = steps * accumulation, 0
    opening = sorted((shown[dataset.id] for dataset in datasets if dataset.probability > 0), key=lambda w: w.start)
    for window in opening:
        if window.start <= drawn:
            drawn = max(drawn, end if window.end is None else window.end)
    if drawn < end:
        until = min((window.start for window in opening if window.start > drawn), default=end)
        raise UserError(
            "start_step, end_step, start_epoch, end_epoch: no dataset is shown from step "
            f"{drawn // accumulation} to step {min(until, end) // accumulation} of {steps}; "
            "let one begin earlier, or end later"
        )
    return [
        f"dataset '{name}' is never shown: it begins at step {window.start // accumulation}, and the run has {steps}"
        for name, window in shown.items()
        if window.start >= end
    ]
