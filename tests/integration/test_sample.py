"""`simpletuner sample`: a run's own pictures again, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from typer.testing import CliRunner

from simpletuner.cli import app
from simpletuner.config.errors import UserError
from simpletuner.sample import Wishes, sample
from tests.integration.conftest import Project

PROMPT = "a red picture"


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_picture_of_a_run_is_that_of_its_last_validation(project: Project, tmp_path: Path, model_type: str):
    changes = {"lora_rank": None} if model_type == "full" else {}
    project.train(
        model_type=model_type, validation_prompt=PROMPT, mixed_precision="no", disable_benchmark=True, **changes
    )
    (drawn,) = (project.output / "validation" / "step-000002").glob("*.png")
    lines = list(sample(project.output, Wishes([PROMPT, "a boat"], [42, 43]), tmp_path))
    assert lines[0].startswith("LCMScheduler, 64x64, num_inference_steps 4, guidance_scale ")
    (again,) = (tmp_path / "seed-42").glob("a-red-picture*.png")
    with Image.open(drawn) as one, Image.open(again) as two:
        assert ImageChops.difference(one, two).getbbox() is None
    assert len(list(tmp_path.glob("seed-*/*.png"))) == 4
    assert (tmp_path / "contact_sheet.png").is_file()


def test_wishes_are_heard_and_those_that_cannot_be_are_refused(project: Project, tmp_path: Path):
    with pytest.raises(UserError, match="holds no finished run"):
        list(sample(project.output, Wishes([PROMPT], [1]), tmp_path))
    project.train(validation_disable=True)
    command = ["sample", str(project.output), "--prompt", PROMPT, "--size", "96x64", "--steps", "2", "--guidance", "2"]
    done = CliRunner().invoke(app, [*command, "--num-images", "2", "--seed", "7", "--negative", "grey"])
    assert done.exit_code == 0, done.output
    assert "96x64, num_inference_steps 2, guidance_scale 2.0, negative_prompt grey" in done.output
    pictures = sorted((project.output / "samples").glob("seed-*/*.png"))
    assert [path.parent.name for path in pictures] == ["seed-7", "seed-8"]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (96, 64)
    for wrong, said in (
        (Wishes([PROMPT], [1], num_inference_steps=51), "--steps: 51 is above the 50 steps of the grid"),
        (Wishes([PROMPT], [1], size="70x64"), "--size: '70x64' has an edge that is no multiple of 8"),
        (Wishes([PROMPT], [1], negative_prompt="grey"), "--negative: it needs a guidance above 1"),
    ):
        with pytest.raises(UserError, match=said):
            list(sample(project.output, wrong, tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"config": {}, "loading": {}, "sampling": {}}',
        '{"config": {}, "loading": {"dtype": "load"}, "sampling": {}}',
    ],
)
def test_what_no_run_wrote_is_one_line(tmp_path: Path, content: str):
    (tmp_path / "simpletuner.json").write_text(content)
    with pytest.raises(
        UserError, match="output_dir: '.*simpletuner.json' is (not what a run writes of itself|no JSON)"
    ):
        list(sample(tmp_path, Wishes([PROMPT], [1]), tmp_path))


def test_a_scheduler_that_is_none_is_one_line(project: Project, tmp_path: Path):
    project.train(validation_disable=True)
    config = project.output / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "DiffusionPipeline"}))
    with pytest.raises(UserError, match="names the scheduler 'DiffusionPipeline', which diffusers has not"):
        list(sample(project.output, Wishes([PROMPT], [1]), tmp_path))


def drawn_by(project: Project, wishes: Wishes, folder: Path) -> Image.Image:
    list(sample(project.output, wishes, folder))
    (path,) = (folder / f"seed-{wishes.seeds[0]}").glob("*.png")
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_a_picture_can_be_begun_from_another(project: Project, tmp_path: Path):
    project.train(validation_disable=True)
    start = tmp_path / "start.png"
    Image.new("RGB", (200, 100), (250, 20, 20)).save(start)
    plain = drawn_by(project, Wishes([PROMPT], [1]), tmp_path / "plain")
    little, much = (
        drawn_by(project, Wishes([PROMPT], [1], image=start, strength=strength), tmp_path / str(strength))
        for strength in (0.3, 0.9)
    )
    assert little.size == much.size == plain.size == (64, 64)
    assert len({picture.tobytes() for picture in (plain, little, much)}) == 3
    with pytest.raises(UserError, match="--strength: 0.1 of 4 steps is none; raise it to 0.25 or more, or --steps"):
        list(sample(project.output, Wishes([PROMPT], [1], image=start, strength=0.1), tmp_path))
    start.write_bytes(b"no picture")
    with pytest.raises(UserError, match="--image: '.*start.png' cannot be read as a picture"):
        list(sample(project.output, Wishes([PROMPT], [1], image=start), tmp_path))


def test_a_controlnet_holds_the_picture_to_another(project: Project, tiny_model: Path, tmp_path: Path):
    from diffusers import ControlNetModel, UNet2DConditionModel

    project.train(validation_disable=True)
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    network = ControlNetModel.from_unet(unet)
    network.save_pretrained(tmp_path / "says-nothing")  # its last layers begin as zeros
    with torch.no_grad():
        for block in network.controlnet_down_blocks:
            block.weight.normal_()
    network.save_pretrained(tmp_path / "says-something")
    control = tmp_path / "control.png"
    Image.new("RGB", (64, 64), (0, 255, 0)).save(control)

    def held(name: str, **further: object) -> Image.Image:
        wishes = Wishes([PROMPT], [1], controlnet=str(tmp_path / name), control_image=control, **further)
        return drawn_by(project, wishes, tmp_path / "drawn" / f"{name}{len(further)}")

    plain = drawn_by(project, Wishes([PROMPT], [1]), tmp_path / "plain")
    assert ImageChops.difference(held("says-nothing"), plain).getbbox() is None
    assert ImageChops.difference(held("says-something"), plain).getbbox() is not None
    assert held("says-something", image=control).size == (64, 64)
    with pytest.raises(UserError, match="a ControlNet needs both"):
        list(sample(project.output, Wishes([PROMPT], [1], controlnet="x"), tmp_path))
    with pytest.raises(UserError, match="--controlnet: '.*nothing-there' cannot be loaded"):
        held("nothing-there")
