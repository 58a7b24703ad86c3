"""The loss on held-out pictures: what it says, and that training does not notice it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.hooks.eval_loss import SEED, FixedLevels
from simpletuner.plan_view import plan_text
from simpletuner.planning import look_ahead
from simpletuner.randomness import Randomness
from simpletuner.training import metrics
from tests.integration.conftest import Project
from tests.tiny import image_folder

LEVELS = ("eval_loss/12", "eval_loss/38", "eval_loss/62", "eval_loss/88")


@pytest.fixture(scope="module")
def new_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("new"), 3, seed=5)


@pytest.fixture
def measuring(project: Project, new_pictures: Path) -> Project:
    return measured_on(project, new_pictures)


def measured_on(project: Project, pictures: Path) -> Project:
    entry = {"id": "new", "dataset_type": "eval", "instance_data_dir": str(pictures), "caption_strategy": "textfile"}
    project.datasets = [*project.datasets, entry]
    return project


def eval_rows(project: Project) -> list[metrics.Row]:
    return [row for row in metrics.read(project.output / metrics.FILE_NAME) if "eval_loss" in row]


def adapter(project: Project) -> dict[str, list[float]]:
    tensors = load_file(project.output / "pytorch_lora_weights.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def test_it_is_measured_at_both_ends_and_at_every_interval(measuring: Project):
    measuring.train(max_train_steps=5, eval_steps_interval=2, logging_steps=3, learning_rate=0.1)
    rows = eval_rows(measuring)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row in rows:
        assert row.keys() == {"step", "eval_loss", *LEVELS}
        assert row["eval_loss"] == pytest.approx(sum(row[level] for level in LEVELS) / 4)
    assert len({row["eval_loss"] for row in rows}) == 4
    # The steps of the file never go back, whatever waited on the device.
    steps = [row["step"] for row in metrics.read(measuring.output / metrics.FILE_NAME)]
    assert steps == sorted(steps)


def test_training_is_the_same_to_the_bit(project: Project, new_pictures: Path, tmp_path: Path):
    options = {"lora_dropout": 0.2}
    cache = {"cache_dir": str(tmp_path / "cache")}
    without = project.at(tmp_path / "without")
    without.train(max_train_steps=4, **options, **cache)
    other = {"cache_dir": str(tmp_path / "other")}
    measured = measured_on(project.at(tmp_path / "measured"), new_pictures)
    measured.train(max_train_steps=4, eval_steps_interval=1, **options, **other)
    assert len(eval_rows(measured)) == 5
    assert adapter(measured) == adapter(without)
    assert [row for row in measured.rows() if "loss" in row] == without.rows()


def test_it_depends_on_neither_seed_nor_batch_size_nor_ranks(measuring: Project, tmp_path: Path):
    start = {"max_train_steps": 1, "eval_timesteps": 3}
    measuring.train(**start)
    others = [
        measuring.at(tmp_path / "a"),
        measuring.at(tmp_path / "b"),
    ]
    others[0].train(**start, seed=7, train_batch_size=1)
    done = others[1].launch(2, **start)
    assert done.returncode == 0, done.stderr
    expected = eval_rows(measuring)[0]
    for other in others:
        found = eval_rows(other)[0]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4), key


def test_it_is_the_methods_own_loss_at_the_middle_of_each_part(measuring: Project):
    """Of plain fine-tuning at the base model: computed here without the hook."""
    options = {"distillation_method": None, "distillation_config": None, "eval_timesteps": 2, "max_train_steps": 1}
    measuring.train(**options)
    row = eval_rows(measuring)[0]
    run = measuring.build()
    only = Project(measuring.folder / "alone", measuring.settings, [{**measuring.datasets[1], "dataset_type": "image"}])
    only.settings |= {"train_batch_size": 1}
    losses: dict[float, list[float]] = {0.25: [], 0.75: []}
    dataset = only.build().dataset
    for (batch, _), _ in zip(dataset.batches(), range(3), strict=False):
        for share, found in losses.items():
            noise = Randomness(SEED).normal("noise", batch.position, batch.mean.shape[1:])
            draw = run.distiller.draw(batch, FixedLevels(SEED, torch.tensor([share])))
            assert draw.start.tolist() == [int(1000 * share)]
            assert torch.equal(draw.noise, noise)
            with torch.no_grad():
                found.append(float(run.distiller.loss("student", batch, draw, 0).per_sample))
    # The order of the pictures, and so their noise, is that of the seed; the mean over three hardly depends on it.
    for share, found in losses.items():
        assert row[f"eval_loss/{100 * share:.0f}"] == pytest.approx(sum(found) / 3, rel=0.2)


def test_a_resumed_run_goes_on_with_the_curve(measuring: Project, tmp_path: Path):
    options = {"eval_steps_interval": 1, "checkpoint_step_interval": 1}
    measuring.train(max_train_steps=3, **options)
    parted = measuring.at(tmp_path / "parted")
    parted.train(max_train_steps=1, **options)
    parted.train(max_train_steps=3, **options)
    assert eval_rows(parted) == eval_rows(measuring)


def test_the_plan_says_what_is_held_out(measuring: Project):
    text = plan_text(look_ahead(load(measuring.write(num_eval_images=2, eval_steps_interval=50))))
    assert "held out    new: 2 images, their loss at 4 noise levels" in text
    assert "before training, every 50 steps and at the end" in text
    assert "dataset     pictures: 6 images" in text


def test_mistakes_are_named(measuring: Project):
    with pytest.raises(UserError, match="eval_dataset_id: there is no dataset 'old' of dataset_type eval"):
        load(measuring.write(eval_dataset_id="old"))
    measuring.datasets[1]["instance_data_dir"] = measuring.datasets[0]["instance_data_dir"]
    notices = load(measuring.write(eval_dataset_id="new")).notices
    assert "dataset 'new': 'pictures' trains on its pictures, so its loss tells nothing of new ones" in notices
    measuring.datasets.pop()
    notices = look_ahead(load(measuring.write(eval_dataset_id=None, eval_timesteps=3))).notices
    assert "eval_timesteps: has no effect: no dataset has dataset_type eval" in notices


def test_levels_are_given_and_all_else_is_drawn():
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    fixed, plain, positions = FixedLevels(3, levels), Randomness(3), torch.arange(3)
    assert fixed.integers("index", positions, 20).tolist() == [2, 10, 18]
    torch.testing.assert_close(fixed.uniform("timestep", positions), levels.float())
    assert torch.equal(fixed.uniform("w", positions), plain.uniform("w", positions))
    assert torch.equal(fixed.normal("noise", positions, (2,)), plain.normal("noise", positions, (2,)))
    assert replace(fixed, seed=4).seed == 4
