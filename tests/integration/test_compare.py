"""`simpletuner evaluate` on any pictures: student and teacher from the same noise."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from typer.testing import CliRunner

from simpletuner.cli import app
from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.evaluation.asking import Wanted, judge_config, judge_run
from simpletuner.prompt_library import built_in_prompts
from tests.integration.conftest import Project
from tests.tiny import tiny_clip

FEW = {"num_prompts": 2, "teacher_steps": 3, "steps": "1,2"}


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_a_run_is_compared_with_its_base_from_the_same_noise(project: Project, tmp_path: Path, model_type: str):
    changes = {"lora_rank": None} if model_type == "full" else {}
    project.train(model_type=model_type, validation_disable=True, learning_rate=1e-9, **changes)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\na boat\n")
    found = judge_run(str(project.output), Wanted(**FEW, prompts_from=prompts))
    assert [line.label for line in found.lines] == ["teacher, 3 steps", "student, 1 step", "student, 2 steps"]
    assert (found.num_prompts, found.num_seeds) == (2, 2)
    teacher, *students = found.lines
    assert teacher.guidance_scale == 4.0  # the middle of w, and 1
    assert teacher.distance is None
    assert found.other_seed == teacher.diversity
    for line in students:
        assert line.distance is not None
        assert 0 < line.distance < 1.5
        assert line.psnr_db is not None
        assert 3 < line.psnr_db < 60
    folder = project.output / "evaluation"
    document = json.loads((folder / "comparison.json").read_text())
    assert [line["label"] for line in document["lines"]] == [line.label for line in found.lines]
    assert len(list(folder.glob("comparison/*/*.png"))) == 3 * 2 * 2
    with Image.open(folder / "comparison.png") as sheet:
        assert sheet.width > 3 * 64
    table = (folder / "comparison.md").read_text()
    assert "| student, 2 steps | 2 |" in table
    assert "CLIP" not in table


def test_the_teacher_draws_without_what_was_learned_and_the_student_with_it(project: Project):
    project.train(validation_disable=True, learning_rate=0.3, max_train_steps=4)
    folder = project.output / "evaluation"
    judge_run(str(project.output), Wanted(**FEW))
    before = [path.read_bytes() for path in sorted(folder.glob("comparison/*/*.png"))]
    judge_run(str(project.output), Wanted(**FEW))
    assert [path.read_bytes() for path in sorted(folder.glob("comparison/*/*.png"))] == before
    (project.output / "pytorch_lora_weights.safetensors").unlink()
    project.train(validation_disable=True, learning_rate=0.3, max_train_steps=2, resume_from_checkpoint="none")
    judge_run(str(project.output), Wanted(**FEW))
    after = [path.read_bytes() for path in sorted(folder.glob("comparison/*/*.png"))]
    assert before[:4] == after[:4]
    assert all(one != two for one, two in zip(before[4:], after[4:], strict=True))


def test_a_config_of_other_pictures_is_compared_on_its_own_prompts(project: Project):
    project.train(validation_prompt="a red picture", validation_step_interval=0, disable_benchmark=True)
    found = judge_config(load(project.write()), full=False, wanted=Wanted(128, num_seeds=1, teacher_steps=2))
    assert found.num_prompts == 1
    labels = [line.label for line in found.lines]
    assert labels == ["teacher, 2 steps", *(f"student, {n} step{'s' * (n > 1)}" for n in (1, 2, 4, 8))]
    # One seed alone says nothing of diversity.
    assert found.other_seed is None
    with pytest.raises(UserError, match="--full: it judges the quickstart's scenes alone"):
        judge_config(load(project.write()), full=True, wanted=Wanted(128))


def test_a_clip_model_judges_too(project: Project, tmp_path: Path):
    project.train(validation_disable=True)
    found = judge_run(str(project.output), Wanted(**FEW, clip=str(tiny_clip(tmp_path / "clip"))))
    teacher, *students = found.lines
    assert teacher.clip is not None
    assert teacher.cmmd is None
    for line in students:
        assert line.clip is not None
        assert 0 <= line.clip <= 100
        assert line.cmmd is not None
        assert line.cmmd > 0
    table = (project.output / "evaluation" / "comparison.md").read_text()
    assert "| CLIP | CMMD |" in table


def test_the_command_and_its_mistakes(project: Project, tmp_path: Path):
    run = CliRunner()
    assert isinstance(run.invoke(app, ["evaluate", "--run", str(tmp_path)]).exception, UserError)
    project.train(validation_disable=True)
    base = ["evaluate", "--run", str(project.output), "--prompts", "2", "--seeds", "1", "--teacher-steps", "2"]
    done = run.invoke(app, [*base, "--steps", "1", "--size", "96x64", "--output", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout[done.stdout.index("{") :])["num_prompts"] == 2
    with Image.open(next((tmp_path / "out" / "comparison" / "1").glob("*.png"))) as picture:
        assert picture.size == (96, 64)
    for options, said in (
        (["--steps", "1,x"], "--steps: '1,x' is no list of whole numbers"),
        (["--steps", "1,60"], "--steps: 60 is above the 50 steps of the grid"),
        (["--size", "70x64"], "--size: '70x64'"),
        (["--clip", str(tmp_path)], "--clip: "),
        (["--prompts-from", str(tmp_path / "none.txt")], "--prompts-from: "),
        (["--full"], "--run: it stands alone; --full goes with a config"),
        (["--max_train_steps", "3"], "--run: it stands alone; --max_train_steps goes with a config"),
    ):
        failed = run.invoke(app, [*base, *options])
        assert isinstance(failed.exception, UserError), options
        assert failed.exception.lines[0].startswith(said), failed.exception.lines


def test_pictures_of_the_sheet_are_those_that_sample_draws(project: Project, tmp_path: Path):
    project.train(validation_disable=True, validation_num_inference_steps=2)
    judge_run(str(project.output), Wanted(**FEW, num_seeds=1, output=tmp_path / "out"))
    first = built_in_prompts()[0]
    done = CliRunner().invoke(
        app, ["sample", str(project.output), "--prompt", first, "--seed", "0", "--output", str(tmp_path / "drawn")]
    )
    assert done.exit_code == 0, done.output
    (drawn,) = (tmp_path / "drawn" / "seed-0").glob("*.png")
    with Image.open(drawn) as one, Image.open(tmp_path / "out" / "comparison" / "3" / "000-0.png") as two:
        assert ImageChops.difference(one, two).getbbox() is None
