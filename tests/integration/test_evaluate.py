"""What a run has written, drawn by stock diffusers and judged beside the model that it started from."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.evaluation import evaluate as module
from simpletuner.evaluation.drawing import draw_scenes
from simpletuner.evaluation.evaluate import evaluate
from simpletuner.evaluation.finished import finished_run
from simpletuner.evaluation.pipelines import base_pipeline
from simpletuner.evaluation.samplers import student_samplers, teacher_sampler
from simpletuner.planning import look_ahead
from simpletuner.quickstart.drawing import draw
from simpletuner.quickstart.scenes import make_prompt
from simpletuner.run import train_with_seeds
from tests.conftest import base_of
from tests.integration.conftest import Project


def silent(done: int, total: int, what: str) -> None:
    """Says nothing."""


@pytest.fixture
def scenes(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Returns a project on drawn scenes, evaluated with few pictures."""
    monkeypatch.setattr(module, "_NUM_REAL", 8)
    monkeypatch.setattr(module, "undistilled_samplers", lambda config: _two_each(config))
    project.use_pictures(draw(tmp_path / "scenes", 10), tmp_path / "cache")
    return project


def _two_each(config: dict[str, object]) -> list[module.Sampler]:
    from simpletuner.evaluation.samplers import undistilled_samplers

    return undistilled_samplers(config)[::3]


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_a_finished_run_is_judged_at_its_end(scenes: Project, capsys: pytest.CaptureFixture[str], model_type: str):
    scenes.train(evaluation_prompts=6, model_type=model_type)
    said = capsys.readouterr().out
    folder = scenes.output / "evaluation"
    found = json.loads((folder / "evaluation.json").read_text())
    assert [row["label"] for row in found["student"]] == [
        *("student, 1 step", "student, 2 steps", "student, 4 steps", "student, 8 steps"),
    ]
    assert "student, 4 steps" in said
    assert str(folder / "contact_sheet.png") in said
    assert found["real"]["accuracy"] == 1.0
    assert "## How good it is\n\n| | all right | 95 % |" in (scenes.output / "README.md").read_text()
    assert found["teacher"]["accuracy"] == 0.0  # an untrained model draws noise
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 96


def test_the_student_is_drawn_with_its_own_weights_and_the_teacher_without(scenes: Project):
    scenes.train(learning_rate=0.1)
    plan = look_ahead(load(scenes.write()))
    prompts = [make_prompt(0, index) for index in range(3)]
    run = finished_run(scenes.output)
    sampler = student_samplers(run.scheduler_config, run.sampling, steps=[2])[0]
    base, result = base_pipeline(*base_of(plan)), run.pipeline()
    first, again, other = (
        draw_scenes(pipeline, sampler, prompts, silent) for pipeline in (base, base_pipeline(*base_of(plan)), result)
    )
    assert [picture.size for picture in first] == [(scene.width, scene.height) for scene in prompts]
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))


def test_noise_is_the_same_whatever_is_drawn_beside_it(scenes: Project):
    plan = look_ahead(load(scenes.write()))
    assert plan.facts.scheduler_config is not None
    sampler = teacher_sampler(plan.facts.scheduler_config)
    pipeline, prompts = (
        base_pipeline(*base_of(plan)),
        [make_prompt(0, index) for index in range(6)],
    )
    alone = draw_scenes(pipeline, sampler, prompts[:1], silent)[0]
    among = draw_scenes(pipeline, sampler, prompts, silent)[0]
    difference = torch.frombuffer(bytearray(alone.tobytes()), dtype=torch.uint8).int()
    difference = difference - torch.frombuffer(bytearray(among.tobytes()), dtype=torch.uint8).int()
    assert difference.abs().max() <= 1  # batches of another size round in another way


def test_undistilled_rows_are_measured_once_and_those_of_another_model_are_not_used(
    scenes: Project, monkeypatch: pytest.MonkeyPatch
):
    scenes.train()
    plan = look_ahead(load(scenes.write()))
    evaluate(plan, [scenes.output], 4, silent)
    drawn: list[str] = []

    def counting(pipeline: object, sampler: module.Sampler, prompts: list[object], progress: object) -> object:
        drawn.append(sampler.label)
        return draw_scenes(pipeline, sampler, prompts, silent)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "draw_scenes", counting)
    evaluate(plan, [scenes.output], 4, silent)
    num_when_known = len(drawn)
    path = scenes.output / "evaluation" / module.UNDISTILLED
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "another"}))
    drawn.clear()
    evaluate(plan, [scenes.output], 4, silent)
    assert num_when_known == 4 + 2  # the student's, and the teacher's columns on the sheet
    assert len(drawn) == num_when_known + 1 + 8


def test_seeds_make_different_students_of_one_config(scenes: Project):
    config = load(scenes.write(max_train_steps=1))
    folders = train_with_seeds(config, [1, 2])
    report = evaluate(look_ahead(config), folders, 4, silent)
    assert report.student[0].right.shape == (2, 4)
    first, second = ((folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in folders)
    assert first != second


def test_what_cannot_be_judged_is_said(project: Project, scenes: Project, tmp_path: Path, pictures: Path):
    plan = look_ahead(load(scenes.write()))
    with pytest.raises(UserError, match="holds no finished run"):
        evaluate(plan, [scenes.output], 4, silent)
    project.use_pictures(pictures, tmp_path / "cache")
    with pytest.raises(UserError, match="no dataset has drawn scenes"):
        evaluate(look_ahead(load(project.write())), [project.output], 4, silent)


def test_a_run_that_could_not_be_judged_is_told_so_before_it_trains(project: Project):
    with pytest.raises(UserError, match="in a config of your own leave evaluation_prompts out"):
        project.train(evaluation_prompts=4)
    assert not (project.output / "metrics.jsonl").exists()
