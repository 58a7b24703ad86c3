"""Runs on a quantized base, convolutions adapted: they learn, resume, and leave a file for the base as published."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import get_peft_model_state_dict
from torch import Tensor

from simpletuner.config.errors import UserError
from simpletuner.data.identity import Encoding
from simpletuner.denoiser import adapters_off
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.quantization import PackedConv2d, PackedLinear, quantize
from simpletuner.training import checkpoint
from simpletuner.training.adapters import adapter_state
from tests.integration.conftest import Project
from tests.integration.test_lora_round_trip import PUBLISHED
from tests.unit.data.support import text_cache

STEPS = 3
CHANGES: dict[str, Any] = {
    "base_model_precision": "int8-quanto",
    "text_encoder_1_precision": "int8-quanto",
    "peft_lora_target_modules": list(PUBLISHED),
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "max_train_steps": STEPS,
    "checkpoint_step_interval": 1,
    "validation_prompt": "a picture",
    "disable_benchmark": True,
}


@pytest.fixture(scope="module")
def runs() -> list[Project]:
    """Returns a place for the run that most tests look at."""
    return []


@pytest.fixture
def trained(runs: list[Project], project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    if not runs:
        runs.append(project.at(tmp_path_factory.mktemp("quantized")))
        runs[0].train(**CHANGES)
    return runs[0]


@torch.no_grad()
def output(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    cond = {"prompt_embeds": torch.randn(2, 77, 96, generator=generator), "pooled_prompt_embeds": torch.ones(2, 64)}
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    return SDXL().forward(unet, x_t, torch.tensor([5, 700]), cond, torch.full((2, 6), 64.0)).float()


def near(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_it_learns(trained: Project) -> None:
    rows = trained.rows()
    assert len(rows) == STEPS
    assert all(0 < row["grad_norm"] < 100 for row in rows)
    assert len({row["loss"] for row in rows}) == STEPS
    weights = checkpoint.load(trained.output / f"checkpoint-{STEPS}").tensors["weights"]
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)  # they start at zero
    (picture,) = (trained.output / "validation" / f"step-{STEPS:06d}").glob("*.png")
    assert picture.stat().st_size > 0


def test_a_resumed_run_is_the_straight_run_and_its_checkpoint_holds_the_adapter_alone(
    trained: Project, tmp_path: Path
) -> None:
    resumed = trained.at(tmp_path)
    resumed.train(max_train_steps=1)
    resumed.train(max_train_steps=STEPS)
    one, two = (checkpoint.load(p.output / f"checkpoint-{STEPS}").tensors for p in (trained, resumed))
    assert all(".lora_" in name for name in one["weights"])
    for group, tensors in one.items():
        assert all(torch.equal(value, two[group][name]) for name, value in tensors.items())


def test_stock_diffusers_loads_the_adapter_onto_the_base_as_it_is(trained: Project) -> None:
    run = trained.build()
    for name, value in checkpoint.load(trained.output / f"checkpoint-{STEPS}").tensors["weights"].items():
        run.module.get_parameter(name).data.copy_(value)
    model = trained.settings["pretrained_model_name_or_path"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.bfloat16, use_safetensors=True)
    base = output(pipeline.unet)
    pipeline.load_lora_weights(trained.output)
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
    kept = adapter_state(run.module)
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(value, kept[name].bfloat16()) for name, value in loaded.items())
    with torch.autocast("cpu", torch.bfloat16):
        assert near(output(run.module), output(pipeline.unet)) < 0.05 < near(output(run.module), base)


def test_the_teacher_is_the_quantized_base(trained: Project) -> None:
    run = trained.build()
    packed = {type(layer) for layer in run.module.modules()} & {PackedLinear, PackedConv2d}
    assert packed == {PackedLinear, PackedConv2d}
    base = SDXL().load(ModelSource(trained.settings["pretrained_model_name_or_path"]), torch.bfloat16)
    plain = output(base)
    quantize(base.requires_grad_(False), "int8-quanto", torch.device("cpu"))
    assert run.teacher is run.module
    with adapters_off(run.teacher):
        assert torch.equal(output(run.teacher), output(base))
    assert 0 < near(output(base), plain) < 0.05


def test_features_of_a_quantized_encoder_are_near_and_cached_apart(tiny_model: Path, tmp_path: Path) -> None:
    plain = Encoding(SDXL(), ModelSource(str(tiny_model)))
    packed = replace(plain, text_precisions=("int8-quanto", "no_change"))
    one, two = (SDXL().encode_prompt(encoding.load("text"), ["a picture"]) for encoding in (plain, packed))
    assert 0 < near(two["prompt_embeds"], one["prompt_embeds"]) < 0.05
    assert torch.equal(two["pooled_prompt_embeds"], one["pooled_prompt_embeds"])  # of the second encoder
    assert plain.text_store(text_cache(tmp_path)).folder != packed.text_store(text_cache(tmp_path)).folder


def test_the_card_names_the_precision(trained: Project) -> None:
    assert "its weights in int8-quanto while training" in (trained.output / "README.md").read_text()


def test_a_full_model_is_refused(project: Project) -> None:
    with pytest.raises(UserError) as caught:
        project.build(model_type="full", base_model_precision="int8-quanto", lora_rank=None)
    (line,) = caught.value.lines
    assert line.startswith("base_model_precision: 'int8-quanto' is for a frozen base")


def test_two_processes_share_a_quantized_base(project: Project) -> None:
    done = project.launch(2, **CHANGES | {"max_train_steps": 1, "validation_prompt": None})
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
