"""How an option is declared: its default, bounds, description and what resuming with another value means."""

import json
import re
import types
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Resume = Literal["must_match", "may_change", "free"]
"""must_match: resuming is refused; may_change: it goes on with a notice; free: nothing is said."""

Json = JsonValue
"""A value of a JSON or TOML file."""


class Section(BaseModel):
    """A frozen group of options that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, str_strip_whitespace=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Json, info: ValidationInfo) -> Json:
        """Reads text that stands for another type, as the command line and many files have it."""
        field = cls.model_fields.get(info.field_name or "")
        return as_written(value, field.annotation) if field else value


def as_written(value: Json, annotation: Any) -> Json:  # Any: an annotation has no narrower type
    """Returns a value as the type that it spells; what spells nothing stays, for pydantic to refuse.

    ``"1e3"`` spells a number, ``"a,b"`` and ``"[1, 2]"`` a list, ``"k=v,k=v"`` and ``"{...}"`` an object.
    """
    kinds = _kinds(annotation)
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        raise PydanticCustomError("int_type" if int in kinds else "float_type", "a switch is not a number")
    if tuple in kinds and isinstance(value, (int, float)):
        return [value]
    if not isinstance(value, str) or str in kinds:
        return value
    text = value.strip()
    if int in kinds:
        return _whole(text)
    if {dict, tuple} & kinds:
        if text[:1] in ("[", "{"):
            return as_json(text)
        parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
        if tuple in kinds:
            return [] if text.lower() == "none" else list[Json](parts)
        if all("=" in part for part in parts):
            return {key.strip(): as_json(item.strip()) for key, _, item in (part.partition("=") for part in parts)}
    return text


def _kinds(annotation: Any) -> set[Any]:
    """Returns the plain types of an annotation: {int, NoneType} for ``int | None``."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return {kind for argument in get_args(annotation) for kind in _kinds(argument)}
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    return {origin or annotation}


def _whole(text: str) -> Json:
    """Returns the whole number in ``"100"`` or ``"1e4"``, or the text."""
    try:
        value = float(text)
    except ValueError:
        return text
    return int(text) if text.lstrip("+-").isdigit() else int(value) if value.is_integer() else value


def as_json(text: Json) -> Json:
    """Returns the JSON value that a text spells; anything else as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads({"True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text


def setting(  # noqa: D417  (bounds are pydantic's own names)
    default: Any,  # Any: the annotation beside the call says the type, and pydantic checks it
    resume: Resume,
    description: str,
    *,
    inert: str | None = None,
    **bounds: Any,  # Any: ge, gt, le, lt, min_length, max_length as pydantic takes them
) -> Any:  # Any: a field specifier stands where a value of the annotated type is expected
    """Returns the pydantic field of one option.

    Args:
        default: The value when the key is absent; ``...`` makes the option required.
        resume: What resuming with another value means.
        description: For OPTIONS.md: what it does, its unit, what the default amounts to.
        inert: Why the option is accepted but has no effect, and what to do; None when it works.
    """
    extra: dict[str, Any] = {"resume": resume}
    if inert is not None:
        extra["inert"] = inert
    return Field(default, description=description, json_schema_extra=extra, validate_default=False, **bounds)


def rule_of(section: type[Section], key: str, name: Literal["resume", "inert"]) -> str | None:
    """Returns what ``setting`` was given as ``resume`` or ``inert`` for a field."""
    extra = section.model_fields[key].json_schema_extra
    rules = cast(dict[str, str], extra) if isinstance(extra, dict) else {}  # setting() alone writes it
    return rules.get(name)
