"""The published commands of diffusers' scripts, converted, planned and run on the tiny models."""

from pathlib import Path

import pytest

from simpletuner.config import Config, load
from simpletuner.convert.rules import convert, write
from simpletuner.planning import look_ahead
from simpletuner.run import train
from tests.tiny import image_folder, tiny_sd1x
from tests.unit.backends.shards import samples, write_shard

PUBLISHED = sorted((Path(__file__).parents[1] / "unit" / "convert" / "published").glob("*.sh"))
HERE = {  # what a machine without a GPU and extras cannot do
    "mixed_precision": "no",
    "optimizer": "adamw",
    "attention_mechanism": "diffusers",
    "pretrained_vae_model_name_or_path": "",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    return {"sdxl": tiny_model, "sd": tiny_sd1x(tmp_path_factory.mktemp("models") / "sd1x")}


def converted(command: Path, model: Path, folder: Path, **overrides: str) -> Config:
    """Returns the config of a published command, on a model and two pictures of this machine."""
    conversion = convert(command.read_text(encoding="utf8"), {"MODEL_DIR": "some/model"})
    write_shard(folder / "shards" / "000.tar", samples(0, 2, (720, 704)))
    if "shards" in conversion.datasets[0]:
        conversion.datasets[0]["shards"] = "shards/{000..000}.tar"
    else:
        image_folder(folder / str(conversion.datasets[0]["instance_data_dir"]), 2, [(720, 704)])
    write(conversion, folder / "config")
    values = {**HERE, "pretrained_model_name_or_path": str(model), **overrides}
    return load(folder / "config", values, {}, folder)


@pytest.mark.parametrize("command", PUBLISHED, ids=lambda file: file.stem)
def test_published_commands_are_planned(command: Path, models: dict[str, Path], tmp_path: Path):
    plan = look_ahead(converted(command, models[command.stem.partition("_")[0]], tmp_path))
    assert plan.max_steps == (3000 if command.stem == "sdxl_lora_folder" else 1000)
    assert [summary.num_images for summary in plan.datasets] == [2]
    assert (plan.method_config.w_min, plan.method_config.w_max) == ((5, 15) if "sd_" in command.stem else (3, 15))
    assert plan.validation.sizes_px == ((512, 512) if "sd_" in command.stem else (1024, 1024),)
    if plan.lora is not None:
        assert (plan.lora.settings["r"], plan.lora.settings["lora_alpha"]) == (64, 64)


@pytest.mark.parametrize("name", ["sd_full", "sdxl_lora"])
def test_converted_commands_train(name: str, models: dict[str, Path], tmp_path: Path):
    (command,) = (file for file in PUBLISHED if file.stem == name)
    small = {"resolution": "64", "max_train_steps": "1", "train_batch_size": "2", "disable_benchmark": "true"}
    small |= {"push_to_hub": "false", "report_to": "none"}  # nobody is logged in here
    config = converted(command, models[name.partition("_")[0]], tmp_path, **small)
    assert train(config).step == 1
    found = {path.name for path in config.run.output_dir.glob("*.safetensors")}
    assert found & {"pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors"}
