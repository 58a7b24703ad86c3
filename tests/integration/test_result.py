"""What a run leaves behind, and that a program which knows nothing of us draws the run's own pictures with it."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops
from safetensors import safe_open

from tests.integration.conftest import SETTINGS, Project

PROMPT = "a red picture with a circle"
LCM: dict[str, Any] = {
    "validation_prompt": PROMPT,
    "lora_alpha": 10,
    "max_train_steps": 2,
    "disable_benchmark": True,  # thirty steps of a picture, which three runs need not draw again and again
}
WITH_BASE = {"disable_benchmark": False}
SFT: dict[str, Any] = LCM | {
    "distillation_method": None,
    "distillation_config": None,
    "validation_num_inference_steps": 3,
}
FULL: dict[str, Any] = SFT | {"model_type": "full", "lora_alpha": None, "learning_rate": 1e-3}
DISTILLED: dict[str, Any] = LCM | {"model_type": "full", "lora_alpha": None, "learning_rate": 1e-3}
WHOLE = {"export_pipeline": True, "validation_guidance": 5.0}  # what an SDXL pipeline is drawn with unless it is told
RUNS: dict[str, dict[str, Any]] = {
    "float32": LCM | WITH_BASE,
    "bf16": LCM | {"mixed_precision": "bf16"},
    "other-grid": LCM | {"distillation_config": {"num_ddim_timesteps": 40, "timestep_scaling_factor": 8.0}},
    "phased": LCM | {"distillation_method": "pcm", "distillation_config": {"num_phases": 2, "solver": "dpm2s"}},
    "random": LCM | {"distillation_method": "tcd", "distillation_config": {"eta": 0.7}},
    **({"averaged-by-optimizer": LCM | {"optimizer": "adamw_schedulefree"}} if find_spec("schedulefree") else {}),
    "guided": SFT | {"validation_guidance": 3.0, "validation_negative_prompt": "blurry"},
    "guided-bf16": SFT | {"mixed_precision": "bf16", "validation_guidance": 3.0, "validation_guidance_rescale": 0.5},
    "guided-by-nothing": SFT | WITH_BASE | {"validation_guidance": 3.0},
    "full": FULL | WITH_BASE,
    "full-bf16": FULL | {"mixed_precision": "bf16", "optimizer": "adamw_bf16"},
    "full-autocast": FULL | {"mixed_precision": "bf16"},
    "distilled-full": DISTILLED,
    "distilled-full-bf16": DISTILLED | WHOLE | {"mixed_precision": "bf16", "optimizer": "adamw_bf16"},
    "distilled-full-random": DISTILLED | {"distillation_method": "tcd", "distillation_config": {}},
    "distilled-average": DISTILLED | WHOLE | {"export_weights": "ema"},
}

FRESH = """
import os, sys
import safetensors.torch, torch
torch.set_num_threads(1)
load_file = safetensors.torch.load_file
def load_copies(path, *args, **kwargs):  # MKL rounds in another way where memory is not aligned, as in a mapped file
    tensors = load_file(path, *args, **kwargs)
    ours = str(path).startswith(os.getcwd())
    return {name: value.clone() for name, value in tensors.items()} if ours else tensors
safetensors.torch.load_file = load_copies
for folder in sys.argv[1:]:
    os.chdir(folder)
    code = open("README.md").read().partition("```python")[2].partition("```")[0]
    exec(code, {})
    if "load_lora_weights" in code:
        without = [line for line in code.splitlines() if "load_lora_weights" not in line]
        exec("\\n".join(without).replace("image.png", "base.png"), {})
