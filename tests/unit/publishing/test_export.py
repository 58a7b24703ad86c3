import json
from pathlib import Path

import pytest
import torch

from simpletuner.atomic import files_into, new_folder
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.publishing.export import write_model


def test_whole_model_is_loaded_from_the_root_of_the_folder(tiny_model: Path, tmp_path: Path):
    from diffusers import LCMScheduler, UNet2DConditionModel

    unet = SDXL().load(ModelSource(str(tiny_model)), guidance_embed_dim=32)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    write_model(tmp_path, unet, LCMScheduler(original_inference_steps=25))
    again = UNet2DConditionModel.from_pretrained(tmp_path, use_safetensors=True)
    assert again.config["time_cond_proj_dim"] == 32
    assert again.state_dict().keys() == unet.state_dict().keys()
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in again.state_dict().items())
    half = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16, variant="fp16")
    assert all(torch.equal(value, unet.state_dict()[name].half()) for name, value in half.state_dict().items())
    assert LCMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config["original_inference_steps"] == 25
    # and as the network of another run
    source = ModelSource(str(tiny_model), unet_path=str(tmp_path))
    assert SDXL().facts(source).guidance_embed_dim == 32
    loaded = SDXL().load(source, guidance_embed_dim=32)
    assert torch.equal(loaded.time_embedding.cond_proj.weight, unet.time_embedding.cond_proj.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "scheduler",
    ]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path):
    (tmp_path / "weights").write_text("old")

    def write_and_fail():
        with files_into(tmp_path) as temporary:
            (temporary / "weights").write_text("new, half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert (tmp_path / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_files_and_subfolders_replace_older_ones(tmp_path: Path):
    for text in ("first", "second"):
        with files_into(tmp_path / "out") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub/a.json").write_text(json.dumps(text))
    assert json.loads((tmp_path / "out/sub/a.json").read_text()) == "second"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path):
    def write_and_fail():
        with new_folder(tmp_path / "made") as made:
            (made / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "made") as made:
        (made / "a").write_text("a")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made/a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
