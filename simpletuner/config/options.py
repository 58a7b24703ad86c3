"""Renders documentation/OPTIONS.md from the schema: ``python -m simpletuner.config.options``."""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo

from simpletuner.config.deprecated import ALIASES
from simpletuner.config.environment import VARIABLES
from simpletuner.config.fields import Section, rule_of
from simpletuner.config.schema import SECTIONS

PATH = Path(__file__).parents[2] / "documentation" / "OPTIONS.md"

_HEAD = """# Options of config.json

This page is generated from the schema; `python -m simpletuner.config.options` writes it again.
The datasets have a file of their own: see [DATALOADER.md](DATALOADER.md).

A config is one flat JSON object (or a TOML file). Keys may have leading dashes, and `_comment` keys are left alone.
`null` and `""` mean the default, and numbers and switches may be in quotes. `{env:NAME}` in a value is replaced by
the environment variable NAME. On the command line `--key value` goes before the file, and
`--distillation_config.w_max 8` reaches into an object.

Relative paths of files that are read are looked for in the working directory, then beside the config; what is written
goes below the working directory.

Resuming: _fixed_ - a resumed run must have the same value; _told_ - it may change, and the log says so; _free_ - it
may change.
"""

_RESUME = {"must_match": "fixed", "may_change": "told", "free": "free"}
_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (Ge, "ge", "at least {}"),
    (Gt, "gt", "above {}"),
    (Le, "le", "at most {}"),
    (Lt, "lt", "below {}"),
    (MultipleOf, "multiple_of", "a multiple of {}"),
)
_KINDS = {str: "text", Path: "path", int: "whole number", float: "number", bool: "true or false", dict: "object"}


def render() -> str:
    """Returns the text of OPTIONS.md."""
    lines = [_HEAD]
    for name, section in SECTIONS.items():
        lines += [f"## {name}", "", (section.__doc__ or "").strip(), ""]
        lines += ["| Option | Value | Default | Resuming | Meaning |", "|---|---|---|---|---|"]
        lines += [_row(section, key, field) for key, field in section.model_fields.items()]
        lines.append("")
    lines += ["## Other names", "", "| Written | Read as |", "|---|---|"]
    lines += [f"| `{alias}` | `{key}` |" for alias, key in sorted(ALIASES.items())]
    lines += [
        f"| environment variable `{name}` | `{key}`, where the config does not give it |"
        for name, key in VARIABLES.items()
    ]
    return "\n".join(lines) + "\n"


def _row(section: type[Section], key: str, field: FieldInfo) -> str:
    inert = rule_of(section, key, "inert")
    meaning = (field.description or "") + (f" **No effect yet:** {inert}." if inert else "")
    resume = _RESUME[rule_of(section, key, "resume") or "free"]
    return f"| `{key}` | {_value(field)} | {_default(field)} | {resume} | {meaning.replace('|', ',')} |"


def _value(field: FieldInfo) -> str:
    """Returns the kind of value and its bounds."""
    bounds = [
        text.format(f"{getattr(rule, attribute):.0f}" if getattr(rule, attribute) >= 1 else getattr(rule, attribute))
        for kind, attribute, text in _BOUNDS
        for rule in field.metadata
        if isinstance(rule, kind) and getattr(rule, attribute) < 2**62
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:  # Any: an annotation has no narrower type
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return ", ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    return _KINDS[origin or annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "_required_"
    default: object = field.default
    if default is None or default in ("", (), {}):
        return "-"
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{_number(default)}`"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render(), encoding="utf8")
