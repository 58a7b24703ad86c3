"""The guides of documentation/distillation, followed block by block in an empty folder with tiny models in place of the
real ones: files, commands and code as they stand on the page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from simpletuner import cli, registry
from simpletuner.backends.webdataset import Options as ShardOptions
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.deprecated import ALIASES
from simpletuner.config.schema import section_of
from simpletuner.distillers.lcm import LCMConfig
from tests.tiny import image_folder, tiny_sd1x
from tests.unit.backends.shards import samples, write_shard

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "documentation" / "distillation"
EXAMPLES = {"SDXL_LCM": "sdxl_lcm", "LCM_FULL": "lcm_full_sd15"}
"""Guide -> the folder of config/examples that it shows."""

SMALL = {
    "resolution": 64,
    "resolution_type": "pixel_area",
    "aspect_bucket_alignment": 16,
    "minimum_image_size": None,
    "max_train_steps": 2,
    "lr_warmup_steps": 0,
    "validation_resolution": "64x64",
    "checkpoint_step_interval": 0,
}
SMALL_WORDS = {"12000": "3"}
OUTSIDE = ("git clone ", "bash venv.sh", "hf auth login", "wandb login")
"""What needs the network, or would change this environment."""

NO_KEYS = {"guidance_scale", "unet_target", "gpu_ids", "target_std", "data_wait"}
"""Words with an underscore that are names of diffusers and accelerate, and of metrics."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Returns the language and the text of each block of a page."""
    return re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf8"), re.DOTALL)


