"""What all entries of the data backend file share: placeholders, types, unknown keys."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config import deprecated
from simpletuner.config.errors import suggestion
from simpletuner.config.fields import Json
from simpletuner.config.files import Places
from simpletuner.config.findings import Findings
from simpletuner.config.sections import DataSection, RunSection
from simpletuner.config.values import fill, tidy

_TEXT_VALUES = (
    "id",
    "type",
    "dataset_type",
    "instance_data_dir",
    "cache_dir",
    "cache_dir_vae",
    "text_embeds",
    "image_embeds",
    "resolution_type",
)
DATASET_TYPES = ("image", "eval", "text_embeds", "image_embeds")


@dataclass(frozen=True)
class Context:
    """What the datasets inherit and where their paths are looked for."""

    data: DataSection
    run: RunSection
    model_family: str
    places: Places
    environ: Mapping[str, str]
    explicit: frozenset[str]
    label: str
    """The file, as the user named it, for messages."""

    @property
    def cache_dir(self) -> Path:
        """The folder of all caches."""
        return self.run.cache_dir or self.run.output_dir / "cache"


def tidied(entry: dict[str, Json], index: int, context: Context, findings: Findings) -> dict[str, Json] | None:
    """Returns an enabled entry of a known type with its placeholders filled, or None."""
    values = tidy(entry)
    where = f"{context.label}: entry {index + 1}"
    if switch(values, "disabled", where, findings):
        return None
    for key in _TEXT_VALUES:
        if isinstance(values.get(key), (bool, list, dict)):
            findings.problems.append(f"{where}: {key}: {json.dumps(values.pop(key))} is not text")
    if "id" not in values:
        findings.problems.append(f"{where}: id: required. A name for the dataset")
        values["id"] = f"entry {index + 1}"
    where = f"{context.label}: dataset '{values['id']}'"
    names = {"model_family": context.model_family, "output_dir": str(context.run.output_dir), "id": str(values["id"])}
    names |= {f"env:{name}": value for name, value in context.environ.items()}
    values["default"] = switch(values, "default", where, findings)
    values = {key: fill(value, names.get, f"{where}: {key}", findings) for key, value in values.items()}
    kind = str(values.get("dataset_type", "image"))
    if kind not in DATASET_TYPES:
        reason = deprecated.DATASET_TYPES.get(kind)
        findings.problems.append(
            f"{where}: dataset_type: {reason}"
            if reason
            else f"{where}: dataset_type: unknown value '{kind}'{suggestion(kind, DATASET_TYPES)} "
            f"({', '.join(DATASET_TYPES)})"
        )
        return None
    return values


def switch(values: dict[str, Json], key: str, where: str, findings: Findings) -> bool:
    """Takes a switch out of an entry and returns whether it is on."""
    value = values.pop(key, False)
    word = str(value).strip().lower()
    if word not in ("true", "false", "1", "0", "yes", "no"):
        findings.problems.append(f"{where}: {key}: {json.dumps(value)} is not true or false")
    return word in ("true", "1", "yes")


def refuse_unknown(entry: dict[str, Json], known: frozenset[str], where: str, findings: Findings) -> None:
    """Takes the keys that are not known out of an entry: each is a problem, or a notice by the written table."""
    for key in [key for key in entry if key not in known]:
        value = entry.pop(key)
        if not deprecated.judge(key, value, deprecated.DATASET_KEYS, f"{where}: ", findings):
            findings.problems.append(f"{where}: {key}: unknown key{suggestion(key, known)}")
