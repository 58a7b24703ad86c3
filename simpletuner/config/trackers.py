"""The trackers that ``report_to`` may name."""

from importlib.util import find_spec
from typing import Literal, get_args

Tracker = Literal["wandb", "tensorboard", "comet_ml", "mlflow", "swanlab", "all"]


def named(trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
    """Returns the trackers, those that are installed in place of ``all``. Raises ValueError where none is."""
    if "all" not in trackers:
        return trackers
    names: tuple[Tracker, ...] = get_args(Tracker)[:-1]
    found: tuple[Tracker, ...] = tuple(name for name in names if find_spec(name) is not None)
    if not found:
        raise ValueError(f"all: none is installed of {', '.join(names)}")
    return found
