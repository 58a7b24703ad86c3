"""What resuming with a changed config means, key by key."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from simpletuner.config.errors import UserError

Rule = Literal["must_match", "may_change", "free"]
"""must_match: another value is refused; may_change: it is said; free: it is nobody's business."""


def compare(old: Mapping[str, Any], new: Mapping[str, Any], rules: Mapping[str, Rule]) -> tuple[str, ...]:
    """Returns one notice for each key that may change and did, in the order of the new config.

    Args:
        old: Flat config of the checkpoint, as read from JSON.
        new: Flat config of this run; values that JSON knows otherwise (tuples, paths) are compared as JSON.
        rules: The schema's rule of each key; a key that a checkpoint of another version lacks is not compared.

    Raises:
        UserError: Keys that must match do not: one line each, with both values.
    """
    refused: list[str] = []
    notices: list[str] = []
    for key, value in new.items():
        before, now = (json.dumps(v, default=str, sort_keys=True) for v in (old.get(key), value))
        if key not in old or before == now:
            continue
        rule = rules.get(key, "may_change")
        if rule == "must_match":
            refused.append(
                f"{key}: the checkpoint was made with {before}, the config says {now}; "
                "set it back, or choose another output_dir to start anew"
            )
        elif rule == "may_change":
            notices.append(f"{key}: {before} until the checkpoint, {now} from here on")
    if refused:
        raise UserError(*refused)
    return tuple(notices)
