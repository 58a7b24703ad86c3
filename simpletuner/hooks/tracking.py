"""The numbers and pictures of a run in the trackers of ``report_to``, through accelerate's own classes."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.config.schema import Config
from simpletuner.hooks.custom_tracker import FAILURES, custom_tracker
from simpletuner.training.metrics import Row

IDS = "trackers.json"
"""The file in output_dir with the id of the run in each tracker that has ids: a resumed run goes on under it."""
_FOLDER = "tensorboard"

_PACKAGES = {"comet_ml": "comet-ml", "mlflow": "mlflow", "swanlab": "swanlab"}
"""What pip calls the packages of trackers that no extra brings."""


class Trackers:
    """Hands rows and pictures on in the order of their steps, which some trackers insist on."""

    def __init__(self, trackers: Sequence[GeneralTracker], step: int) -> None:
        self._trackers = trackers
        self._step = step
        self._waiting: list[tuple[int, Mapping[str, Path]]] = []

    def rows(self, rows: Sequence[Row]) -> None:
        """Logs rows of metrics, and the pictures of their steps after them."""
        for row in rows:
            self._step = int(row["step"])
            values = {name: value for name, value in row.items() if name != "step"}
            for tracker in self._trackers:
                tracker.log(values, step=self._step)
            self._log_pictures()

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Logs the pictures of a step, after the metrics up to it: these may still be on their device."""
        self._waiting.append((step, pictures))
        self._log_pictures()

    def _log_pictures(self) -> None:
        ready = [(step, pictures) for step, pictures in self._waiting if step <= self._step]
        self._waiting = [(step, pictures) for step, pictures in self._waiting if step > self._step]
        for step, pictures in ready:
            for tracker in self._trackers:
                _log_pictures(tracker, step, pictures)

    def finish(self) -> None:
        """Closes the trackers, which may wait for what is on its way."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = ()


def _log_pictures(tracker: Any, step: int, pictures: Mapping[str, Path]) -> None:  # Any: only some have log_images
    if tracker.name == "trackio":
        picture: Any = import_module("trackio").Image  # Any: an optional package
        tracker.log({name: picture(str(path)) for name, path in pictures.items()}, step=step)
        return
    if not hasattr(tracker, "log_images"):
        return
    values = {
        name: np.asarray(Image.open(path).convert("RGB"))[None] for name, path in pictures.items()
    }  # [1, H, W, 3]
    further = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images(values, step=step, **further)


def start_trackers(config: Config, step: int) -> Trackers:
    """Returns the trackers of the config, started; a run that goes on from a step continues its curves.

    Raises:
        UserError: A package is missing, or nobody is logged in.
    """
    started: list[GeneralTracker] = []
    for name in config.publish.report_to:
        _check_package(name)
        if name == "wandb":
            _check_wandb()
    ids = _ids(config, step)
    for name in config.publish.report_to:
        tracker = _made(name, config, ids, step)
        try:
            tracker.start()
        except (OSError, RuntimeError, ValueError, *_further_errors(name)) as error:
            said = " ".join(str(error).split())
            offline = ", set WANDB_MODE=offline," if name == "wandb" else ""
            raise UserError(f"report_to: {name} does not start ({said}): mend that{offline} or leave it out") from error
        started.append(tracker)
        if step == 0 or name == "trackio":  # which forgets the options of a run that goes on
            tracker.store_init_configuration(_plain(config))
    return Trackers(started, step)


def _made(name: str, config: Config, ids: Mapping[str, str], step: int) -> Any:  # Any: classes of many libraries
    """Returns a tracker that has not started yet."""
    if name == "custom-tracker":
        path, project = config.publish.custom_tracker, config.publish.tracker_project_name
        assert path is not None  # reading the config has seen to it
        return custom_tracker(path, project, config.run.output_dir / name)
    return LOGGER_TYPE_TO_CLASS[name](**_arguments(name, config, ids, step))


def _check_package(name: str) -> None:
    if name != "custom-tracker" and find_spec(name) is None:
        package = _PACKAGES.get(name, f'"simpletuner[{name}]"')
        raise UserError(f"report_to: '{name}' needs its package: pip install {package}")


def _check_wandb() -> None:
    """Raises UserError where wandb would ask for a login, now or at a prompt that nobody reads."""
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise UserError(
            "report_to: nobody is logged in at wandb: run `wandb login`, or set WANDB_MODE=offline to keep the run on "
            "this machine"
        )


def _further_errors(name: str) -> tuple[type[Exception], ...]:
    """Returns what a tracker may raise beside the usual: of the user's own, anything."""
    if name == "custom-tracker":
        return FAILURES
    if name != "wandb":
        return ()
    import wandb

    return (wandb.Error,)


def _arguments(name: str, config: Config, ids: Mapping[str, str], step: int) -> dict[str, Any]:
    """Returns the arguments of a tracker's class in accelerate."""
    folder = config.run.output_dir
    project, title = config.publish.tracker_project_name, config.publish.tracker_run_name
    match name:
        case "wandb":
            import wandb

            # What is printed, the command line and the user's git repository are not its business.
            quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True)
            folder.mkdir(parents=True, exist_ok=True)
            run = {"id": ids[name], "resume": "allow", "dir": str(folder), "settings": quiet}
            return {"run_name": project, "name": title, **run}
        case "tensorboard":
            # What a killed run logged after its last checkpoint is hidden: it comes again.
            purge = step + 1 if step else 0
            return {"run_name": _file_name(title or project), "logging_dir": folder / _FOLDER, "purge_step": purge}
        case "trackio":
            run = {"name": title or f"run-{ids[name]}", "resume": "allow" if step else "never", "embed": False}
            return {"run_name": project, **run}
        case "swanlab":
            run = {"id": ids[name], "resume": "allow", "logdir": str(folder / name)}
            return {"run_name": project, "experiment_name": title, **run}
        case "mlflow":
            return {"experiment_name": project, "run_name": title}
        case _:
            return {"run_name": project}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "run"


def _ids(config: Config, step: int) -> dict[str, str]:
    """Returns tracker -> id of this run there: the one it began with, where it goes on."""
    path = config.run.output_dir / IDS
    kept: dict[str, str] = json.loads(path.read_text(encoding="utf8")) if step and path.is_file() else {}
    ids = {name: kept.get(name, uuid.uuid4().hex[:8]) for name in ("wandb", "swanlab", "trackio")}
    if ids.keys() & set(config.publish.report_to):
        with files_into(path.parent) as made:
            (made / IDS).write_text(json.dumps(ids), encoding="utf8")
    return ids


def _plain(config: Config) -> dict[str, str | int | float | bool]:
    """Returns the options that are set, as values of the kinds that every tracker takes."""
    published = config.published().items()
    set_ones = {key: value for key, value in published if value not in (None, "", [], {})}
    return {key: v if isinstance(v, str | int | float) else json.dumps(v) for key, v in set_ones.items()}
