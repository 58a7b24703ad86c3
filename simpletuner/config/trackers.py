"""The trackers that ``report_to`` may name."""

from importlib.util import find_spec
from typing import Literal, get_args

Tracker = Literal["wandb", "tensorboard", "trackio", "comet_ml", "mlflow", "swanlab", "custom-tracker", "all"]
_NO_PACKAGES: tuple[Tracker, ...] = ("custom-tracker", "all")


def named(trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
    """Returns the trackers, those that are installed in place of ``all``. Raises ValueError where none is."""
    if "all" not in trackers:
        return trackers
    known: tuple[Tracker, ...] = get_args(Tracker)
    names: list[Tracker] = [name for name in known if name not in _NO_PACKAGES]
    found: list[Tracker] = [name for name in names if find_spec(name) is not None]
    if not found:
        raise ValueError(f"all: none is installed of {', '.join(names)}")
    given: list[Tracker] = [name for name in trackers if name != "all" and name not in found]
    return (*given, *found)
