"""What resuming with a changed config says."""

import json
from pathlib import Path

import pytest

from simpletuner.config.errors import UserError
from simpletuner.training.resume_rules import Rule, compare

RULES: dict[str, Rule] = {
    "lora_rank": "must_match",
    "seed": "must_match",
    "learning_rate": "may_change",
    "targets": "must_match",
    "output_dir": "free",
}
CONFIG = {"lora_rank": 64, "seed": 42, "learning_rate": 1e-4, "targets": ("a", "b"), "output_dir": Path("/x")}


def saved(**changes: object) -> dict[str, object]:
    """Returns the config as a checkpoint's JSON gives it back."""
    return json.loads(json.dumps({**CONFIG, **changes}, default=str))


def test_an_unchanged_config_says_nothing() -> None:
    assert compare(saved(), CONFIG, RULES) == ()


def test_what_may_change_is_a_notice_and_what_is_free_is_not() -> None:
    notices = compare(saved(learning_rate=5e-5, output_dir="/y"), CONFIG, RULES)
    assert notices == ("learning_rate: 5e-05 until the checkpoint, 0.0001 from here on",)


def test_all_keys_that_must_match_are_named_at_once_with_both_values() -> None:
    with pytest.raises(UserError) as raised:
        compare(saved(lora_rank=16, seed=None, targets=["a"], learning_rate=1.0), CONFIG, RULES)
    how = "; set it back, or choose another output_dir to start anew"
    assert raised.value.lines == (
        f"lora_rank: the checkpoint was made with 16, the config says 64{how}",
        f"seed: the checkpoint was made with null, the config says 42{how}",
        f'targets: the checkpoint was made with ["a"], the config says ["a", "b"]{how}',
    )


def test_keys_of_another_version() -> None:
    old = saved(gone=1)
    del old["seed"]
    assert compare(old, {**CONFIG, "added": 2}, RULES) == ()
