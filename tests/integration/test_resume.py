"""A run that was cut in two is the run that was not, bit for bit; and what a resumed run may change."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.config.errors import UserError
from simpletuner.training import checkpoint, metrics
from simpletuner.training.checkpoint import Loaded
from tests.integration.conftest import Project

STEPS = 6
SFT: dict[str, Any] = {"distillation_method": None, "distillation_config": None}
# Five batches an epoch and two a step: the third step's two batches are of two epochs.
COURSES: dict[str, dict[str, Any]] = {
    "lcm": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "sft": SFT
    | {
        "lora_dropout": 0.3,
        "caption_dropout_probability": 0.3,
        "gradient_checkpointing": True,
        "optimizer": "adamw_bf16",
    },
    "lcm-full": {"model_type": "full", "lr_scheduler": "cosine", "learning_rate": 1e-3},
    "full": SFT
    | {
        "model_type": "full",
        "mixed_precision": "bf16",
        "optimizer": "adamw_bf16",
        "learning_rate": 1e-5,
        "snr_gamma": 5,
    },
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Project]:
    """Returns a place for the runs that were not cut, by course; each is made once."""
    return {}


@pytest.fixture
def uncut(
    straight: dict[str, Project],
    course: str,
    project: Project,
    uneven: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    if course not in straight:
        folder = tmp_path_factory.mktemp("straight")
        project = project.use_pictures(uneven, folder / "cache").at(folder / course)
        project.train(
            **COURSES[course],
            max_train_steps=STEPS,
            gradient_accumulation_steps=2,
            checkpoint_step_interval=1,
            checkpoints_total_limit=0,
        )
        straight[course] = project
    return straight[course]


def comparable(loaded: Loaded) -> dict[str, Any]:
    """Returns what two runs must agree on; the checkout may change while the tests run."""
    return {key: value for key, value in loaded.state.items() if key not in ("config", "commit", "dirty")}


@pytest.mark.parametrize(
    ("course", "cut"),
    [("lcm", 1), ("lcm", 2), ("lcm", 4), ("sft", 1), ("sft", 2), ("sft", 4), ("lcm-full", 3), ("full", 3)],
)
def test_a_resumed_run_is_the_straight_run(uncut: Project, tmp_path: Path, cut: int):
    resumed = uncut.at(tmp_path / "resumed")
    resumed.output.mkdir(parents=True)
    shutil.copytree(uncut.output / f"checkpoint-{cut}", resumed.output / f"checkpoint-{cut}")
    metrics.append(resumed.output / metrics.FILE_NAME, uncut.rows()[:cut])
    resumed.train()

    end = [checkpoint.load(project.output / f"checkpoint-{STEPS}") for project in (uncut, resumed)]
    assert end[0].tensors.keys() == end[1].tensors.keys()
    for group, tensors in end[0].tensors.items():
        assert tensors.keys() == end[1].tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, end[1].tensors[group][name]), f"{group} {name}"
    assert comparable(end[0]) == comparable(end[1])
    assert resumed.rows() == uncut.rows()
    assert [row["step"] for row in uncut.rows()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("course", ["lcm"])
def test_the_course_has_something_to_lose(uncut: Project):
    """Else equality would mean nothing: the loss, the rate and the weights must change from step to step."""
    rows = uncut.rows()
    assert len({row["loss"] for row in rows}) == len({row["grad_norm"] for row in rows}) == STEPS
    rates = [row["learning_rate"] for row in rows]
    assert rates[:3] == [0.005, 0.01, 0.01]
    assert rates[3] > rates[4] > rates[5] > 0
    early, late = (checkpoint.load(uncut.output / f"checkpoint-{step}") for step in (STEPS - 1, STEPS))
    assert not any(
        torch.equal(value, late.tensors["weights"][name]) for name, value in early.tensors["weights"].items()
    )
    assert late.state["position"]["datasets"]["pictures"] == {"epoch": 2, "batch": 2, "turns": 12}
    assert late.state["samples"] == late.state["position"]["samples"] == 2 * 8 + 2 + 1


def two_steps(project: Project, **changes: Any) -> Project:
    project.train(**{"max_train_steps": 2, "checkpoint_step_interval": 1} | changes)
    return project


def test_what_must_match_is_refused_with_both_values(project: Project):
    two_steps(project)
    with pytest.raises(UserError) as refused:
        project.train(max_train_steps=3, lora_rank=8, seed=43)
    assert refused.value.lines == (
        "seed: the checkpoint was made with 42, the config says 43; "
        "set it back, or choose another output_dir to start anew",
        "lora_rank: the checkpoint was made with 4, the config says 8; "
        "set it back, or choose another output_dir to start anew",
    )


def test_a_refusal_moves_nothing(project: Project):
    """Checkpoints are set aside when a run goes on before them, not when it is refused."""
    two_steps(project)
    with pytest.raises(UserError):
        project.train(resume_from_checkpoint="checkpoint-1", seed=43)
    assert sorted(path.name for path in project.output.glob("*-?")) == ["checkpoint-1", "checkpoint-2"]


def test_a_refused_run_does_not_keep_the_folder(project: Project):
    with pytest.raises(UserError):
        project.train(learning_rate=-1)
    with pytest.raises(UserError):
        project.train(learning_rate=1e-2, peft_lora_target_modules=["nothing"])
    project.train(peft_lora_target_modules=None)


def test_what_may_change_is_said(project: Project, caplog: pytest.LogCaptureFixture):
    two_steps(project)
    with caplog.at_level(logging.INFO):
        project.train(max_train_steps=3, learning_rate=5e-3)
    assert "learning_rate: 0.01 until the checkpoint, 0.005 from here on" in caplog.text
    assert [row["learning_rate"] for row in project.rows()] == [0.01, 0.01, 0.005]


def test_the_methods_own_options_follow_their_own_rules(project: Project, caplog: pytest.LogCaptureFixture):
    two_steps(project, distillation_config={"num_ddim_timesteps": 50, "w_min": 2.0, "w_max": 4.0})
    with pytest.raises(UserError, match="distillation_config.num_ddim_timesteps: .* made with 50, the config says 25"):
        project.train(max_train_steps=3, distillation_config={"num_ddim_timesteps": 25})
    with caplog.at_level(logging.INFO):
        project.train(max_train_steps=3, distillation_config={"w_min": 3.0, "w_max": 4.0})
    assert "distillation_config.w_min: 2.0 until the checkpoint, 3.0 from here on" in caplog.text


def test_more_steps_continue(project: Project):
    two_steps(project)
    assert project.train(max_train_steps=4).step == 4
    assert [row["step"] for row in project.rows()] == [1, 2, 3, 4]
    assert json.loads((project.output / "simpletuner.json").read_text())["step"] == 4


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_does_nothing(project: Project, caplog: pytest.LogCaptureFixture):
    two_steps(project)
    before = contents(project.output)
    with caplog.at_level(logging.INFO):
        state = project.train()
    assert state.step == 2
    assert "this run is finished: step 2 of 2" in caplog.text
    assert "raise max_train_steps" in caplog.text
    after = contents(project.output)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {
        project.output / ".simpletuner.lock"
    }
    project.train(max_train_steps=3)  # and it leaves the folder to the next one


def test_none_sets_the_earlier_run_aside(project: Project):
    two_steps(project, validation_prompt="a picture", disable_benchmark=True)
    rows = project.rows()
    project.train(max_train_steps=1, resume_from_checkpoint="none", seed=43, validation_disable=True)
    aside = project.output / "previous-1"
    assert {path.name for path in aside.iterdir()} == {
        *("checkpoint-1", "checkpoint-2", "metrics.jsonl", "validation"),
        *("README.md", "simpletuner.json", "scheduler", "pytorch_lora_weights.safetensors"),
    }
    assert [row["step"] for row in metrics.read(aside / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in project.rows()] == [1]
    assert project.rows()[0]["loss"] != rows[0]["loss"]
    assert not (project.output / "validation").exists()


def test_an_older_checkpoint_leaves_the_newer_course_aside(project: Project):
    two_steps(project)
    rows = project.rows()
    state = project.train(resume_from_checkpoint="checkpoint-1", learning_rate=1e-3)
    assert state.step == 2
    assert (project.output / "abandoned-2").is_dir()
    assert [row["learning_rate"] for row in project.rows()] == [0.01, 0.001]
    assert project.rows()[0] == rows[0]


def test_a_result_of_a_course_that_was_left_does_not_count(project: Project, monkeypatch: pytest.MonkeyPatch):
    """A run that dies after its last checkpoint has no result, whatever an earlier course left in the folder."""
    two_steps(project)
    old = (project.output / "pytorch_lora_weights.safetensors").read_bytes()

    def die(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("simpletuner.run.write_result", die)
        with pytest.raises(MemoryError):
            project.train(resume_from_checkpoint="checkpoint-1", learning_rate=1e-3)
    assert (project.output / "checkpoint-2").is_dir()
    project.train(resume_from_checkpoint="latest")
    assert (project.output / "pytorch_lora_weights.safetensors").read_bytes() != old


def test_a_checkpoint_that_is_not_there_names_those_that_are(project: Project):
    two_steps(project)
    with pytest.raises(UserError, match=r"'checkpoint-7' is no checkpoint \(in .*: checkpoint-1, checkpoint-2; or"):
        project.train(resume_from_checkpoint="checkpoint-7")


def test_another_number_of_images_is_said(project: Project, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    two_steps(project)
    pictures = shutil.copytree(project.datasets[0]["instance_data_dir"], tmp_path / "fewer")
    (pictures / "000.png").unlink()
    project.datasets[0]["instance_data_dir"] = str(pictures)
    with caplog.at_level(logging.INFO):
        project.train(max_train_steps=3, cache_dir=str(tmp_path / "cache"))
    assert "dataset 'pictures': images 6 until the checkpoint, 5 from here on" in caplog.text


def test_another_number_of_processes_is_said(project: Project, caplog: pytest.LogCaptureFixture):
    two_steps(project)
    path = project.output / "checkpoint-2" / "state.json"
    document = json.loads(path.read_text())
    assert document["state"]["processes"] == 1
    document["state"]["processes"] = 2
    path.write_text(json.dumps(document))
    with caplog.at_level(logging.INFO):
        project.train(max_train_steps=3)
    assert "2 processes until the checkpoint, 1 from here on: the order of the epoch changes" in caplog.text


def test_the_oldest_checkpoints_are_deleted(project: Project):
    two_steps(project, max_train_steps=4, checkpoints_total_limit=2)
    assert sorted(path.name for path in project.output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_says_what_made_it(project: Project):
    two_steps(project)
    state = checkpoint.load(project.output / "checkpoint-2").state
    assert state["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty"} <= state.keys()
