"""The model that comes with the package, and what the quickstart lays out."""

import json
from pathlib import Path

import pytest

import simpletuner.quickstart as quickstart
from simpletuner.config.load import load
from simpletuner.evaluation.drawing import draw_scenes
from simpletuner.evaluation.evaluate import FULL, UNDISTILLED
from simpletuner.evaluation.pipelines import base_pipeline, identity
from simpletuner.evaluation.samplers import teacher_sampler, undistilled_samplers
from simpletuner.evaluation.scores import Row
from simpletuner.planning import look_ahead
from simpletuner.quickstart import FOLDER, TEACHER, prepare
from simpletuner.quickstart.judge import accuracy
from simpletuner.quickstart.scenes import make_prompt
from tests.conftest import base_of

NAMES = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_NUM_PICTURES", 10)
    return tmp_path


def test_the_teacher_is_small_and_knows_its_scores():
    weights = list(TEACHER.rglob("*.safetensors"))
    assert sorted(path.parent.name for path in weights) == sorted(NAMES)
    assert sum(path.stat().st_size for path in weights) <= 12e6
    scores = json.loads((TEACHER / "scores.json").read_text())
    assert scores["samples, train"]["all_right"] >= 0.9
    assert scores["vae"]["all_right"] >= 0.95


def test_the_quickstart_is_laid_out_once_and_another_teacher_gives_way(here: Path):
    config = load(prepare())
    assert Path(config.model.pretrained_model_name_or_path) == here / FOLDER / "teacher"
    scores = here / FOLDER / "teacher" / "scores.json"
    (scores.parent / "mine").touch()
    prepare()
    assert (scores.parent / "mine").exists()
    scores.write_text("{}")
    prepare()
    assert not (scores.parent / "mine").exists()
    assert scores.read_bytes() == (TEACHER / "scores.json").read_bytes()


def test_what_is_said_of_the_undistilled_teacher_is_of_this_teacher(here: Path):
    plan = look_ahead(load(prepare()))
    document = json.loads((TEACHER / UNDISTILLED).read_text())
    assert document["model"] == identity(plan)
    assert plan.facts.scheduler_config is not None
    config = plan.facts.scheduler_config
    labels = [sampler.label for sampler in (teacher_sampler(config), *undistilled_samplers(config))]
    rows = [Row.from_json(row) for row in document["rows"]]
    assert [row.label for row in rows] == labels
    assert all(row.right.shape == (1, FULL) for row in rows)


def test_the_teacher_draws_what_it_is_told(here: Path):
    plan = look_ahead(load(prepare()))
    assert plan.facts.scheduler_config is not None
    scenes = [make_prompt(0, index) for index in range(10)]
    pictures = draw_scenes(
        base_pipeline(*base_of(plan)),
        teacher_sampler(plan.facts.scheduler_config),
        scenes,
        lambda *_: None,
    )
    assert accuracy(pictures, scenes).all_right >= 0.7
    # The judge and the captions belong together: with another caption's picture nothing is right.
    assert accuracy(pictures[5:] + pictures[:5], scenes).all_right == 0.0
