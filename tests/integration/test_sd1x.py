"""SD 1.x and 2.x through whole runs: what they leave, and that a dropped caption is the encoded empty prompt."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.integration.conftest import SETTINGS, Project
from tests.integration.test_result import FRESH, differ, picture
from tests.tiny import tiny_sd1x

ADAPTER = "pytorch_lora_weights.safetensors"
LCM: dict[str, Any] = {"validation_prompt": "a red picture with a circle", "lora_alpha": 10}
SFT: dict[str, Any] = LCM | {
    "distillation_method": None,
    "distillation_config": None,
    "validation_num_inference_steps": 3,
}
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "1.x": (1, "epsilon", LCM),
    "2.x": (2, "v_prediction", LCM | {"mixed_precision": "bf16"}),
    "guided": (1, "epsilon", SFT | {"validation_guidance": 3.0}),
}


def sd1x_project(folder: Path, model: Path, pictures: Path, **changes: Any) -> Project:
    paths = {"pretrained_model_name_or_path": str(model), "output_dir": str(folder / "output")}
    settings = SETTINGS | {"model_family": "sd1x"} | paths | changes
    return Project(folder, settings).use_pictures(pictures, folder / "cache")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, Path]:
    """Returns the output_dir of each run, in which a fresh process has executed the README's code."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, Path] = {}
    for name, (version, prediction_type, changes) in RUNS.items():
        model = tiny_sd1x(folder / f"model {name}", prediction_type, version=version)
        project = sd1x_project(folder / name, model, pictures)
        project.train(**changes)
        found[name] = project.output
    subprocess.run([sys.executable, "-c", FRESH, *map(str, found.values())], check=True, capture_output=True)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_validation_picture_is_the_one_that_the_readme_draws(outputs: dict[str, Path], name: str):
    output = outputs[name]
    trained, base = picture(output, "step-000002"), picture(output, "base-few-steps")
    assert not differ(Image.open(output / "image.png"), trained)
    assert not differ(Image.open(output / "base.png"), base)
    assert differ(trained, base)


@pytest.mark.parametrize("name", RUNS)
def test_the_files_of_an_adapter(outputs: dict[str, Path], name: str):
    output = outputs[name]
    names = {path.name for path in output.iterdir()}
    assert names >= {ADAPTER, "scheduler", "README.md", "simpletuner.json"}
    assert "StableDiffusionPipeline.from_pretrained" in (output / "README.md").read_text()
    state = load_file(output / ADAPTER)
    trained = [key for key, value in state.items() if key.endswith("lora_B.weight") and value.any()]
    assert len(trained) == len(state) // 2 == (79 if name != "guided" else 32)


def test_a_dropped_caption_is_the_encoded_empty_prompt(tmp_path: Path, pictures: Path):
    """Fine-tuning with all captions dropped is fine-tuning on pictures that have none, bit for bit."""
    model = tiny_sd1x(tmp_path / "model")
    silent = shutil.copytree(pictures, tmp_path / "silent")
    for caption in silent.glob("*.txt"):
        caption.unlink()

    def trained(name: str, folder: Path, dropout: float) -> dict[str, torch.Tensor]:
        project = sd1x_project(tmp_path / name, model, folder, caption_dropout_probability=dropout)
        project.datasets[0]["missing_caption"] = "keep"
        project.train(distillation_method=None, distillation_config=None)
        return load_file(project.output / ADAPTER)

    dropped, without, kept = trained("a", pictures, 1.0), trained("b", silent, 0.0), trained("c", pictures, 0.0)
    assert all(torch.equal(value, without[key]) for key, value in dropped.items())
    assert any((value - kept[key]).abs().max() > 1e-4 for key, value in dropped.items())
