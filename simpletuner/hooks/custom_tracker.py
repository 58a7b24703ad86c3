"""A tracker of the user's own: a Python file with one class after accelerate's ``GeneralTracker``."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate.tracking import GeneralTracker

from simpletuner.config.errors import UserError

FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError),
)
"""What code of the user's may raise."""


def tracker_class(path: Path) -> type[GeneralTracker]:
    """Returns the class of a file, which is run for that.

    Raises:
        UserError: The file fails, or has not one such class of its own.
    """
    module = _run(path)
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, GeneralTracker) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        found = ", ".join(sorted(each.__name__ for each in classes)) or "none"
        raise UserError(f"custom_tracker: '{path}' needs one subclass of accelerate's GeneralTracker, has {found}")
    return classes[0]


def custom_tracker(path: Path, project: str, folder: Path) -> GeneralTracker:
    """Returns the tracker of a file.

    Args:
        path: The file.
        project: Given as ``run_name``, if the class takes it.
        folder: Given as ``logging_dir``, if the class takes it; made first.

    Raises:
        UserError: The file fails, has not one class, or its class cannot be made with these.
    """
    kind: Any = tracker_class(path)  # Any: a class of the user's takes what it likes
    taken = inspect.signature(kind).parameters
    given: dict[str, Any] = {"run_name": project, "logging_dir": folder}
    arguments = {name: value for name, value in given.items() if name in taken}
    if "logging_dir" in arguments:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return kind(**arguments)
    except FAILURES as error:
        raise UserError(f"custom_tracker: '{path}': {kind.__name__} cannot be made: {_said(error)}") from error


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"custom_tracker_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:
        raise UserError(f"custom_tracker: '{path}' fails: {_said(error)}") from error
    return module


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
