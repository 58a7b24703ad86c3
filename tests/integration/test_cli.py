"""What the command line answers: one plain line for each mistake and status 2; a plan that changes nothing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner import cli
from simpletuner.publishing.result import write_result
from tests.integration.conftest import Project
from tests.tiny import image_folder

PUBLISHED = Path(__file__).parents[1] / "unit" / "config" / "published"


@dataclass
class Said:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        assert "Traceback" not in self.err
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Command = Callable[..., Said]


@pytest.fixture
def simpletuner(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Returns the command: it takes words, as from the command line."""
    for name in ("RANK", "WORLD_SIZE", "TRAINING_NUM_PROCESSES", "ENV"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["simpletuner", *map(str, words)])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as left:
            status = int(left.code or 0)
        return Said(status, *capfd.readouterr())

    return run


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"lora_rnk": 4}, "lora_rnk: unknown key - did you mean 'lora_rank'?"),
    "wrong type": ({"train_batch_size": "two"}, "train_batch_size: "),
    "wrong choice": ({"model_type": "lorra"}, "model_type: "),
    "unknown family": ({"model_family": "sdxxl"}, "model_family: unknown value 'sdxxl' - did you mean 'sdxl'?"),
    "unknown method": (
        {"distillation_method": "lcmm"},
        "distillation_method: unknown value 'lcmm' - did you mean 'lcm'?",
    ),
    "unknown optimizer": ({"optimizer": "adamv"}, "optimizer: unknown value 'adamv' - did you mean 'adamw'?"),
    "unknown method option": (
        {"distillation_config": {"lcm": {"w_maxx": 2}}},
        "distillation_config.w_maxx: unknown option - did you mean 'w_max'?",
    ),
    "missing model": ({"pretrained_model_name_or_path": "./nowhere"}, "pretrained_model_name_or_path: "),
    "no model": ({"pretrained_model_name_or_path": "."}, "pretrained_model_name_or_path: the folder "),
    "missing prompts": ({"user_prompt_library": "nowhere.json"}, "user_prompt_library: there is no file "),
    "no length": ({"max_train_steps": None}, "max_train_steps: required, or num_train_epochs"),
    "too many steps": (
        {"validation_prompt": "a", "validation_num_inference_steps": 51},
        "validation_num_inference_steps: 51 is more than num_ddim_timesteps (50)",
    ),
}


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_config_is_one_line(project: Project, simpletuner: Command, name: str, command: str):
    changes, expected = MISTAKES[name]
    project.write(**changes)
    said = simpletuner(command, "--config", project.folder)
    assert said.status == 2
    assert len(said.errors) == 1
    assert said.errors[0].startswith(f"error: {expected}")


def no_folder(project: Project) -> None:
    project.datasets[0]["instance_data_dir"] = "/nowhere/at/all"


def no_images(project: Project) -> None:
    (project.folder / "empty").mkdir(parents=True)
    project.datasets[0]["instance_data_dir"] = str(project.folder / "empty")


def no_captions(project: Project) -> None:
    Image.new("RGB", (96, 96)).save(image_folder(project.folder / "bare", 0) / "alone.png")
    project.datasets[0]["instance_data_dir"] = str(project.folder / "bare")


def two_text_caches(project: Project) -> None:
    cache = {"type": "local", "dataset_type": "text_embeds", "default": True}
    project.datasets += [cache | {"id": "one"}, cache | {"id": "two"}]


def no_datasets(project: Project) -> None:
    project.datasets.clear()


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_folder, "dataset 'pictures': instance_data_dir: there is no folder '/nowhere/at/all'"),
        (no_images, "dataset 'pictures': instance_data_dir: no image in '"),
        (no_captions, "dataset 'pictures': every image is left out: 1 without caption (such as 'alone.png')"),
        (two_text_caches, "several default text caches: 'one', 'two'"),
        (no_datasets, "there is no enabled image dataset"),
    ],
)
def test_a_mistake_in_the_data_is_one_line(
    project: Project, simpletuner: Command, spoil: Callable[[Project], None], expected: str, command: str
):
    spoil(project)
    project.write()
    said = simpletuner(command, "--config", project.folder)
    assert said.status == 2
    assert len(said.errors) == 1
    assert expected in said.errors[0]


