"""Tidies what was written before it is checked: keys, comments, empty values, placeholders; and words the errors."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simpletuner.config.errors import suggestion
from simpletuner.config.fields import Json, Section
from simpletuner.config.files import is_comment
from simpletuner.config.findings import Findings

S = TypeVar("S", bound=Section)


def tidy(values: Mapping[str, Json]) -> dict[str, Json]:
    """Returns the values by bare key: no leading dashes, no comments, and no ``null`` or "", which mean the default."""
    return {
        bare_key(key): value
        for key, value in values.items()
        if not is_comment(key) and value is not None and value != ""
    }


def bare_key(key: str) -> str:
    """Returns ``train_batch_size`` for ``--train-batch-size``."""
    return key.strip().lstrip("-").replace("-", "_")


def fill(value: Json, names: Callable[[str], str | None], where: str, findings: Findings) -> Json:
    """Returns a value with every ``{name}`` in its strings replaced.

    Args:
        value: Any JSON value; lists and objects are walked.
        names: Gives the text for a name, or None where the braces are no placeholder.
        where: The key to name in a problem.
        findings: Takes a problem for an environment variable that is not set.
    """
    if isinstance(value, list):
        return [fill(item, names, where, findings) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, names, where, findings) for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        text = names(match[1])
        if text is None and match[1].startswith("env:"):
            findings.problems.append(f"{where}: the environment variable {match[1][4:]} is not set")
        return match[0] if text is None else text

    return re.sub(r"\{([A-Za-z_][\w:]*)\}", replace, value)


def number(value: Json) -> float | None:
    """Returns the number that a value is or spells, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def switch_off(values: dict[str, Json], keys: Iterable[str]) -> None:
    """Reads 0 and -1 as "no limit" for the keys, in place: files that set one of two limits set the other to 0."""
    for key in keys:
        if number(values.get(key)) in (0, -1):
            values[key] = None


def build(section: type[S], values: dict[str, Json], prefix: str, findings: Findings) -> S:
    """Returns the section made of the values; a wrong one becomes a problem, and its default stands in.

    The stand-ins let reading go on, so that all mistakes are told at once.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
    findings.problems.extend(dict.fromkeys(f"{prefix}{describe(section, detail)}" for detail in details))
    wrong = {str(detail["loc"][0]) for detail in details}
    kept = {key: value for key, value in values.items() if key not in wrong}
    missing = {key: kept.get(key, "?") for key, field in section.model_fields.items() if field.is_required()}
    return section.model_validate(kept | missing)


def build_known(
    section: type[S], written: Mapping[str, Json], prefix: str, findings: Findings, besides: Iterable[str] = ()
) -> S:
    """Returns the section made of the values that it knows; others are problems, unless they are read elsewhere."""
    own = section.model_fields
    known = (*besides, *own)
    unknown = (key for key in written if key not in known)
    findings.problems.extend(f"{prefix}{key}: unknown key{suggestion(key, known)}" for key in unknown)
    return build(section, {key: value for key, value in written.items() if key in own}, prefix, findings)


def describe(section: type[Section], error: ErrorDetails) -> str:
    """Returns one line for a pydantic error: the key, the value, what is allowed."""
    key = str(error["loc"][0])
    context: dict[str, Any] = error.get("ctx", {})  # Any: pydantic's own type
    shown = json.dumps(error["input"], default=str)
    field = section.model_fields.get(key)
    description = (field.description or "") if field else ""
    if len(error["loc"]) > 2:  # a union within an object: one error for each kind of value that it could have been
        return f"{key}.{error['loc'][1]}: {shown} is not text, a number, a switch or a list of numbers. {description}"
    match error["type"]:
        case "missing":
            return f"{key}: required. {description}"
        case "literal_error":
            allowed = [str(word) for word in _choices(field.annotation if field else None)]
            return f"{key}: unknown value {shown}{suggestion(str(error['input']), allowed)} ({', '.join(allowed)})"
        case "greater_than_equal":
            return f"{key}: {shown} is too small; at least {context['ge']}. {description}"
        case "greater_than":
            return f"{key}: {shown} is too small; it must be above {context['gt']}. {description}"
        case "less_than_equal":
            return f"{key}: {shown} is too large; at most {context['le']}. {description}"
        case "less_than":
            return f"{key}: {shown} is too large; it must be below {context['lt']}. {description}"
        case "multiple_of":
            return f"{key}: {shown} is not a multiple of {context['multiple_of']}. {description}"
        case "value_error":
            return f"{key}: {context['error']}"
        case _:
            return f"{key}: {shown} is {_wrong_kind(error['type'])}. {description}"


def _wrong_kind(kind: str) -> str:
    """Returns "not a number" and the like for the type of a pydantic error."""
    words = {"int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false"}
    words |= {"string": "text", "path": "a path", "dict": "an object", "tuple": "a list"}
    return f"not {words.get(kind.partition('_')[0], 'valid here (' + kind + ')')}"


def _choices(annotation: Any) -> tuple[Any, ...]:  # Any: an annotation has no narrower type
    """Returns the values of the Literal in an annotation such as ``Literal["a", "b"] | None``."""
    arguments = get_args(annotation)
    if arguments and all(isinstance(argument, (str, int)) for argument in arguments):
        return arguments
    return tuple(choice for argument in arguments for choice in _choices(argument))
