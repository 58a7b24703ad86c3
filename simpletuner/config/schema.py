"""The whole config: its sections, the datasets, and the rules that stand with each option.

The file a user writes is flat; ``load.py`` routes each key to the section that has it. Everything is frozen, and a
component receives its own section only. ``documentation/OPTIONS.md`` is generated from these classes.
"""

from functools import cache
from pathlib import Path, PurePath
from typing import Literal

from pydantic import Field

from simpletuner.config.backends import DatasetConfig, TextCacheConfig
from simpletuner.config.fields import Json, Resume, Section, rule_of
from simpletuner.config.sections import (
    DataSection,
    DistillationSection,
    EmaSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    PublishSection,
    RunSection,
)
from simpletuner.config.validation import ValidationSection

__all__ = [
    "SECTIONS",
    "Config",
    "DataSection",
    "DatasetConfig",
    "DistillationSection",
    "EmaSection",
    "LoraSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PublishSection",
    "RunSection",
    "Section",
    "TextCacheConfig",
    "ValidationSection",
    "inert_options",
    "resume_rules",
    "section_of",
]


_SECRET_LENGTH = 4


class Config(Section):
    """Everything that was read: the sections, the datasets, and what reading them understood."""

    model: ModelSection
    run: RunSection = RunSection()
    optimizer: OptimizerSection = OptimizerSection()
    lora: LoraSection = LoraSection()
    objective: ObjectiveSection = ObjectiveSection()
    ema: EmaSection = EmaSection()
    data: DataSection = DataSection()
    validation: ValidationSection = ValidationSection()
    publish: PublishSection = PublishSection()
    distillation: DistillationSection = DistillationSection()
    datasets: tuple[DatasetConfig, ...] = ()
    held_out: tuple[DatasetConfig, ...] = ()
    """Never trained on: the loss is measured on them."""
    text_cache: TextCacheConfig
    explicit: frozenset[str] = frozenset()
    """Flat keys that the user gave, in the file, on the command line or in the environment."""
    notices: tuple[str, ...] = ()
    sources: tuple[Path | None, Path | None] = (None, None)
    """The config file and the data backend file."""
    environment: dict[str, str] = Field({}, exclude=True, repr=False)
    """Value of each environment variable that the files name -> how they name it, ``{env:NAME}``."""

    def flat(self) -> dict[str, Json]:
        """Returns every option by its flat key, as JSON values: what ``simpletuner.json`` and checkpoints keep."""
        values: dict[str, Json] = {}
        for name in SECTIONS:
            section: Section = getattr(self, name)
            values.update(section.model_dump(mode="json"))
        return values

    def hide(self, text: str) -> str:
        """Returns a text with ``{env:NAME}`` in place of what the environment filled in, for others to read.

        Values of less than four characters stay: they are no secrets, and parts of many words.
        """
        for value in sorted(self.environment, key=len, reverse=True):
            text = text.replace(value, self.environment[value]) if len(value) >= _SECRET_LENGTH else text
        return text

    def hide_path(self, path: str) -> str:
        """Returns what ``hide`` does, and of a path of this machine the last name only."""
        hidden = PurePath(self.hide(path))
        return hidden.name if hidden.is_absolute() else self.hide(path)

    def published(self) -> dict[str, Json]:
        """Returns every option as others may read it: no value of the environment, of paths the last name only."""
        return {key: self._published(value) for key, value in self.flat().items()}

    def _published(self, value: Json) -> Json:
        if isinstance(value, dict):
            return {key: self._published(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._published(item) for item in value]
        return self.hide_path(value) if isinstance(value, str) else value

    def default_of(self, key: str) -> Json:
        """Returns the default of a flat key as a JSON value, as ``flat`` has it."""
        section = SECTIONS[section_of()[key]]
        default = section.model_construct().model_dump(mode="json", include={key}, warnings=False)
        return default.get(key)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "run": RunSection,
    "optimizer": OptimizerSection,
    "lora": LoraSection,
    "objective": ObjectiveSection,
    "ema": EmaSection,
    "data": DataSection,
    "validation": ValidationSection,
    "publish": PublishSection,
    "distillation": DistillationSection,
}
"""Name of the attribute of Config -> its section, in the order of OPTIONS.md."""


@cache
def section_of() -> dict[str, str]:
    """Returns flat key -> name of its section; a key belongs to exactly one."""
    return {key: name for name, section in SECTIONS.items() for key in section.model_fields}


def _rule(key: str, name: Literal["resume", "inert"]) -> str | None:
    return rule_of(SECTIONS[section_of()[key]], key, name)


def resume_rules() -> dict[str, Resume]:
    """Returns flat key -> what resuming with another value means."""
    rules: dict[str, Resume] = {}
    for key in section_of():
        rule = _rule(key, "resume")
        assert rule in ("must_match", "may_change", "free"), key
        rules[key] = rule
    return rules


def inert_options() -> dict[str, str]:
    """Returns flat key -> why it has no effect yet, for the options that have none."""
    return {key: reason for key in section_of() if (reason := _rule(key, "inert")) is not None}
