"""A result on its way to the hub and back, through the real client and a hub on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from PIL import Image, ImageChops

from simpletuner.config.errors import UserError
from simpletuner.publishing.hub import Hub, open_hub
from tests.hub_server import READER, WRITER, HubServer, Repo, hub_server
from tests.integration.conftest import Project

PROMPT = "a red picture with a circle"
SECRET = "s3cr3t-4711"

DRAW = """
import sys, torch
torch.set_num_threads(1)
code = sys.stdin.read().partition("```python")[2].partition("```")[0]
assert "load_lora_weights('ann/few-steps')" in code, code
names = {}
exec(code.replace(*sys.argv[1:3]), names)
names["pipeline"].load_lora_weights("ann/few-steps", subfolder="checkpoint-1", adapter_name="earlier")
assert "earlier" in names["pipeline"].get_list_adapters()["unet"]
assert not any(name.startswith("simpletuner") for name in sys.modules)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def environment(folder: Path, hub: HubServer, token: str | None) -> dict[str, str]:
    outside = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    more = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return outside | more | {"STYLE": SECRET} | ({"HF_TOKEN": token} if token else {})


def train(project: Project, hub: HubServer, token: str | None = WRITER, **changes: Any) -> tuple[int, str]:
    """Returns the status of the run and what it said on stderr."""
    command = [sys.executable, "-m", "simpletuner", "train", "--config", str(project.write(**changes))]
    environ = environment(project.folder, hub, token)
    done = subprocess.run(command, env=environ, cwd=project.folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_result_goes_to_the_hub_and_draws_the_same_picture_by_its_id(project: Project, hub: HubServer):
    status, said = train(
        project,
        hub,
        push_to_hub=True,
        push_checkpoints_to_hub=True,
        hub_model_id="few-steps",
        checkpoint_step_interval=1,
        max_train_steps=3,
        validation_prompt=PROMPT,
        validation_step_interval=0,
        disable_benchmark=True,
        model_card_note="Made in the style of {env:STYLE}.",
    )
    assert status == 0, said
    assert f"uploaded: {hub.url}/ann/few-steps" in said
    repo = hub.repos["ann/few-steps"]
    assert repo.private
    assert repo.commits[-1] == "step 3"
    names = set(repo.files)
    weights = {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"}
    (picture,) = (name for name in names if name.startswith("validation/step-000003/"))
    result = {*weights, "README.md", "simpletuner.json", "validation/contact_sheet.png", picture}
    # The second one is left out where the first is still on its way.
    first, second = ({f"checkpoint-{step}/{name}" for name in weights} for step in (1, 2))
    assert names in (result | first, result | first | second)
    assert not list(project.output.glob(".upload-*"))

    everything = b"".join(repo.files.values())
    assert SECRET.encode() not in everything
    assert str(project.folder).encode() not in everything
    card = repo.files["README.md"].decode()
    assert "Made in the style of {env:STYLE}." in card
    assert SECRET in (project.output / "README.md").read_text()
    widget = yaml.safe_load(card.split("---")[1])["widget"]
    assert widget == [{"text": PROMPT, "output": {"url": picture}}]
    assert (
        json.loads(repo.files["simpletuner.json"])["config"]["model_card_note"] == "Made in the style of {env:STYLE}."
    )

    # The base is a folder of this machine, of which the card says the last name only.
    base = project.settings["pretrained_model_name_or_path"]
    command = [sys.executable, "-c", DRAW, repr(Path(base).name), repr(base)]
    environ = environment(project.folder / "elsewhere", hub, WRITER)
    elsewhere = project.folder / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(command, env=environ, cwd=elsewhere, input=card, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = Image.open(elsewhere / "image.png").convert("RGB")
    own = Image.open(project.output / picture).convert("RGB")
    assert max(high for _, high in ImageChops.difference(drawn, own).getextrema()) <= 1

    words = ["sample", "ann/few-steps", "--base", base, "--prompt", PROMPT]
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", *words], env=environ, cwd=elsewhere, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (sampled,) = (elsewhere / "samples" / "seed-42").glob("*.png")
    again = Image.open(sampled).convert("RGB")
    assert max(high for _, high in ImageChops.difference(again, own).getextrema()) <= 1


@pytest.fixture
def at_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Logs this process in at the hub, which its client takes for the real one."""
    here = {"ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    for name, value in {**here, "HF_TOKEN_PATH": str(tmp_path / "token")}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return monkeypatch


def test_what_could_not_be_uploaded_is_said_at_the_end_and_goes_up_with_the_same_command(
    project: Project, hub: HubServer, at_hub: pytest.MonkeyPatch
):
    hub.failing["/commit/"] = [403]
    changes = {"push_to_hub": True, "hub_model_id": "few-steps", "model_card_private": False, "max_train_steps": 1}
    with pytest.raises(UserError) as caught:
        project.train(**changes)
    assert caught.value.lines[0].startswith(f"push_to_hub: step 1: not uploaded to {hub.url}/ann/few-steps (403")
    assert f"the weights are in {project.output}, and the same command uploads them" in caught.value.lines[1]
    assert (project.output / "pytorch_lora_weights.safetensors").is_file()
    assert project.train().step == 1
    assert "pytorch_lora_weights.safetensors" in hub.repos["ann/few-steps"].files
    assert hub.repos["ann/few-steps"].commits == ["step 1"]
    with pytest.raises(UserError, match="is public already"):
        project.train(model_card_private=True)


@pytest.mark.parametrize(
    ("token", "name", "expected"),
    [
        (None, "few-steps", "nobody is logged in at the hub: run `hf auth login`"),
        (READER, "few-steps", "the hub would not take the result (403"),
        (READER, "there-already", "the hub would not take the result (403"),
        (WRITER, "somebody-else/few-steps", "the hub would not take the result (403"),
        (WRITER, "no such name", "the hub would not take the result (Repo id must"),
    ],
)
def test_who_may_not_upload_hears_of_it_before_anything_is_cached(
    project: Project,
    hub: HubServer,
    at_hub: pytest.MonkeyPatch,
    tmp_path: Path,
    token: str | None,
    name: str,
    expected: str,
):
    hub.repos["ann/there-already"] = Repo(private=True)
    if token is None:
        at_hub.delenv("HF_TOKEN")
    else:
        at_hub.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="push_to_hub: false") as caught:
        project.train(push_to_hub=True, hub_model_id=name, cache_dir=str(tmp_path / "own-cache"))
    (line,) = caught.value.lines
    assert expected in line
    assert not list((tmp_path / "own-cache").rglob("*.safetensors"))
    assert not hub.requests or "GET /api/whoami-v2" in hub.requests


def test_a_hub_that_does_not_answer_is_one_line(project: Project, at_hub: pytest.MonkeyPatch):
    at_hub.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub would not take the result \(.*refused"):
        project.train(push_to_hub=True)


def test_a_passing_failure_is_tried_again(hub: HubServer, at_hub: pytest.MonkeyPatch):
    """The client itself tries most requests again, but not the one that has the card looked at."""
    hub.repos["ann/few-steps"] = repo = Repo(private=True)
    hub.failing["validate-yaml"] = [503, 503]
    slept: list[float] = []
    uploads = Hub(huggingface_hub.HfApi(), "ann/few-steps", {}, sleep=slept.append)
    card = b"---\npipeline_tag: text-to-image\ntags: []\n---\n"
    assert uploads.upload({"README.md": card}, "a card")
    assert (slept, repo.files) == ([5, 30], {"README.md": card})
    hub.failing["validate-yaml"] = [503] * 4
    assert not uploads.upload({"README.md": card}, "again")
    assert slept == [5, 30, 5, 30, 120]
    assert uploads.failures[0].startswith("push_to_hub: again: not uploaded to http")


def test_a_config_does_not_say_where_it_was_loaded_from(hub: HubServer, at_hub: pytest.MonkeyPatch, tmp_path: Path):
    hub.repos["ann/few-steps"] = repo = Repo(private=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "_name_or_path": f"/home/{SECRET}/unet"}))
    assert Hub(huggingface_hub.HfApi(), "ann/few-steps", {}).upload({"unet/config.json": path}, "a config")
    assert json.loads(repo.files["unet/config.json"]) == {"_class_name": "UNet2DConditionModel"}


def test_the_bases_license_is_the_cards(hub: HubServer, at_hub: pytest.MonkeyPatch):
    hub.repos["ann/base"] = Repo(private=False, card={"license": "openrail++", "license_link": "there", "tags": ["x"]})
    publish = SimpleNamespace(hub_model_id=None, model_card_private=True)

    def opened(base: str) -> Hub:
        run = SimpleNamespace(output_dir=Path("somewhere/few-steps"))
        plan: Any = SimpleNamespace(config=SimpleNamespace(publish=publish, run=run), source=SimpleNamespace(path=base))
        return open_hub(plan)

    assert opened("ann/base").licence == {"license": "openrail++", "license_link": "there"}
    assert opened("ann/missing").licence == {}
    assert opened("/a/folder").repo_id == "ann/few-steps"
