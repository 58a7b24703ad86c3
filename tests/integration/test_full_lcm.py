"""A full student: it begins as its teacher, whatever w it is told, and its target is an average of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner import run as way
from simpletuner.config.load import load
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.publishing.export import write_network
from simpletuner.training.build import Run
from simpletuner.training.metrics import Row
from simpletuner.training.state import TrainState
from tests.integration.conftest import Project

FULL: dict[str, Any] = {"model_type": "full", "learning_rate": 1e-3, "distillation_config": {"ema_decay": 0.9}}


class Recorder:
    """A hook that keeps the student's weights after each step, those before the first included."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.weights: list[list[Tensor]] = []

    def on_start(self, state: TrainState) -> None:
        """Keeps the weights that the run begins with."""
        self.on_step(state, None)

    def on_step(self, state: TrainState, row: Row | None) -> None:
        """Keeps the weights."""
        self.weights.append([parameter.detach().clone() for parameter in self.run.module.parameters()])

    def on_end(self, state: TrainState) -> None:
        """Does nothing."""


@pytest.fixture
def trainer(project: Project) -> Any:
    """Returns the trainer of a full LCM run before its first step."""
    return make_trainer(project)


def make_trainer(project: Project, **changes: Any) -> Any:
    config = load(project.write(**FULL, max_train_steps=3, **changes))
    config.run.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = way.make_accelerator()
    plan = way._plan(config, accelerator)
    cache = way._cache(plan, accelerator)
    dataset = way._dataset(plan, cache, accelerator)
    run = way.build(plan, accelerator, dataset)
    prepared = way._Prepared(plan, None, dataset, None, way.Trackers([], 0))
    return way._trainer(prepared, run, TrainState(plan.max_steps))


def test_the_student_begins_as_its_teacher_for_every_guidance(trainer: Any) -> None:
    run = trainer.run
    batch, _ = next(iter(run.dataset.batches(None)))
    t = torch.full((len(batch.mean),), 499)
    teacher = run.distiller.denoisers["teacher"](batch.mean, t, batch.cond, batch.geometry)
    for w in (0.0, 3.0, 7.5, 15.0):
        told = torch.full((len(batch.mean),), w)
        for role in ("student", "target"):
            prediction = run.distiller.denoisers[role](batch.mean, t, batch.cond, batch.geometry, told)
            torch.testing.assert_close(prediction.raw, teacher.raw, rtol=0, atol=0)


def test_a_student_that_is_not_told_its_guidance_is_an_error(trainer: Any) -> None:
    batch, _ = next(iter(trainer.run.dataset.batches(None)))
    t = torch.full((len(batch.mean),), 499)
    with pytest.raises(ValueError, match="call it with w"):
        trainer.run.distiller.denoisers["student"](batch.mean, t, batch.cond, batch.geometry)


def test_a_teacher_that_is_told_w_guides_itself_and_the_student_keeps_its_embedding(
    project: Project, tiny_model: Path, tmp_path: Path
) -> None:
    network = SDXL().load(ModelSource(str(tiny_model)), guidance_embed_dim=32)
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(0))
    write_network(tmp_path / "network", network)
    trainer = make_trainer(project, pretrained_unet_model_name_or_path=str(tmp_path / "network"))
    run = trainer.run
    batch, _ = next(iter(run.dataset.batches(None)))
    t = torch.full((len(batch.mean),), 499)
    raw: dict[float, Tensor] = {}
    for w in (3.0, 7.5):
        told = torch.full((len(batch.mean),), w)
        inputs = batch.mean, t, batch.cond, batch.geometry, told
        raw[w], student, target = (run.distiller.denoisers[r](*inputs).raw for r in ("teacher", "student", "target"))
        assert torch.equal(student, raw[w])
        assert torch.equal(target, raw[w])
        uncond = run.distiller.uncond(batch.cond)
        guided = run.distiller.denoisers["teacher"].guided(*inputs[:3], uncond, batch.geometry, told)
        assert torch.equal(guided.raw, raw[w])
    assert float((raw[3.0] - raw[7.5]).abs().max()) > 1e-3
    sizes: list[int] = []
    run.teacher.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    trainer.hooks = []
    trainer.train()
    assert sizes == [2, 2, 2]
    assert run.module.time_embedding.cond_proj.in_features == 32
    teacher, given = run.teacher.state_dict(), network.state_dict()
    assert all(torch.equal(value, given.pop(name)) for name, value in teacher.items())
    assert not given


def test_the_target_is_the_average_of_the_student_and_the_teacher_stays(trainer: Any) -> None:
    run = trainer.run
    recorder = Recorder(run)
    teacher = [parameter.detach().clone() for parameter in run.teacher.parameters()]
    trainer.hooks = [recorder]
    trainer.train()
    assert len(recorder.weights) == 4
    expected = [weight.double() for weight in recorder.weights[0]]
    for weights in recorder.weights[1:]:
        expected = [0.9 * e + 0.1 * weight.double() for e, weight in zip(expected, weights, strict=True)]
    target = list(run.averages["target"].network.parameters())
    assert not any(parameter.requires_grad for parameter in target)
    for parameter, value in zip(target, expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-5, atol=1e-7)
    moved = [not torch.equal(a, b) for a, b in zip(recorder.weights[0], recorder.weights[-1], strict=True)]
    assert all(moved)
    assert all(torch.equal(a, b) for a, b in zip(teacher, run.teacher.parameters(), strict=True))


def test_the_embedding_of_the_guidance_learns(trainer: Any) -> None:
    projection = trainer.run.module.time_embedding.cond_proj.weight
    assert float(projection.detach().abs().max()) == 0
    trainer.hooks = []
    trainer.train()
    assert float(projection.detach().abs().max()) > 0


def test_the_plan_knows_what_guidance_a_full_student_is_drawn_with(project: Project) -> None:
    def plan(**changes: Any) -> Any:
        config = load(project.write(**FULL, validation_prompt="a picture", **changes))
        return way._plan(config, way.make_accelerator())

    assert plan().validation.guidance_scale == 10.0  # the middle of 3 to 15, and 1
    assert plan().method_config.w_min == 3.0
    notices = plan(validation_guidance=1.0).notices
    assert any(line.startswith("validation_guidance: 1 was never trained") for line in notices)
