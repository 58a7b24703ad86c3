"""Datasets that are shown for a part of the run."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from simpletuner.config.load import load
from simpletuner.plan_view import plan_text
from simpletuner.planning import look_ahead
from tests.integration.conftest import Project


def staged(project: Project, second: Path, **settings: object) -> Project:
    """Returns the project with its pictures in the first two steps, and others from the third on."""
    project.datasets[0] |= {"end_step": 2}
    later = {"id": "later", "instance_data_dir": str(second), "start_step": 2, "start_epoch": 1}
    project.datasets.append(later)
    project.write(gradient_accumulation_steps=2, checkpoint_step_interval=1, checkpoints_total_limit=0, **settings)
    return project


def test_a_run_of_two_stages_is_the_same_cut_in_two(project: Project, uneven: Path, tmp_path: Path):
    staged(project, uneven).train(max_train_steps=4)
    other = project.at(tmp_path / "cut")
    other.train(max_train_steps=3)
    other.train(max_train_steps=4)
    assert project.rows() == other.rows()
    mine, its = (load_file(one.output / "pytorch_lora_weights.safetensors") for one in (project, other))
    assert all(torch.equal(values, its[key]) for key, values in mine.items())


def test_the_plan_says_when(project: Project, uneven: Path):
    plan = look_ahead(load(staged(project, uneven).write(max_train_steps=4)))
    lines = [line.strip() for line in plan_text(plan).splitlines()]
    assert "shown from step 0 on until step 2" in lines
    assert "shown from step 2 on" in lines