assert not any(name.startswith("simpletuner") for name in sys.modules)
"""


GOING_ON = """
import os, sys
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
torch.set_num_threads(1)
os.chdir(sys.argv[1])
codes = [part.partition("```")[0] for part in open("README.md").read().split("```python")[1:]]
names = {}
exec(codes[0], names)
plain = names["image"]
unet = UNet2DConditionModel.from_pretrained(sys.argv[2], subfolder="unet")
network = ControlNetModel.from_unet(unet)
torch.nn.init.normal_(network.controlnet_down_blocks[0].weight)
network.save_pretrained("controlnet")
Image.new("RGB", (90, 90), "red").save("photo.png")
Image.new("RGB", (90, 90), "green").save("edges.png")
os.symlink(os.path.abspath(sys.argv[3]), "style.safetensors")
for number, code in enumerate(codes[1:]):
    exec(code, names)
    assert names["image"].size == (64, 64)
    assert names["image"].tobytes() != plain.tobytes(), code
    exec(codes[0].partition("image = ")[2].join(["image = ", ""]), names)
    assert names["image"].tobytes() == plain.tobytes(), code
print(len(codes))
assert not any(name.startswith("simpletuner") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def outputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pictures: Path, shared_cache: Path
) -> dict[str, Path]:
    """Returns the output_dir of each run, in which a fresh process has executed the README's code."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, Path] = {}
    for name, changes in RUNS.items():
        paths = {"pretrained_model_name_or_path": str(tiny_model), "output_dir": str(folder / name / "output")}
        project = Project(folder / name, SETTINGS | paths).use_pictures(pictures, shared_cache)
        project.train(**changes)
        found[name] = project.output
    subprocess.run([sys.executable, "-c", FRESH, *map(str, found.values())], check=True, capture_output=True)
    return found


def picture(output: Path, column: str) -> Image.Image:
    (path,) = (output / "validation" / column).glob("*.png")
    return Image.open(path).convert("RGB")


def differ(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is not None


@pytest.mark.parametrize("name", RUNS)
def test_the_validation_picture_is_the_one_that_the_readme_draws(outputs: dict[str, Path], name: str):
    output = outputs[name]
    drawn = Image.open(output / "image.png")
    assert drawn.size == (64, 64)
    column = "step-000002-target" if name == "distilled-average" else "step-000002"
    assert not differ(drawn, picture(output, column))


@pytest.mark.parametrize(("name", "num_programs"), [("float32", 4), ("distilled-full", 3), ("guided", 4)])
def test_the_readmes_further_programs_draw_other_pictures_and_leave_the_pipeline_as_it_was(
    outputs: dict[str, Path], tiny_model: Path, tmp_path: Path, name: str, num_programs: int
):
    folder = shutil.copytree(outputs[name], tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint*"))
    style = outputs["random"] / "pytorch_lora_weights.safetensors"
    command = [sys.executable, "-c", GOING_ON, str(folder), str(tiny_model), str(style)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(num_programs)


ADAPTERS = [name for name, changes in RUNS.items() if changes.get("model_type") != "full"]
BASES = [name for name, changes in RUNS.items() if not changes["disable_benchmark"]]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_validation_picture_is_not_the_one_drawn_without_the_adapter(outputs: dict[str, Path], name: str):
    output = outputs[name]
    assert differ(picture(output, "step-000002"), Image.open(output / "base.png"))


@pytest.mark.parametrize("name", BASES)
def test_the_validation_picture_is_not_the_bases(outputs: dict[str, Path], name: str):
    output = outputs[name]
    assert differ(picture(output, "step-000002"), picture(output, "base-few-steps"))
    assert differ(picture(output, "step-000002"), picture(output, "base"))


@pytest.mark.parametrize("name", sorted({*ADAPTERS} & {*BASES}))
def test_the_base_picture_is_the_one_drawn_without_the_adapter(outputs: dict[str, Path], name: str):
    output = outputs[name]
    assert not differ(Image.open(output / "base.png"), picture(output, "base-few-steps"))


def test_noise_of_sampling_that_the_method_advises_is_in_the_call(outputs: dict[str, Path]):
    assert "num_inference_steps=4, guidance_scale=0.0, eta=0.7," in (outputs["random"] / "README.md").read_text()
    assert "eta" not in (outputs["float32"] / "README.md").read_text().partition("```python")[2].partition("```")[0]


def test_a_negative_prompt_changes_the_picture(outputs: dict[str, Path]):
    """Else the equality above would hold for two programs that both ignore it."""
    assert differ(Image.open(outputs["guided"] / "base.png"), Image.open(outputs["guided-by-nothing"] / "base.png"))


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ({"caption_strategy": "instanceprompt", "instance_prompt": "a sks dog"}, "a sks dog"),
        ({"instance_prompt": "a sks dog", "prepend_instance_prompt": True}, "a sks dog"),
        ({"instance_prompt": "a sks dog"}, None),  # of which the captions make no use
    ],
)
def test_the_card_says_the_words_that_call_what_was_learned(project: Project, entry: dict[str, Any], prompt: Any):
    project.datasets[0] |= entry
    project.train(max_train_steps=1, validation_disable=True)
    card = (project.output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]).get("instance_prompt") == prompt


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_the_files_of_an_adapter(outputs: dict[str, Path], name: str):
    output = outputs[name]
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")} - {"image.png", "base.png"}
    assert names == {
        *("pytorch_lora_weights.safetensors", "scheduler", "README.md", "simpletuner.json"),
        *("checkpoint-2", "metrics.jsonl", "validation", "report.html"),
    }
    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  (it is no dict)
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 10)
    assert dtypes == {torch.float32}  # also over a bf16 network


def test_the_files_of_a_whole_model(outputs: dict[str, Path]):
    output = outputs["full-bf16"]
    with safe_open(output / "diffusion_pytorch_model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  (it is no dict)
    assert dtypes == {torch.bfloat16}
    assert not (output / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "dtype"), [("distilled-full-bf16", torch.bfloat16), ("distilled-average", torch.float32)]
)
def test_the_pipeline_draws_alone_with_nothing_said_but_the_steps(
    outputs: dict[str, Path], name: str, dtype: torch.dtype
):
    pipeline = DiffusionPipeline.from_pretrained(outputs[name] / "pipeline", torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"width": 64, "height": 64}  # else the model's own
    drawn = pipeline(PROMPT, num_inference_steps=4, generator=torch.Generator().manual_seed(42), **sizes).images[0]
    expected = Image.open(outputs[name] / "image.png").convert("RGB")
    assert max(high for _, high in ImageChops.difference(drawn, expected).getextrema()) <= 1
    plain = DiffusionPipeline.from_pretrained(outputs[name] / "pipeline")
    plain.set_progress_bar_config(disable=True)
    assert differ(plain(PROMPT, num_inference_steps=4, **sizes).images[0], Image.new("RGB", (64, 64)))


def test_the_scheduler_is_the_methods(outputs: dict[str, Path]):
    def config(name: str) -> dict[str, Any]:
        return json.loads((outputs[name] / "scheduler" / "scheduler_config.json").read_text())

    assert config("float32")["_class_name"] == "LCMScheduler"
    assert (config("float32")["original_inference_steps"], config("float32")["timestep_scaling"]) == (50, 10.0)
    assert (config("other-grid")["original_inference_steps"], config("other-grid")["timestep_scaling"]) == (40, 8.0)
    assert config("guided")["_class_name"] == "EulerDiscreteScheduler"


def test_the_resolved_config_is_kept(outputs: dict[str, Path]):
    document = json.loads((outputs["bf16"] / "simpletuner.json").read_text())
    assert document["step"] == 2
    assert document["config"]["run"]["mixed_precision"] == "bf16"
    assert document["config"]["lora"]["lora_alpha"] == 10
    assert document["versions"]["torch"] == torch.__version__


def test_the_card_says_what_was_trained(outputs: dict[str, Path]):
    card = (outputs["float32"] / "README.md").read_text()
    for row in ("| method | lcm |", "| steps | 2 of 2 samples |", "| adapter | LoRA rank 4, alpha 10 |"):
        assert row in card
    assert re.search(r"^base_model:", card, re.MULTILINE) is None  # a path of this machine means nothing to the hub
