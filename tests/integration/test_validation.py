"""The pictures of a run: which are drawn, when, and how the contact sheet shows them."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops

from simpletuner.config.load import load
from simpletuner.plan_view import plan_text
from simpletuner.planning import look_ahead
from tests.integration.conftest import Project

PROMPT = "a red picture"
ONE: dict[str, Any] = {"validation_prompt": PROMPT, "max_train_steps": 2, "disable_benchmark": True}


def folders(project: Project) -> dict[str, set[str]]:
    """Returns the names of the pictures in each folder of ``validation``."""
    root = project.output / "validation"
    return {path.name: {p.name for p in path.iterdir()} for path in root.iterdir() if path.is_dir()}


def test_every_prompt_size_and_seed_is_drawn_at_every_interval(project: Project):
    library = project.folder / "prompts.json"
    library.parent.mkdir(parents=True)
    library.write_text(json.dumps({"cat": "A cat, 2 times!", "same": PROMPT}))
    project.train(
        validation_prompt=PROMPT,
        user_prompt_library=str(library),
        validation_resolution="64x64,96x64",
        num_validation_images=2,
        validation_num_inference_steps=1,
        validation_step_interval=2,
        max_train_steps=3,
        disable_benchmark=True,
    )
    found = folders(project)
    assert found.keys() == {"step-000002", "step-000003"}
    names = found["step-000002"]
    assert len(names) == 2 * 2 * 2
    assert sum(name.startswith("a-red-picture-") for name in names) == 4
    assert sum(name.startswith("a-cat-2-times-") for name in names) == 4
    assert {name.rpartition("-")[2] for name in names} == {"42.png", "43.png"}
    assert found["step-000003"] == names
    for name in names:
        with Image.open(project.output / "validation" / "step-000002" / name) as picture:
            assert f"-{picture.width}x{picture.height}-" in name


def test_the_contact_sheet_shows_every_column_in_order(project: Project):
    project.train(validation_prompt=PROMPT, validation_step_interval=1, num_validation_images=2)
    root = project.output / "validation"
    sheet = Image.open(root / "contact_sheet.png")
    columns, rows, cell, gap, label = 4, 2, 64, 6, 18
    assert sheet.size == (columns * (cell + gap) + gap, label + gap + rows * (cell + label + gap))
    shown: list[bytes] = []
    for column, folder in enumerate(("base", "base-few-steps", "step-000001", "step-000002")):
        for row, seed in enumerate((42, 43)):
            (path,) = (root / folder).glob(f"*-{seed}.png")
            left, top = gap + column * (cell + gap), label + row * (cell + label + gap) + label
            there = sheet.crop((left, top, left + cell, top + cell))
            assert ImageChops.difference(there, Image.open(path).convert("RGB")).getbbox() is None
            shown.append(there.tobytes())
    assert len(set(shown)) == columns * rows


def test_pictures_of_steps_that_are_made_again_are_drawn_again(project: Project):
    project.train(**ONE, validation_step_interval=1, checkpoint_step_interval=1)
    (first,), (second,) = ((project.output / "validation" / f"step-00000{n}").glob("*.png") for n in (1, 2))
    before = first.stat().st_mtime_ns, second.read_bytes()
    project.train(resume_from_checkpoint="checkpoint-1", learning_rate=1e-3)
    assert first.stat().st_mtime_ns == before[0]
    assert second.read_bytes() != before[1]


def test_a_shorter_course_leaves_no_picture_of_the_longer_one(project: Project):
    project.train(**ONE | {"max_train_steps": 3}, validation_step_interval=1, checkpoint_step_interval=1)
    project.train(resume_from_checkpoint="checkpoint-1", max_train_steps=2)
    assert folders(project).keys() == {"step-000001", "step-000002"}


def test_a_run_that_begins_shows_nothing_of_another(project: Project):
    """A run that died before its first checkpoint leaves pictures, and the next one may have another model."""
    project.train(validation_prompt=PROMPT, max_train_steps=1)
    old = {path: path.stat().st_mtime_ns for path in (project.output / "validation" / "base").iterdir()}
    (project.output / "checkpoint-1").rename(project.folder / "lost")
    project.train()
    assert {path: path.stat().st_mtime_ns for path in (project.output / "validation" / "base").iterdir()} != old


def test_a_resumed_run_keeps_the_pictures_of_the_base(project: Project):
    project.train(validation_prompt=PROMPT, max_train_steps=1)
    (base,) = (project.output / "validation" / "base").iterdir()
    before = base.stat().st_mtime_ns
    project.train(max_train_steps=2)
    assert base.stat().st_mtime_ns == before


def test_interval_0_draws_at_the_end_only(project: Project):
    project.train(**ONE, validation_step_interval=0)
    assert folders(project).keys() == {"step-000002"}


def test_a_validation_on_startup_draws_the_untrained_student(project: Project):
    project.train(**ONE | {"disable_benchmark": None}, validation_on_startup=True, validation_step_interval=0)
    found = folders(project)
    assert found.keys() == {"base", "base-few-steps", "step-000000", "step-000002"}
    (name,) = found["step-000000"]
    root = project.output / "validation"
    assert (root / "step-000000" / name).read_bytes() == (root / "base-few-steps" / name).read_bytes()


def test_a_disabled_validation_draws_nothing(project: Project):
    project.train(validation_prompt=PROMPT, validation_disable=True, max_train_steps=1)
    assert not (project.output / "validation").exists()


def test_validation_does_not_disturb_training(project: Project, tmp_path: Path):
    """Dropout is the one draw that comes from the global generator, and is off while pictures are drawn."""
    plain = {"distillation_method": None, "distillation_config": None, "lora_dropout": 0.5, "max_train_steps": 3}
    other = project.at(tmp_path / "other")
    project.train(**plain)
    other.train(**ONE | plain, validation_step_interval=1, validation_num_inference_steps=2)
    assert other.rows() == project.rows()


def test_the_decoder_may_be_of_half_precision(project: Project):
    """The published VAE overflows in float16: it is never encoded with, but pipelines widen it to decode."""
    assert project.build().load_vae(torch.float16).dtype is torch.float16


def test_the_base_is_drawn_with_the_prediction_that_the_config_names(project: Project):
    project.train(**ONE | {"max_train_steps": 1, "disable_benchmark": None})
    other = project.at(project.folder.with_name("other"))
    other.train(prediction_type="v_prediction")
    (one,), (two,) = ((place.output / "validation" / "base").glob("*.png") for place in (project, other))
    assert one.read_bytes() != two.read_bytes()


def test_pictures_of_other_settings_keep_their_label_and_the_base_is_drawn_anew(project: Project):
    """As in the way from 8 to 4 steps: the config of a resumed run says another number of steps."""
    few = {"validation_prompt": PROMPT, "validation_step_interval": 1}
    project.train(**few, validation_num_inference_steps=3, max_train_steps=1)
    root = project.output / "validation"

    def picture(folder: str) -> bytes:
        (path,) = (root / folder).glob("*.png")
        return path.read_bytes()

    before = {name: picture(name) for name in ("base", "base-few-steps", "step-000001")}
    project.train(**few, validation_num_inference_steps=2, max_train_steps=2)
    labels = {name: noted["label"] for name, noted in json.loads((root / "columns.json").read_text()).items()}
    assert labels["step-000001"] == "step 1, 3 steps"
    assert labels["step-000002"] == "step 2, 2 steps"
    assert labels["base-few-steps"] == "base, 2 steps"
    assert picture("base") == before["base"]
    assert picture("step-000001") == before["step-000001"]
    assert picture("base-few-steps") != before["base-few-steps"]


def test_several_numbers_of_steps_are_columns_of_the_same_noise(project: Project):
    project.train(**ONE, validation_num_inference_steps="1,4,8")
    found = folders(project)
    assert found.keys() == {"step-000002", "step-000002-1steps", "step-000002-8steps"}
    assert "4 steps, and in 1, 8, guidance off" in plan_text(look_ahead(load(project.folder / "config.json")))
    noted = json.loads((project.output / "validation" / "columns.json").read_text())
    assert [noted[name]["label"] for name in sorted(found)] == ["step 2, 4 steps", "step 2, 1 step", "step 2, 8 steps"]
    root = project.output / "validation"
    drawn = {name: Image.open(next((root / name).glob("*.png"))) for name in found}
    other = project.at(project.folder.parent / "eight")
    other.train(**ONE, validation_num_inference_steps=8)
    alone = Image.open(next((other.output / "validation" / "step-000002").glob("*.png")))
    assert ImageChops.difference(drawn["step-000002-8steps"], alone).getbbox() is None
    assert ImageChops.difference(drawn["step-000002"], alone).getbbox() is not None
    assert "num_inference_steps=4," in (project.output / "README.md").read_text()  # what the method advises
    sheet = Image.open(root / "contact_sheet.png")
    assert sheet.width == 3 * (64 + 6) + 6


def test_a_prompt_of_a_library_may_wish_for_other_settings(project: Project):
    library = project.folder / "prompts.json"
    library.parent.mkdir(parents=True)
    own = {"prompt": "a boat", "seed": 7, "resolution": "96x64", "guidance": 3.0, "negative_prompt": "grey"}
    library.write_text(json.dumps({"plain": "a boat on a lake", "own": own}))
    settings = {**ONE, "validation_prompt": None, "user_prompt_library": str(library)}
    project.train(**settings)
    names = {name.partition("-64x")[0].partition("-96x")[0][:6] for name in folders(project)["step-000002"]}
    assert names == {"a-boat"}
    (path,) = (project.output / "validation" / "step-000002").glob("*-96x64-7.png")
    library.write_text(json.dumps({"own": {**own, "negative_prompt": "blue", "guidance": 9.0}}))
    other = project.at(project.folder.parent / "other")
    other.train(**settings)
    (again,) = (other.output / "validation" / "step-000002").glob("*-96x64-7.png")
    with Image.open(path) as one, Image.open(again) as two:
        assert ImageChops.difference(one, two).getbbox() is not None