def test_malformed_json_names_the_line_and_the_column(project: Project, simpletuner: Command):
    path = project.write()
    path.write_text('{\n "model_family": "sdxl",\n}')
    said = simpletuner("plan", "--config", path)
    assert (said.status, len(said.errors)) == (2, 1)
    assert said.errors[0].startswith(f"error: {path}:")
    assert ": not valid JSON: a comma before the closing bracket; delete it" in said.errors[0]
    assert said.errors[0].removeprefix(f"error: {path}:").split(":")[0] in ("2", "3")


def test_a_config_that_is_not_there_is_one_line(tmp_path: Path, simpletuner: Command):
    said = simpletuner("train", "--config", tmp_path / "nowhere.json")
    assert (said.status, len(said.errors)) == (2, 1)
    assert said.errors[0].startswith(f"error: config: there is no '{tmp_path}/nowhere.json'")


def test_all_mistakes_are_told_at_once(project: Project, simpletuner: Command):
    project.write(model_family="sdxxl", distillation_method="lcmm", optimizer="adamv")
    said = simpletuner("plan", "--config", project.folder)
    assert said.status == 2
    assert [line.split(":")[1].strip() for line in said.errors] == [
        *("model_family", "distillation_method", "optimizer")
    ]


def test_an_override_is_written_over_the_file(project: Project, simpletuner: Command):
    project.write()
    words = ("--max_train_steps", "7", "--lora_rank=8", "--distillation_config.w_max", "3")
    said = simpletuner("plan", "--config", project.folder, "--json", *words)
    assert said.status == 0
    plan = json.loads(said.out)
    assert (plan["max_steps"], plan["lora"]["r"]) == (7, 8)


def test_many_epochs_are_a_plain_number(project: Project, simpletuner: Command):
    project.write(max_train_steps=10_000)
    said = simpletuner("plan", "--config", project.folder)
    assert "3333 epochs of 3 batches" in said.out


def test_a_word_that_is_no_override_is_one_line(project: Project, simpletuner: Command):
    project.write()
    said = simpletuner("plan", "--config", project.folder, "max_train_steps")
    assert said.status == 2
    assert said.errors == ["error: 'max_train_steps': not understood; write overrides as --key value"]


def test_the_options_of_a_method_that_is_not_chosen_are_left_alone(project: Project, simpletuner: Command):
    """Who takes distillation_method out of a config to compare with plain fine-tuning keeps the rest."""
    project.write(distillation_method=None)
    said = simpletuner("plan", "--config", project.folder)
    assert said.status == 0, said.err
    assert "distillation_config: without effect: distillation_method is not set" in said.out


def test_a_plan_for_programs(project: Project, simpletuner: Command):
    project.write(gradient_accumulation_steps=2, vae_cache_ondemand=True)
    said = simpletuner("plan", "--config", project.folder, "--json")
    assert said.status == 0
    plan = json.loads(said.out)
    assert plan["buckets"] == [
        {"dataset": "pictures", "target": target, "images": 2} for target in ("48x80", "64x64", "80x48")
    ]
    assert (plan["method"], plan["model_type"], plan["processes"]) == ("lcm", "lora", 1)
    assert (plan["effective_batch"], plan["batches_per_epoch"], plan["max_steps"]) == (4, 3, 2)
    assert plan["epochs"] == pytest.approx(4 / 3)
    assert plan["lora"]["num_modules"] == 79
    assert [notice for notice in plan["notices"] if notice.startswith("vae_cache_ondemand: has no effect")]


def test_a_plan_counts_the_processes_that_train_sh_would_start(
    project: Project, simpletuner: Command, monkeypatch: pytest.MonkeyPatch
):
    project.write()
    monkeypatch.setenv("TRAINING_NUM_PROCESSES", "2")
    plan = json.loads(simpletuner("plan", "--config", project.folder, "--json").out)
    assert (plan["processes"], plan["effective_batch"]) == (2, 4)
    monkeypatch.setenv("TRAINING_NUM_PROCESSES", "two")
    said = simpletuner("plan", "--config", project.folder)
    assert (said.status, said.errors) == (2, ["error: num_processes: 'two' must be a whole number, 1 or more"])


