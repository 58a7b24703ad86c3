"""How an option is declared: its default, bounds, description and what resuming with another value means."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Resume = Literal["must_match", "may_change", "free"]
"""must_match: resuming is refused; may_change: it goes on with a notice; free: nothing is said."""

Json = JsonValue
"""A value of a JSON or TOML file."""


class Section(BaseModel):
    """A frozen group of options that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, str_strip_whitespace=True
    )


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
