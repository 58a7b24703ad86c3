"""Every family with every method, as adapter and as whole model: what all combinations must keep.

A new file in families/ (with its recipe in tests/tiny.py) or distillers/ is run here the moment it exists.
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from simpletuner import registry
from simpletuner import run as way
from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.plan import Plan
from simpletuner.planning import look_ahead
from simpletuner.training.adapters import adapter_state, trainable_parameters
from simpletuner.training.build import Run, build
from simpletuner.training.sampling import student_settings
from tests.integration.conftest import SETTINGS, Project
from tests.tiny import RECIPES


@pytest.fixture(scope="module", params=registry.names("families"))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Project:
    """Returns a project on a tiny model of the family, whose caches its runs share."""
    name: str = request.param
    assert name in RECIPES, f"tests/tiny.py has no recipe for the family {name}"
    folder = tmp_path_factory.mktemp(name)
    model = RECIPES[name](folder / "model")
    settings = SETTINGS | {"model_family": name, "pretrained_model_name_or_path": str(model)}
    return Project(folder, settings).use_pictures(pictures, folder / "cache")


@dataclass
class Built:
    """What a run was built of, and the weights that it began with."""

    plan: Plan
    run: Run
    start: dict[str, Tensor]


def train(project: Project, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Built:
    """Runs a project on the way that users go."""
    found: list[Built] = []

    def recording(plan: Plan, *rest: Any) -> Run:
        run = build(plan, *rest)
        start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(run.module).items()}
        found.append(Built(plan, run, start))
        return run

    monkeypatch.setattr(way, "build", recording)
    project.train(**changes)
    return found[0]


@pytest.mark.parametrize("model_type", ["lora", "full"])
@pytest.mark.parametrize("method", registry.names("distillers"))
def test_a_combination(
    family: Project, method: str, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = family.at(tmp_path)
    changes = {"distillation_method": method, "distillation_config": {}, "model_type": model_type}
    if lines := refusal(project, **changes):
        assert all(line.startswith(("distillation_method: ", "model_type: ")) for line in lines), lines
        pytest.skip(f"refused: {lines}")
    # Weight decay would move weights that get no gradient.
    whole = model_type == "full" or None
    built = train(project, monkeypatch, **changes, export_pipeline=whole, learning_rate=1e-3, adam_weight_decay=0.0)
    losses = [row["loss"] for row in project.rows()]
    assert len(losses) == 2
    assert all(isinstance(loss, float) and math.isfinite(loss) and loss > 0 for loss in losses)
    assert_the_student_moved_and_the_base_did_not(built)
    pipeline = stock_pipeline(built, project.output)
    picture = draw(pipeline, built)
    assert picture.shape == (1, 64, 64, 3)
    assert bool(torch.isfinite(picture).all())
    assert float(picture.std()) > 0
    if whole:
        alone = diffusers.DiffusionPipeline.from_pretrained(project.output / "pipeline")
        assert torch.equal(draw(alone, built), picture)
        assert alone.scheduler.config["_class_name"] == pipeline.scheduler.config["_class_name"]


def test_what_a_family_lacks_refuses_the_combination(
    family: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[registry.load("families", family.settings["model_family"]).__module__]
    monkeypatch.setattr(module, "PLUGIN", partial(module.PLUGIN, provides=frozenset[str]()))
    for model_type, lack in (("lora", "lora"), ("full", "guidance_embedding")):
        changes = {"distillation_method": "pcm", "distillation_config": {}, "model_type": model_type}
        assert refusal(family.at(tmp_path), **changes) == [
            "distillation_method: pcm needs a family with uncond",
            f"model_type: {model_type} by pcm needs a family with {lack}",
        ]


def refusal(project: Project, **changes: Any) -> list[str]:
    """Returns the lines by which a config is refused, none when it is not."""
    try:
        look_ahead(load(project.write(**changes)))
    except UserError as error:
        return list(error.lines)
    return []


def assert_the_student_moved_and_the_base_did_not(built: Built) -> None:
    plan, run = built.plan, built.run
    trained = trainable_parameters(run.module)
    still = [name for name, parameter in trained.items() if torch.equal(parameter, built.start[name])]
    assert trained
    assert not still
    published = plan.family.load(plan.source).state_dict()
    networks = [run.module] if run.has_adapter else [run.teacher] if run.teacher is not run.module else []
    assert bool(networks) == (run.has_adapter or "teacher" in plan.distiller.roles("full"))
    for network in networks:
        frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
        assert len(frozen) == len(published)
        for name, parameter in frozen.items():
            assert torch.equal(parameter, published[name.replace(".base_layer", "")]), name


def stock_pipeline(built: Built, output: Path) -> Any:
    """Returns diffusers' own pipeline with what the run left, which loads whole and as it was trained."""
    run, classes = built.run, vars(diffusers)
    slot = slot_of(run)
    parts: dict[str, Any] = {}
    if not run.has_adapter:
        parts[slot], report = type(run.module).from_pretrained(output, output_loading_info=True)
        assert not any(report.values()), report
    pipeline = classes[run.family.pipeline_class].from_pretrained(run.source.path, use_safetensors=True, **parts)
    if run.has_adapter:
        pipeline.load_lora_weights(output, adapter_name="loaded")
        loaded = get_peft_model_state_dict(getattr(pipeline, slot), adapter_name="loaded")
        ours = adapter_state(run.module)
    else:
        loaded, ours = getattr(pipeline, slot).state_dict(), run.module.state_dict()
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in loaded.items())
    name = json.loads((output / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipeline.scheduler = classes[name].from_pretrained(output, subfolder="scheduler")
    return pipeline


def slot_of(run: Run) -> str:
    """Returns the name that the network has in its pipeline."""
    scheduler, _ = run.distiller.sampling(run.family.facts(run.source).scheduler_config or {})
    components = run.family.pipeline(run.module, scheduler, None).components
    return next(name for name, part in components.items() if part is run.module)


def draw(pipeline: Any, built: Built) -> Tensor:
    """Returns [1, H, W, 3] a picture with the settings that the run advises."""
    settings = student_settings(built.plan, built.run)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a picture",
        width=64,
        height=64,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **settings.options,
    ).images
    return torch.from_numpy(picture)
