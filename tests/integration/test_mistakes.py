"""Likely mistakes are one line before any work, and what has no effect is named."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.planning import look_ahead
from simpletuner.publishing.export import write_network
from simpletuner.training import run_lock
from tests.integration.conftest import Project


def notices(project: Project, **changes: Any) -> list[str]:
    return list(look_ahead(load(project.write(**changes))).notices)


def idle(project: Project, **changes: Any) -> set[str]:
    """Returns the keys that the plan says have no effect."""
    return {line.partition(":")[0] for line in notices(project, **changes) if "has no effect" in line}


def test_settings_without_effect_in_this_run_are_named(project: Project):
    assert idle(project) == set()
    assert idle(project, validation_prompt="a", validation_negative_prompt="b") == {"validation_negative_prompt"}
    guided = {"validation_guidance": 5.0, "distillation_method": None, "distillation_config": None}
    assert idle(project, **guided) == set()
    schedule = {"lr_end": 1e-5, "lr_power": 2.0, "lr_num_cycles": 3}
    assert idle(project, **schedule) == set(schedule)
    assert idle(project, **schedule, lr_scheduler="polynomial") == {"lr_num_cycles"}
    decay = {"adam_beta2": 0.9, "adam_weight_decay": 0.1}
    for optimizer, keys in {"adamw": set(), "optimi-lion": {"adam_beta2"}, "torch-sgd": set(decay)}.items():
        assert idle(project, **schedule | dict.fromkeys(schedule), **decay, optimizer=optimizer) == keys


def test_a_full_model_names_the_adapters_settings(project: Project):
    adapter = {"lora_alpha": 8, "use_dora": True}
    assert idle(project, **adapter, model_type="full") == {"lora_rank", *adapter}


def test_the_decay_of_the_target_may_stand_outside_of_the_methods_section(project: Project):
    plan = look_ahead(load(project.write(model_type="full", lora_rank=None, ema_decay=0.5)))
    assert plan.method_config.ema_decay == 0.5
    assert idle(project, model_type="lora", ema_decay=0.5) == {"ema_decay"}


def test_a_base_that_is_told_its_guidance_wants_a_method_that_tells_it(
    project: Project, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_network(tmp_path / "network", SDXL().load(ModelSource(str(tiny_model)), guidance_embed_dim=32))
    changes = {"pretrained_unet_model_name_or_path": str(tmp_path / "network"), "distillation_config": {}}
    for untold in ({"model_type": "lora"}, {"model_type": "full", "distillation_method": "sft"}):
        with pytest.raises(UserError, match="is told its guidance already"):
            look_ahead(load(project.write(**changes, **untold)))
    # What a model of the hub is, shows when it has been downloaded.
    monkeypatch.setattr("simpletuner.plan.untold_guidance", lambda *_: [])
    with pytest.raises(UserError, match="is told its guidance already"):
        project.build(**changes, model_type="lora")


def test_a_size_that_cannot_be_drawn_is_refused(project: Project):
    with pytest.raises(UserError, match="validation_resolution: .*no multiple of 8"):
        load(project.write(validation_resolution="100x70"))


def test_a_damaged_config_of_the_model_is_named(project: Project, tiny_model: Path, tmp_path: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"pretrained_model_name_or_path: '.*unet/config.json' is damaged"):
        look_ahead(load(project.write(pretrained_model_name_or_path=str(model))))


def test_an_output_dir_that_cannot_be_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"output_dir: {place} cannot be written"):
            run_lock.hold(place)
