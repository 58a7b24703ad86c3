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


def test_an_adapter_goes_to_kohyas_names_and_back_unchanged(run: Project, tmp_path: Path) -> None:
    base = run.settings["pretrained_model_name_or_path"]
    (tmp_path / "out").mkdir()
    list(export(run.output, "kohya", tmp_path / "k.safetensors", "fp32"))
    command = ["export", str(tmp_path / "k.safetensors"), "--to", "diffusers", "--base", base, "--output"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("79 layers, ")
    back = tmp_path / "back" / "pytorch_lora_weights.safetensors"
    own, read = load_file(run.output / "pytorch_lora_weights.safetensors"), load_file(back)
    assert own.keys() == read.keys()
    assert all(torch.equal(value, read[name]) for name, value in own.items())
    pictures: list[torch.Tensor] = []
    for folder in (run.output, back.parent):
        pipeline = stock(run)
        pipeline.load_lora_weights(folder)
        pictures.append(drawn(pipeline))
    torch.testing.assert_close(*pictures, rtol=1e-5, atol=1e-5)
    for words, said in (
        (["--to", "kohya"], "--to diffusers: it is for an adapter's .safetensors file"),
        (["--to", "diffusers"], "--base: required for a file"),
        (["--to", "diffusers", "--base", base], "--output: '.*back' is there already"),
        (["--to", "diffusers", "--base", base, "--variant", "fp16"], "--variant: --to diffusers writes one file"),
    ):
        failed = CliRunner().invoke(
            app, ["export", str(tmp_path / "k.safetensors"), *words, "--output", str(tmp_path / "back")]
        )
        with pytest.raises(UserError, match=said):
            raise failed.exception or AssertionError(failed.output)


def test_a_pipeline_of_a_variant_and_what_a_file_says_of_an_sd2(project: Project, tmp_path: Path) -> None:
    model = RECIPES["sd1x"](tmp_path / "model")
    project.settings |= {"model_family": "sd1x", "pretrained_model_name_or_path": str(model)}
    project.settings["cache_dir"] = str(tmp_path / "cache")
    project.train(**LORA)
    list(export(project.output, "pipeline", tmp_path / "whole", "fp16", variant="fp16"))
    assert (tmp_path / "whole" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole", variant="fp16", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16

    def told() -> dict[str, str]:
        list(export(project.output, "kohya", tmp_path / "k.safetensors", force=True))
        with safe_open(tmp_path / "k.safetensors", framework="pt") as file:
            return file.metadata()

    assert told()["ss_base_model_version"] == "sd_v1"
    assert told()["modelspec.resolution"] == "64x64"
    config = model / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 1024}))
    assert told()["ss_base_model_version"] == "sd_v2"
    assert told()["modelspec.architecture"] == "stable-diffusion-v2/lora"
