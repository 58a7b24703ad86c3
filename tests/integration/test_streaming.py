"""Runs that encode while they train: they train what cached runs train, and go on bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.config.load import load
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.plan_view import plan_json, plan_text
from simpletuner.planning import look_ahead
from simpletuner.training import checkpoint
from tests.integration.conftest import Project
from tests.integration.test_webdataset import SHARDS, shard

LIVE = {"vae_cache_disable": True, "text_cache_disable": True}
COURSE: dict[str, Any] = {
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "caption_dropout_probability": 0.3,
    "adam_epsilon": 1e-4,  # with 1e-8 rounding decides the sign of the smallest updates
}


@pytest.fixture
def on_shards(project: Project, pictures: Path, tmp_path: Path) -> Project:
    shard(tmp_path / "shards", pictures)
    project.datasets = [SHARDS | {"shards": str(tmp_path / "shards" / "*.tar")}]
    project.settings["cache_dir"] = str(tmp_path / "cache")
    return project


@pytest.mark.parametrize("more", [{}, {"random_flip": True}])
def test_a_streaming_run_has_the_losses_of_the_cached_one(on_shards: Project, tmp_path: Path, more: dict[str, Any]):
    cached, live = on_shards.at(tmp_path / "cached"), on_shards.at(tmp_path / "live")
    cached.train(**COURSE, **more)
    live.train(**COURSE, **more, **LIVE, cache_dir=str(tmp_path / "other"))
    assert not list((tmp_path / "other").rglob("latents-*"))
    for one, two in zip(cached.rows(), live.rows(), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert len({row["loss"] for row in live.rows()}) == 4


def test_a_streaming_run_goes_on_to_the_very_weights(on_shards: Project, tmp_path: Path):
    """Stopped in the middle of a shard and resumed, it sees the next sample, and ends where a straight one does."""
    straight, stopped = on_shards.at(tmp_path / "straight"), on_shards.at(tmp_path / "stopped")
    straight.train(**COURSE, **LIVE, random_flip=True)
    stopped.train(**COURSE | {"max_train_steps": 2}, **LIVE, random_flip=True)
    stopped.train(max_train_steps=4)
    mine, other = (load_file(place.output / "pytorch_lora_weights.safetensors") for place in (straight, stopped))
    assert mine.keys() == other.keys()
    assert all(torch.equal(values, other[key]) for key, values in mine.items())
    assert straight.rows() == stopped.rows()
    ends = [checkpoint.load(place.output / "checkpoint-4").state["position"] for place in (straight, stopped)]
    assert ends[0] == ends[1]


def test_the_plan_says_which_encoders_stay_loaded(on_shards: Project, tiny_model: Path):
    encoders = SDXL().load_encoders(
        ModelSource(str(tiny_model)), torch.device("cpu"), torch.float32, frozenset({"vae", "text"})
    )
    assert encoders.vae is not None
    assert encoders.text_encoders is not None
    sizes = [sum(p.numel() for module in modules for p in module.parameters()) * 4
             for modules in ([encoders.vae], encoders.text_encoders)]  # fmt: skip
    plan = look_ahead(load(on_shards.write(**LIVE)))
    told = json.loads(json.dumps(plan_json(plan)))["encoders_loaded"]
    assert told["vae"] == {"datasets": ["pictures"], "bytes": sizes[0]}
    assert told["text"]["bytes"] == pytest.approx(sizes[1], rel=1e-3)  # position ids are no parameters
    lines = plan_text(plan).splitlines()
    size = f"{sizes[0] / 1e3:.1f} kB"
    assert f"streaming   images of pictures are not cached: the VAE stays loaded, {size} on each device" in lines
    assert any("captions of pictures are not cached: the text encoders stay loaded, " in line for line in lines)
    assert not any("latents of pictures" in line for line in lines)
    cached = look_ahead(load(on_shards.write(vae_cache_disable=None, text_cache_disable=None)))
    assert plan_json(cached)["encoders_loaded"] == {}
