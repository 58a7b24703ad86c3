"""Options that must reach the step: each changes just what it says."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.planning import look_ahead
from simpletuner.training import metrics
from tests.integration.conftest import Project
from tests.integration.test_lora_round_trip import ATTENTION


def losses(project: Project, folder: Path, **changes: object) -> list[object]:
    other = project.at(folder)
    other.train(**changes)
    return [row["loss"] for row in other.rows()]


def test_a_dropped_caption_leaves_nothing_to_guide(project: Project, tmp_path: Path):
    """Without text cond and uncond are the same, so the teacher's guidance cannot matter; with text it does."""

    def guided(w: float, dropped: float) -> list[object]:
        method = {"lcm": {"w_min": w, "w_max": w}}
        folder = tmp_path / f"{w}-{dropped}"
        return losses(project, folder, distillation_config=method, proportion_empty_prompts=dropped)

    assert guided(1.0, 1.0) == pytest.approx(guided(9.0, 1.0), rel=1e-5)
    assert guided(1.0, 0.0) != pytest.approx(guided(9.0, 0.0), rel=1e-2)


def test_scale_lr_multiplies_by_what_makes_a_step(project: Project):
    project.train(scale_lr=True, gradient_accumulation_steps=3, train_batch_size=2, learning_rate=1e-4)
    assert [row["learning_rate"] for row in project.rows()] == pytest.approx([6e-4, 6e-4])


@pytest.fixture
def _tf32_as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_tf32_as_before")
@pytest.mark.parametrize("allowed", [True, False])
def test_allow_tf32(project: Project, allowed: bool):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not allowed
    project.train(allow_tf32=allowed, max_train_steps=1)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)


def test_max_train_samples(project: Project):
    run = project.build(max_train_samples=2)
    assert [dataset.num_samples for dataset in run.dataset.sampler.datasets] == [2]


def test_some_steps_are_traced_and_the_trace_names_the_operators(project: Project):
    project.train(max_train_steps=5, profile_steps=2)
    (path,) = project.output.glob("trace-*.json.gz")
    assert path.name == "trace-000004.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    optimizer_steps = [event for event in events if str(event.get("name")).startswith("Optimizer.step")]
    assert len(optimizer_steps) == 2


def test_rows_tell_the_arithmetic_and_the_memory(project: Project):
    project.train()
    for row in metrics.read(project.output / metrics.FILE_NAME):
        assert row["tflops_per_second"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert 0.1 < row["peak_memory_gib"] < 24


def test_a_preset_names_the_layers(project: Project):
    plan = look_ahead(load(project.write(peft_lora_target_modules="attention-ff")))
    assert plan.lora is not None
    assert set(plan.lora.settings["target_modules"]) == {*ATTENTION, "ff.net.0.proj", "ff.net.2"}
    with pytest.raises(UserError, match="named atention; presets are attention, attention-ff, all-linear, lcm"):
        look_ahead(load(project.write(peft_lora_target_modules=["atention"])))