def test_the_planned_parameters_are_the_trained_ones(project: Project, simpletuner: Command):
    project.train(max_train_steps=1)
    saved = json.loads((project.output / "checkpoint-1" / "state.json").read_text())["files"]["weights.safetensors"]
    plan = json.loads(simpletuner("plan", "--config", project.folder, "--json").out)
    assert 0 < saved - 4 * plan["lora"]["num_parameters"] < 40_000  # the rest is the header, with 158 names


PLAN = """
import resource, sys
def refuse(event, arguments):
    if event == "socket.connect":
        raise AssertionError(f"the plan asks the network: {arguments}")
sys.addaudithook(refuse)
sys.argv = ["simpletuner", "plan", *sys.argv[1:]]
from simpletuner.cli import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
heavy = {"diffusers", "transformers", "peft", "accelerate"} & sys.modules.keys()
assert not heavy, heavy
print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr)
"""


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_the_published_quickstart_plans_as_it_is_and_leaves_no_trace(tmp_path: Path):
    """Only the folder of images is the reader's own; the model is not here, which is no mistake."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (1344, 768)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a picture")
    for name in ("config.json", "multidatabackend.json"):
        text = (PUBLISHED / name).read_text(encoding="utf8").replace("/path/to/your/dataset", str(pictures))
        (tmp_path / name).write_text(text.replace("/home/user", str(tmp_path)))
    before = tree(tmp_path)
    hub = {"HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    outside = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "WORLD_SIZE", "RANK")}
    command = [sys.executable, "-c", PLAN, "--config", str(tmp_path), "--json"]
    done = subprocess.run(command, env=outside | hub, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == before

    plan = json.loads(done.stdout)
    assert plan["buckets"] == [{"dataset": "your-dataset-name", "target": "1344x768", "images": 3}]
    assert (plan["effective_batch"], plan["max_steps"]) == (4, 10_000)
    assert "stabilityai/stable-diffusion-xl-base-1.0" in "\n".join(plan["notices"])
    assert float(done.stderr.split()[-1]) < 20  # seconds of CPU: 4 where it was written; diffusers alone adds 6


def test_a_plan_of_a_model_that_is_here_leaves_no_trace(project: Project, simpletuner: Command, tmp_path: Path):
    model = shutil.copytree(project.settings["pretrained_model_name_or_path"], tmp_path / "model")
    project.write(pretrained_model_name_or_path=str(model), cache_dir=None)
    before = tree(tmp_path)
    said = simpletuner("plan", "--config", project.folder)
    assert said.status == 0
    assert "LoRA rank 4" in said.out
    assert tree(tmp_path) == before


def test_two_runs_cannot_share_a_folder(project: Project, simpletuner: Command, monkeypatch: pytest.MonkeyPatch):
    """The second is started when the first writes its result: it must hold the folder to its very end."""
    second: list[Said] = []

    def write_while_another_starts(*arguments: Any) -> Any:
        second.append(simpletuner("train", "--config", project.folder))
        return write_result(*arguments)

    monkeypatch.setattr("simpletuner.run.write_result", write_while_another_starts)
    project.train(max_train_steps=1)
    assert second[0].status == 2
    assert len(second[0].errors) == 1
    assert f"output_dir: {project.output} is in use by another run (process {os.getpid()} on " in second[0].errors[0]
    assert (project.output / "pytorch_lora_weights.safetensors").is_file()


def test_the_datasets_are_shown_without_a_model(project: Project, simpletuner: Command, tmp_path: Path):
    project.write(pretrained_model_name_or_path="nobody/nothing")
    said = simpletuner("dataset", "--config", project.folder, "--output", tmp_path / "sheets", "--images", 1)
    assert (said.status, said.errors) == (0, [])
    assert "dataset     pictures: 6 images in 3 buckets" in said.out
    assert len(list((tmp_path / "sheets" / "pictures").glob("*.png"))) == 3
    shutil.rmtree(project.folder)
    project.datasets[0]["minimum_image_size"] = 4096
    project.write()
    said = simpletuner("dataset", "--config", project.folder)
    assert said.status == 2
    assert said.errors == [
        "error: dataset 'pictures': every image is left out: 6 smaller than minimum_image_size 4096 (pixel_area) "
        "(such as '000.png')"
    ]


def test_a_run_that_ends_well_has_status_0(project: Project, simpletuner: Command):
    project.write(max_train_steps=1)
    said = simpletuner("train", "--config", project.folder)
    assert (said.status, said.errors) == (0, [])
    assert "LoRA rank 4" in said.out
