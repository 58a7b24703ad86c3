"""`simpletuner init` and `simpletuner doctor`, as their users meet them."""

import json
import os
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.doctor import doctor_lines
from simpletuner.planning import look_ahead
from simpletuner.starting import PURPOSES, Answers, answers, write
from tests.tiny import tiny_sd1x


def made(folder: Path, wanted: Answers) -> tuple[dict[str, object], list[dict[str, object]], list[str]]:
    said = write(wanted, folder, overwrite=False)
    config = json.loads((folder / "config.json").read_text())
    return config, json.loads((folder / "multidatabackend.json").read_text()), said


@pytest.mark.parametrize("purpose", PURPOSES)
def test_what_is_written_passes_the_plan(purpose: str, tmp_path: Path, tiny_model: Path, pictures: Path):
    config, datasets, _ = made(tmp_path, answers(pictures, str(tiny_model), purpose, 0, tmp_path / "out"))
    plan = look_ahead(load(tmp_path))
    assert plan.method == ("lcm" if purpose.startswith("lcm") else "sft")
    assert (plan.lora is not None) == purpose.endswith("lora")
    assert plan.datasets[0].manifest.rows.num_rows == 6
    assert config["validation_prompt"] == "a picture number 0"
    assert (config["resolution"], datasets[0]["caption_strategy"]) == (0.25, "textfile")


def test_it_takes_what_it_finds(tmp_path: Path):
    """Large pictures without captions, a model of another family, a small GPU."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        Image.new("RGB", (1200, 900)).save(images / f"a_red_car_{index}.png")
    (images / "broken.png").write_bytes(b"no picture")
    wanted = answers(images, "stabilityai/stable-diffusion-xl-base-1.0", "lcm-lora", 12, tmp_path / "out")
    config, datasets, said = made(tmp_path / "xl", wanted)
    assert (config["model_family"], config["resolution"], config["mixed_precision"]) == ("sdxl", 1.0, "bf16")
    assert config["base_model_precision"] == "int8-quanto"
    assert datasets[0]["caption_strategy"] == "filename"
    assert any("most have no text file" in line for line in said)
    base = str(tiny_sd1x(tmp_path / "model"))
    config, _, _ = made(tmp_path / "sd", answers(images, base, "lora", 80, tmp_path / "out"))
    assert (config["model_family"], config["resolution"], config["train_batch_size"]) == ("sd1x", 0.25, 4)
    assert "base_model_precision" not in config


def test_shards_are_found(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "00000.tar").touch()
    _, datasets, _ = made(tmp_path / "to", answers(tmp_path / "data", "x/y-xl", "lcm-lora", 24, tmp_path))
    assert (datasets[0]["type"], datasets[0]["shards"]) == ("webdataset", "**/*.tar")


def test_mistakes_are_said_and_nothing_is_overwritten(tmp_path: Path, pictures: Path):
    with pytest.raises(UserError, match="--for: unknown purpose 'lcm-lorra' - did you mean 'lcm-lora'"):
        answers(pictures, "x/y", "lcm-lorra", 24, tmp_path)
    with pytest.raises(UserError, match="--images: there is no folder"):
        write(answers(tmp_path / "none", "x/y", "lora", 24, tmp_path), tmp_path, overwrite=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--images: no image and no .tar shard in"):
        write(answers(tmp_path / "empty", "x/y", "lora", 24, tmp_path), tmp_path, overwrite=False)
    wanted = answers(pictures, "x/y", "lora", 24, tmp_path)
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match="--to: .*config.json would be overwritten; give another folder, or --force"):
        write(wanted, tmp_path, overwrite=False)
    assert (tmp_path / "config.json").read_text() == "mine"
    write(wanted, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lora"


def test_questions_are_asked_for_what_is_not_given(tmp_path: Path, pictures: Path):
    command = [sys.executable, "-m", "simpletuner", "init", "--to", str(tmp_path / "to"), "--memory", "24"]
    typed = f"{pictures}\n\nlora\n\n"  # the folder, the default base, what for, the default output
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=True, cwd=tmp_path)
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert (config["model_type"], config["output_dir"]) == ("lora", "output/run")
    assert "distillation_method" not in config
    assert done.stdout.rstrip().endswith(f"look at it: simpletuner plan --config {tmp_path / 'to'}")


def test_doctor_names_every_extra_and_no_secret(tmp_path: Path):
    environ = os.environ | {"WANDB_API_KEY": "wandb-secret", "HF_TOKEN": "hf_secret"}
    text = "\n".join(doctor_lines(tmp_path, environ))
    assert "secret" not in text
    named = {line.split()[0] for line in text.partition("extras\n")[2].splitlines()}
    extras = metadata("simpletuner").get_all("Provides-Extra")
    assert extras is not None
    assert named == {*extras} - {"dev"}
    assert "  tensorboard     installed (report_to tensorboard)" in text
    assert "a login is there" in text
    assert "torch           2." in text


def test_doctor_says_what_a_login_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = list(doctor_lines(tmp_path, {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}))
    assert any("HF_HUB_OFFLINE is set: models and datasets must be on this machine" in line for line in lines)
    assert any("WANDB_MODE is offline: nothing is sent" in line for line in lines)
    assert any("no login: report_to wandb needs `wandb login`" in line for line in doctor_lines(tmp_path, {}))
