"""What every family must do; a new file in simpletuner/families is tested the moment it exists."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from simpletuner import registry
from simpletuner.families._base import LORA_PRESETS, ModelFamily, lora_modules, lora_num_parameters
from simpletuner.families._source import ModelSource
from simpletuner.training.adapters import adapter_state, attach_lora
from tests.tiny import RECIPES

CPU = torch.device("cpu")
SETTINGS = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0}


@pytest.fixture(scope="module", params=registry.names("families"))
def family_and_source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelFamily, ModelSource]:
    assert request.param in RECIPES, f"tests/tiny.py has no recipe for the family {request.param}"
    folder = RECIPES[request.param](tmp_path_factory.mktemp(request.param) / "model")
    source = ModelSource(str(folder))
    return registry.load("families", request.param)().for_model(source), source


def test_facts_are_those_of_the_loaded_network(family_and_source):
    family, source = family_and_source
    facts = family.facts(source)
    loaded = {name: tuple(value.shape) for name, value in family.load(source).state_dict().items()}
    assert facts.shapes == loaded
    assert facts.prediction_type is not None
    assert facts.encoders_here


def test_planned_lora_is_what_peft_makes(family_and_source):
    family, source = family_and_source
    planned = lora_modules(family.facts(source).shapes or {}, family.lora_targets)
    module = family.load(source)
    attach_lora(module, {**SETTINGS, "target_modules": list(family.lora_targets)}, seed=0)
    made = adapter_state(module)
    assert {name.rpartition(".lora_")[0] for name in made} == planned.keys()
    assert sum(value.numel() for value in made.values()) == lora_num_parameters(planned, SETTINGS["r"])
    assert planned


def test_all_linear_layers_are_those_of_the_preset(family_and_source):
    family, source = family_and_source
    modules = family.load(source).named_modules()
    linear = {name for name, module in modules if isinstance(module, torch.nn.Linear)}
    assert linear
    # proj_in and proj_out of older networks are convolutions of 1 x 1 that do the same.
    planned = lora_modules(family.facts(source).shapes or {}, LORA_PRESETS["all-linear"])
    assert linear <= planned.keys()
    assert {name.rpartition(".")[2] for name in planned.keys() - linear} <= {"proj_in", "proj_out"}


def test_features_and_latents_have_the_planned_sizes(family_and_source):
    family, source = family_and_source
    encoders = family.load_encoders(source, CPU, torch.float32, frozenset({"vae", "text"}))
    cond = family.encode_prompt(encoders, ["a red circle"])
    assert sum(value.numel() for value in cond.values()) == family.facts(source).cond_numbers
    mean, std = family.encode_image(encoders, torch.zeros(1, 3, 64, 96))
    assert mean.shape[1:] == family.latent_shape(96, 64)
    assert std is None or std.shape == mean.shape
    numbers = family.facts(source).encoder_numbers
    assert numbers.keys() == {"vae", "text"}
    assert numbers["vae"] == sum(value.numel() for value in encoders.vae.state_dict().values())


def test_a_prompt_of_fewer_tokens_is_planned_for(family_and_source, tmp_path: Path):
    family, source = family_and_source
    copy = shutil.copytree(source.path, tmp_path / "copy")
    for config in copy.rglob("tokenizer_config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 32}))
    shorter = ModelSource(str(copy))
    cond = family.encode_prompt(
        family.load_encoders(shorter, CPU, torch.float32, frozenset({"text"})), ["a red circle"]
    )
    assert sum(value.numel() for value in cond.values()) == family.facts(shorter).cond_numbers
    assert family.facts(shorter).cond_numbers < family.facts(source).cond_numbers


def test_prediction_depends_on_every_input(family_and_source):
    family, source = family_and_source
    module = family.load(source)
    encoders = family.load_encoders(source, CPU, torch.float32, frozenset({"text"}))
    cond = family.encode_prompt(encoders, ["a red circle", "a large blue star"])
    x_t = torch.randn(2, *family.latent_shape(96, 64), generator=torch.Generator().manual_seed(0))
    geometry = torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
    given = {"x_t": x_t, "model_t": torch.tensor([19, 999]), "cond": cond, "geometry": geometry}
    with torch.no_grad():
        base = family.forward(module, **given)
        assert base.shape == x_t.shape
        for key, other in {"x_t": x_t + 1, "model_t": torch.tensor([39, 499])}.items():
            assert (family.forward(module, **{**given, key: other}) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-4
        for key in cond:
            changed = family.forward(module, **{**given, "cond": {**cond, key: cond[key].flip(0)}})
            assert (changed - base).abs().max() > 1e-6, key


def test_unconditional_features_do_not_depend_on_the_caption(family_and_source):
    family, source = family_and_source
    encoders = family.load_encoders(source, CPU, torch.float32, frozenset({"text"}))
    empty = family.encode_prompt(encoders, [""])
    one, two = (family.uncond(family.encode_prompt(encoders, [text, text]), empty) for text in ("a star", "red"))
    assert one.keys() == empty.keys()
    for key, value in one.items():
        assert value.shape == (2, *empty[key].shape[1:])
        assert torch.equal(value, two[key])


def test_stock_pipeline_draws_with_the_features(family_and_source):
    family, source = family_and_source
    from diffusers import LCMScheduler

    encoders = family.load_encoders(source, CPU, torch.float32, frozenset({"vae", "text"}))
    cond, empty = (family.encode_prompt(encoders, [text]) for text in ("a red circle", ""))
    pipeline = family.pipeline(family.load(source), LCMScheduler(), encoders.vae)
    assert type(pipeline).__name__ == family.pipeline_class
    pipeline.set_progress_bar_config(disable=True)

    def picture(cond, **settings):
        generator = torch.Generator().manual_seed(0)
        inputs = family.pipeline_inputs(cond, family.uncond(cond, empty))
        return pipeline(
            **inputs, height=64, width=96, num_inference_steps=2, generator=generator, output_type="np", **settings
        ).images[0]

    plain = picture(cond, guidance_scale=0.0)
    assert plain.shape == (64, 96, 3)
    assert abs(picture(cond, guidance_scale=4.0) - plain).max() > 1e-4
    assert abs(picture(family.encode_prompt(encoders, ["a star"]), guidance_scale=0.0) - plain).max() > 1e-4


@pytest.mark.parametrize("part", ["vae", "text"])
def test_fingerprint_is_of_the_content(family_and_source, tmp_path: Path, part):
    family, source = family_and_source
    copy = shutil.copytree(source.path, tmp_path / "copy")
    before = family.fingerprint(source, part)
    assert family.fingerprint(ModelSource(str(copy)), part) == before
    marks = {"vae": "scaling_factor", "text": "eos_token_id"}
    touched = 0
    for config in copy.rglob("*.json"):
        text = config.read_text()
        if marks[part] in text:
            config.write_text(text + "\n")
            touched += 1
    assert touched
    assert family.fingerprint(ModelSource(str(copy)), part) != before
    other = "text" if part == "vae" else "vae"
    assert family.fingerprint(ModelSource(str(copy)), other) == family.fingerprint(source, other)
