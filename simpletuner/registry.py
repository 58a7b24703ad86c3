"""Finds plug-ins: one file under a kind's folder is one plug-in, and its file name is the value in the config.

A file that serves several names, or names that are no identifiers (``optimi-lion``), declares a literal
``NAMES = ("optimi-lion", ...)``. Other packages add plug-ins through the entry point group ``simpletuner.<kind>``.
Each plug-in module binds its class or function to ``PLUGIN``; what that must offer stands in the kind's ``_base.py``.
"""

import ast
import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from simpletuner.config.errors import UserError, suggestion

KINDS = ("families", "distillers", "backends", "optimizers")


def names(kind: str) -> list[str]:
    """Returns the config values of all plug-ins of a kind, sorted; no plug-in is imported."""
    return sorted({*_files(kind), *_entry_points(kind)})


def load(kind: str, name: str, key: str | None = None) -> Any:  # Any: what PLUGIN is differs by kind (_base.py)
    """Returns the plug-in object of a name.

    Args:
        kind: One of KINDS.
        name: The value in the config.
        key: The config key to name in the error, such as ``model_family``.

    Raises:
        UserError: There is no such plug-in, or a package that it needs is not installed.
    """
    if name not in names(kind):
        raise UserError(
            f"{key or kind}: unknown value '{name}'{suggestion(name, names(kind))} (known: {', '.join(names(kind))})"
        )
    try:
        if name in _files(kind):
            return importlib.import_module(_files(kind)[name]).PLUGIN
        return _entry_points(kind)[name].load()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "simpletuner"):
            raise
        extra = _EXTRAS.get(package)
        what = f'"simpletuner[{extra}]"' if extra else package
        if isinstance(error, ModuleNotFoundError):
            raise UserError(f"{key or kind}: '{name}' needs the package '{package}': pip install {what}") from error
        raise UserError(
            f"{key or kind}: '{name}' does not work with the installed '{package}' ({error}): pip install -U {what}"
        ) from error


# Import name of an optional package -> the extra of this package (pyproject.toml) that brings it.
_EXTRAS = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "xformers": "xformers",
    "datasets": "datasets",
    "s3fs": "aws",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "prodigyopt": "prodigy",
    "schedulefree": "schedulefree",
}


@cache
def _files(kind: str) -> dict[str, str]:
    """Returns config value -> module, from the files of this package, which are read and not imported."""
    if kind not in KINDS:
        raise ValueError(f"no such kind of plug-in: {kind}")
    found: dict[str, str] = {}
    for path in sorted((Path(__file__).parent / kind).glob("[!_]*.py")):
        for name in _declared_names(path) or (path.stem,):
            module = f"simpletuner.{kind}.{path.stem}"
            if name in found:
                raise ValueError(f"'{name}' is declared by {found[name]} and by {module}")
            found[name] = module
    return found


def _declared_names(path: Path) -> tuple[str, ...]:
    """Returns the literal ``NAMES`` tuple of a plug-in file, or an empty tuple."""
    for node in ast.parse(path.read_text(encoding="utf8")).body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="NAMES")], value=value)
                | ast.AnnAssign(target=ast.Name(id="NAMES"), value=ast.expr() as value)
            ):
                return tuple(ast.literal_eval(value))
            case _:
                pass
    return ()


@cache
def _entry_points(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"simpletuner.{kind}")}
