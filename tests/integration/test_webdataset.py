"""Runs on shards: the same pictures in a folder and in tar files train the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.config.load import load
from simpletuner.plan_view import plan_json, plan_text
from simpletuner.planning import look_ahead
from tests.integration.conftest import Project
from tests.unit.backends.shards import served, write_shard

SHARDS: dict[str, Any] = {"id": "pictures", "type": "webdataset"}


def shard(folder: Path, pictures: Path, num_shards: int = 2) -> list[Path]:
    """Writes the pictures of a folder, with their captions, into shards."""
    names = sorted(path for path in pictures.iterdir() if path.suffix == ".png")
    made: list[Path] = []
    for number in range(num_shards):
        files = [file for name in names[number::num_shards] for file in (name, name.with_suffix(".txt"))]
        made.append(write_shard(folder / f"{number:03}.tar", {file.name: file.read_bytes() for file in files}))
    return made


def test_a_run_on_shards_trains_on_the_pictures_of_the_folder(project: Project, pictures: Path, tmp_path: Path):
    shard(tmp_path / "shards", pictures)
    project.datasets = [SHARDS | {"shards": str(tmp_path / "shards" / "{000..001}.tar")}]
    assert project.train(cache_dir=str(tmp_path / "cache")).step == 2
    assert {row["step"] for row in project.rows()} == {1, 2}
    weights = load_file(project.output / "pytorch_lora_weights.safetensors")
    assert all(bool(torch.isfinite(values).all()) for values in weights.values())


def test_a_run_on_shards_goes_on_to_the_very_weights(project: Project, pictures: Path, tmp_path: Path):
    """Stopped in the middle of a shard and resumed, a run sees the next sample, and ends where a straight one does."""
    shard(tmp_path / "shards", pictures)
    project.datasets = [SHARDS | {"shards": str(tmp_path / "shards" / "*.tar")}]
    project.settings["cache_dir"] = str(tmp_path / "cache")
    straight, stopped = project.at(tmp_path / "straight"), project.at(tmp_path / "stopped")
    straight.train(max_train_steps=4, checkpoint_step_interval=2)
    stopped.train(max_train_steps=2, checkpoint_step_interval=2)
    stopped.train(max_train_steps=4)
    name = "pytorch_lora_weights.safetensors"
    mine, other = (load_file(place.output / name) for place in (straight, stopped))
    assert mine.keys() == other.keys()
    assert all(torch.equal(values, other[key]) for key, values in mine.items())
    assert straight.rows() == stopped.rows()


def test_two_processes_share_the_shards(project: Project, pictures: Path, tmp_path: Path):
    shard(tmp_path / "shards", pictures)
    project.datasets = [SHARDS | {"shards": str(tmp_path / "shards" / "*.tar")}]
    one, two = project.at(tmp_path / "one"), project.at(tmp_path / "two")
    ended = two.launch(2, train_batch_size=1, cache_dir=str(tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr
    one.train(train_batch_size=2, cache_dir=str(tmp_path / "cache"))
    for mine, other in zip(one.rows(), two.rows(), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_plan_of_shards_that_are_not_here_downloads_nothing(project: Project, pictures: Path, tmp_path: Path):
    shard(tmp_path / "remote", pictures)
    with served(tmp_path / "remote") as server:
        project.datasets = [SHARDS | {"shards": f"{server.url}/{{000..001}}.tar"}]
        plan = look_ahead(load(project.write(cache_dir=str(tmp_path / "cache"))))
        assert server.requests == []
    assert not (tmp_path / "cache").exists()
    assert plan_json(plan)["epochs"] is None
    text = plan_text(plan)
    assert "0 images so far (not all are counted yet)" in text
    assert "the epochs are known when the images are counted" in text