def example(guide: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = ROOT / "config" / "examples" / EXAMPLES[guide]
    config, datasets = (json.loads((folder / name).read_text()) for name in ("config.json", "multidatabackend.json"))
    return config, datasets


class Reader:
    """Somebody who does in an empty folder what a page says, in its order."""

    def __init__(self, folder: Path, guide: str, real_names: dict[str, str], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.guide, self.real_names, self.patch = folder, guide, real_names, patch
        self.names: dict[str, Any] = {}
        self.said: list[str] = []
        self.config, self.datasets = example(guide)
        shutil.copytree(ROOT / "config" / "examples", folder / "config" / "examples")
        own = folder / "config" / "examples" / EXAMPLES[guide] / "config.json"
        own.write_text(json.dumps(self._small(self.config)))

    def _small(self, config: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(config)
        for real, tiny in self.real_names.items():
            text = text.replace(real, tiny)
        return json.loads(text) | SMALL

    def follow(self, page: Path, capfd: pytest.CaptureFixture[str]) -> None:
        for language, text in blocks(page):
            capfd.readouterr()
            getattr(self, language)(text)
            self.said.append(capfd.readouterr().out)

    def bash(self, text: str) -> None:
        for line in re.split(r"\n(?! )", text.replace("\\\n", "").strip()):
            if line.startswith(OUTSIDE):
                continue
            words = [SMALL_WORDS.get(word, word) for word in shlex.split(line, comments=True)]
            first = next(place for place, word in enumerate(words) if "=" not in word)
            variables = dict(word.split("=", 1) for word in words[:first])
            words = words[first:]
            if words[:2] == ["bash", "train.sh"]:  # several processes are only planned
                command = "plan" if "TRAINING_NUM_PROCESSES" in variables else "train"
                self.simpletuner([command, *words[2:]], variables)
            elif words[0].removeprefix(".venv/bin/") == "simpletuner":
                self.simpletuner(words[1:], variables)
            else:
                subprocess.run(words, cwd=self.folder, env=os.environ | variables, check=True)

    def simpletuner(self, words: list[str], variables: dict[str, str]) -> None:
        with self.patch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["simpletuner", *words])
            status = 0
            try:
                cli.main()
            except SystemExit as left:
                status = left.code
        assert not status, words

    def json(self, text: str) -> None:
        """A block is one of the example's files, or keys for its config: then it trains with them."""
        value = json.loads(text)
        if value in (self.config, self.datasets):
            return
        folder = self.folder / "config" / f"changed-{len(self.said)}"
        folder.mkdir()
        changed = self._small(self.config | value) | {"output_dir": f"output/{folder.name}", "max_train_steps": 1}
        (folder / "config.json").write_text(json.dumps(changed))
        (folder / "multidatabackend.json").write_text(json.dumps(self.datasets))
        self.simpletuner(["train", "--config", str(folder)], {})
        assert list((self.folder / "output" / folder.name).glob("*.safetensors"))

    def python(self, text: str) -> None:
        for real, tiny in {**self.real_names, '"cuda"': '"cpu"'}.items():
            text = text.replace(real, tiny)
        exec(compile(text, f"{self.guide}.md", "exec"), self.names)  # noqa: S102  (the repository's own page)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the working directory, with images where the examples have theirs."""
    image_folder(tmp_path / "datasets" / "my-dataset", 3)
    for name in ("RANK", "WORLD_SIZE", "TRAINING_NUM_PROCESSES", "ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("guide", EXAMPLES)
def test_the_guide_shows_the_files_of_the_example(guide: str) -> None:
    shown = [json.loads(text) for language, text in blocks(GUIDES / f"{guide}.md") if language == "json"]
    assert all(file in shown for file in example(guide))


@pytest.mark.parametrize("guide", EXAMPLES)
def test_every_key_that_a_guide_names_exists(guide: str) -> None:
    sections = (DatasetConfig, LCMConfig, ShardOptions)
    keys = {*section_of(), *ALIASES, *(key for section in sections for key in section.model_fields)}
    values = {name for kind in ("optimizers", "distillers", "families") for name in registry.names(kind)}
    text = re.sub(r"```.*?```", "", (GUIDES / f"{guide}.md").read_text(encoding="utf8"), flags=re.DOTALL)
    named = {word for word in re.findall(r"`\"?([a-z0-9]+(?:_[a-z0-9]+)+)(?![\w.])", text)}
    assert named - keys - values - NO_KEYS == set()
    explained = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text.partition("| Key |")[2].partition("\n\n")[0], re.M)
    assert explained
    assert {key for cell in explained for key in re.findall(r"`(\w+)`", cell)} - keys == set()


def test_the_guide_to_sdxl_in_four_steps(
    here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    control = "diffusers/controlnet-canny-sdxl-1.0"
    names = {"stabilityai/stable-diffusion-xl-base-1.0": str(tiny_model), control: str(here / "control")}
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).save_pretrained(here / "control")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights(here / "output" / "my-style", dict(get_peft_model_state_dict(unet)))
    Image.new("RGB", (64, 64)).save(here / "edges.png")
    reader = Reader(here, "SDXL_LCM", names, monkeypatch)
    result = here / "output" / "sdxl-lcm"
    reader.follow(GUIDES / "SDXL_LCM.md", capfd)

    assert not [said for said in reader.said if "has no effect" in said or "without effect" in said]
    assert [len(list(result.glob(f"checkpoint-{step}/weights.safetensors"))) for step in (2, 3)] == [1, 1]
    assert len(list((result / "samples").glob("seed-*/*.png"))) == 4
    assert (result / "validation" / "contact_sheet.png").is_file()
    pipeline = reader.names["pipeline"]
    assert (pipeline.scheduler.config.original_inference_steps, pipeline.scheduler.config.timestep_scaling) == (50, 10)
    assert pipeline.unet.dtype == torch.bfloat16
    assert reader.names["image"].size == (64, 64)
    assert (here / "output" / "pcm4" / "pytorch_lora_weights.safetensors").is_file()


def test_the_guide_to_whole_models_in_four_steps(
    here: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    names = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(tiny_sd1x(tmp_path / "sd15")),
        "stabilityai/stable-diffusion-xl-base-1.0": str(tiny_model),
    }
    reader = Reader(here, "LCM_FULL", names, monkeypatch)
    write_shard(here / "datasets" / "shards" / "00000.tar", samples(0, 2, (96, 96)))
    reader.follow(GUIDES / "LCM_FULL.md", capfd)

    assert not [said for said in reader.said if "has no effect" in said or "without effect" in said]
    assert "steps       2 of 48 samples" in "".join(reader.said)
    result = here / "output" / "sd15-lcm"
    assert json.loads((here / "config" / "converted" / "config.json").read_text())["output_dir"] == "output/converted"
    assert len(list((result / "samples").glob("seed-*/*.png"))) == 2
    assert all((result / name / "diffusion_pytorch_model.safetensors").is_file() for name in (".", "ema"))
    unet = reader.names["unet"]
    assert unet.config["time_cond_proj_dim"] == 256
    assert reader.names["pipeline"].scheduler.config.original_inference_steps == 50
    with tarfile.open(here / "datasets" / "shards" / "00000.tar") as tar:
        assert tar.getnames() == [f"{number:03}.{kind}" for number in range(3) for kind in ("png", "txt")]
