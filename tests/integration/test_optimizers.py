"""Optimizers that want something of the loop: averaged weights where they are looked at, adapters of convolutions."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.training import checkpoint
from tests.integration.conftest import Project

STEPS = 4
SCHEDULE_FREE: dict[str, Any] = {"optimizer": "adamw_schedulefree", "max_train_steps": STEPS}
VALIDATED = {"validation_prompt": "a picture", "validation_step_interval": 2, "disable_benchmark": True}
schedule_free = pytest.mark.skipif(find_spec("schedulefree") is None, reason="an extra")


@schedule_free
def test_pictures_and_checkpoints_of_averaged_weights_disturb_nothing(project: Project, tmp_path: Path):
    quiet, looked_at = project.at(tmp_path / "quiet"), project.at(tmp_path / "looked-at")
    quiet.train(**SCHEDULE_FREE)
    looked_at.train(**SCHEDULE_FREE, **VALIDATED, checkpoint_step_interval=1)
    assert quiet.rows() == looked_at.rows()
    one, two = (checkpoint.load(p.output / f"checkpoint-{STEPS}").tensors for p in (quiet, looked_at))
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())


@schedule_free
def test_a_checkpoint_and_the_result_hold_the_average_and_a_resumed_run_goes_on_from_what_is_trained(
    project: Project, tmp_path: Path
):
    straight, resumed = project.at(tmp_path / "straight"), project.at(tmp_path / "resumed")
    straight.train(**SCHEDULE_FREE)
    resumed.train(**SCHEDULE_FREE | {"max_train_steps": 2})
    resumed.train(**SCHEDULE_FREE)
    ends = [checkpoint.load(p.output / f"checkpoint-{STEPS}").tensors for p in (straight, resumed)]
    for group, tensors in ends[0].items():
        assert all(torch.equal(value, ends[1][group][name]) for name, value in tensors.items())
    file = load_file(straight.output / "pytorch_lora_weights.safetensors")
    averaged = sorted(float(value.norm()) for value in ends[0]["weights"].values())
    assert sorted(float(value.norm()) for value in file.values()) == averaged
    trained = [value for name, value in ends[0]["learners"].items() if name.endswith(".trained")]
    assert len(trained) == len(averaged)
    assert sorted(float(value.norm()) for value in trained) != averaged


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ("muon", 1e-2),
        ("adafactor", 1e-2),
        pytest.param("prodigy", 1.0, marks=pytest.mark.skipif(find_spec("prodigyopt") is None, reason="an extra")),
    ],
)
def test_an_adapter_with_convolutions_learns(project: Project, optimizer: str, rate: float):
    targets = ["to_q", "conv1", "conv_shortcut"]
    project.train(optimizer=optimizer, learning_rate=rate, peft_lora_target_modules=targets, max_train_steps=3)
    assert len({row["loss"] for row in project.rows()}) == 3
    file = load_file(project.output / "pytorch_lora_weights.safetensors")
    moved = {name for name, value in file.items() if "lora_B" in name or ".lora.up" in name if value.abs().max() > 0}
    assert len(moved) == len(file) // 2
