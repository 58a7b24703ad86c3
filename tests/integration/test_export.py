"""What `simpletuner export` writes is read by stock diffusers and gives what the run's own result gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from simpletuner.cli import app
from simpletuner.config.errors import UserError
from simpletuner.exporting import export
from simpletuner.publishing.layouts import checkpoint_unet
from tests.integration.conftest import Project
from tests.tiny import RECIPES

LORA: dict[str, Any] = {"lora_alpha": 7, "learning_rate": 0.05, "validation_disable": True, "mixed_precision": "no"}


def stock(project: Project) -> Any:
    path = project.settings["pretrained_model_name_or_path"]
    scheduler = LCMScheduler.from_pretrained(project.output, subfolder="scheduler")
    return DiffusionPipeline.from_pretrained(path, scheduler=scheduler, use_safetensors=True)


@torch.no_grad()
def drawn(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {"width": 96, "height": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline("a red picture", generator=generator, **arguments).images


@pytest.fixture(params=["sdxl", "sd1x"])
def run(request: pytest.FixtureRequest, project: Project, tmp_path: Path) -> Project:
    """Returns a finished adapter run whose pictures differ from its base model's."""
    if request.param == "sd1x":
        project.settings["pretrained_model_name_or_path"] = str(RECIPES["sd1x"](tmp_path / "model"))
        project.settings["model_family"] = "sd1x"
        project.settings["cache_dir"] = str(tmp_path / "cache")
    project.train(**LORA, use_rslora=request.param == "sdxl")
    return project


def test_every_format_draws_what_the_run_draws(run: Project, tmp_path: Path) -> None:
    pipeline = stock(run)
    base = drawn(pipeline)
    pipeline.load_lora_weights(run.output)
    own = drawn(pipeline)
    assert (own - base).abs().max() > 1e-3

    (line,) = export(run.output, "kohya", tmp_path / "k.safetensors", "fp32")
    assert line.startswith("237 tensors")  # 79 modules, three each
    pipeline = stock(run)
    pipeline.load_lora_weights(tmp_path / "k.safetensors")
    torch.testing.assert_close(drawn(pipeline), own, rtol=1e-4, atol=1e-4)

    list(export(run.output, "pipeline", tmp_path / "whole", "fp32"))
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole", use_safetensors=True)
    assert isinstance(whole.scheduler, LCMScheduler)
    torch.testing.assert_close(drawn(whole), own, rtol=1e-4, atol=1e-4)

    lines = list(export(run.output, "checkpoint", tmp_path / "c.safetensors", "fp32"))
    assert "UNet alone" in lines[-1]
    read = UNet2DConditionModel.from_single_file(
        str(tmp_path / "c.safetensors"), config=run.settings["pretrained_model_name_or_path"], subfolder="unet"
    )
    fused = whole.unet.state_dict()
    assert read.state_dict().keys() == fused.keys()
    assert all(torch.equal(value, fused[name]) for name, value in read.state_dict().items())


def test_a_file_says_what_it_is(project: Project, tmp_path: Path) -> None:
    project.train(**LORA)
    command = ["export", str(project.output), "--to", "kohya", "--output", str(tmp_path / "k.safetensors")]
    done = CliRunner().invoke(app, [*command, "--dtype", "fp16"])
    assert done.exit_code == 0, done.output
    with safe_open(tmp_path / "k.safetensors", framework="pt") as file:
        told = file.metadata()
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (told["ss_network_module"], told["ss_network_dim"], told["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "7.0",
    )
    assert told["simpletuner.method"] == "lcm"
    assert json.loads(told["simpletuner.sampling"])["scheduler"] == "LCMScheduler"
    tensors = load_file(tmp_path / "k.safetensors")
    assert {value.dtype for name, value in tensors.items() if not name.endswith("alpha")} == {torch.float16}
    names = load_file(tmp_path / "k.safetensors").keys()
    assert any(name.startswith("lora_unet_input_blocks_") for name in names)
    assert not any("down_blocks" in name for name in names)
    project.train(
        **LORA, init_lora=str(tmp_path / "k.safetensors"), output_dir=str(tmp_path / "on")
    )  # and it comes back


def test_a_run_writes_the_other_format_too(project: Project) -> None:
    project.train(**LORA, lora_format="comfyui")
    (file,) = (project.output / "kohya").iterdir()
    assert file.name == "output.safetensors"
    pipeline = stock(project)
    pipeline.load_lora_weights(project.output)  # the run's own file is still what diffusers finds
    own = drawn(pipeline)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(drawn(pipeline), own, rtol=1e-4, atol=1e-4)


def test_a_whole_model_with_the_rest_of_its_file(project: Project, tmp_path: Path) -> None:
    project.train(model_type="full", lora_rank=None, validation_disable=True, mixed_precision="no")
    with pytest.raises(UserError, match="--to kohya: this run trained a whole model"):
        list(export(project.output, "kohya", tmp_path / "k"))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="--output: '.*there' is there already; --force overwrites it"):
        list(export(project.output, "pipeline", tmp_path / "there"))
    list(export(project.output, "pipeline", tmp_path / "there", force=True))
    read = UNet2DConditionModel.from_pretrained(tmp_path / "there", subfolder="unet").state_dict()
    own = UNet2DConditionModel.from_pretrained(project.output).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in read.items())


def test_what_cannot_be_had_is_one_line(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run"):
        list(export(project.output, "kohya", tmp_path / "k"))
    project.train(**LORA, use_dora=True)
    with pytest.raises(UserError, match=r"--to kohya: there is no place in that format for .*lora_magnitude_vector"):
        list(export(project.output, "kohya", tmp_path / "k"))
    assert not list(tmp_path.glob("k*"))
    (project.output / "pytorch_lora_weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="--to kohya: '.*k' cannot be written, or the run's files not read"):
        list(export(project.output, "kohya", tmp_path / "k"))
    with pytest.raises(UserError, match=r"lora_format: 'kohya' has no place for DoRA"):
        project.train(**LORA, use_dora=True, lora_format="kohya", output_dir=str(tmp_path / "other"))


def test_an_adapter_on_attention_of_a_single_file_base_keeps_its_blocks(project: Project, tmp_path: Path) -> None:
    model = Path(project.settings["pretrained_model_name_or_path"])
    single = tmp_path / "base.safetensors"
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    save_file(checkpoint_unet(dict(unet.state_dict())), single)
    project.train(**LORA, peft_lora_target_modules="attention")
    list(export(project.output, "kohya", tmp_path / "folder.safetensors"))
    document = json.loads((project.output / "simpletuner.json").read_text())
    document["config"]["model"] |= {"pretrained_unet_model_name_or_path": str(single), "single_file_config": str(model)}
    (project.output / "simpletuner.json").write_text(json.dumps(document))
    list(export(project.output, "kohya", tmp_path / "file.safetensors"))
    one, two = load_file(tmp_path / "folder.safetensors"), load_file(tmp_path / "file.safetensors")
    assert one.keys() == two.keys()


def test_a_full_lcm_has_no_place_in_a_checkpoint(project: Project, tmp_path: Path) -> None:
    project.train(model_type="full", lora_rank=None, validation_disable=True)
    with pytest.raises(UserError, match=r"--to checkpoint: there is no place in that format for .*cond_proj"):
        list(export(project.output, "checkpoint", tmp_path / "c.safetensors"))
    (tmp_path / "whole" / "unet").mkdir(parents=True)
    (tmp_path / "whole" / "unet" / "old.safetensors").touch()
    list(export(project.output, "pipeline", tmp_path / "whole", force=True))
    assert not (tmp_path / "whole" / "unet" / "old.safetensors").exists()
