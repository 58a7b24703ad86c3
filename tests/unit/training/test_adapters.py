"""Adapters: float32, seeded, started from a file, rounded for pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.errors import UserError
from simpletuner.denoiser import adapters_off
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.training.adapters import (
    adapter_metadata,
    adapter_state,
    attach_lora,
    inference_dtype,
    start_from,
    trainable_parameters,
)

FAMILY = SDXL()


def network(
    model: Path,
    rank: int = 4,
    alpha: float = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    use_dora: bool = False,
) -> nn.Module:
    """Returns a tiny UNet with an adapter on a linear, a convolution and a projection."""
    module = FAMILY.load(ModelSource(str(model)), dtype=dtype)
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_dora": use_dora}
    attach_lora(module, {**settings, "target_modules": ["to_q", "conv1", "proj_in"]}, seed)
    return module


def randomised(module: nn.Module) -> nn.Module:
    """Gives every adapter weight a random value, so that the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(module).values():
        parameter.data.normal_(std=0.1, generator=generator)
    return module


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    """Returns what the network says of fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    cond = {"prompt_embeds": torch.randn(1, 77, 96, generator=generator), "pooled_prompt_embeds": torch.zeros(1, 64)}
    x_t = torch.randn(1, 4, 8, 8, generator=generator)
    return FAMILY.forward(module, x_t, torch.tensor([5]), cond, torch.zeros(1, 6))


def test_only_the_adapter_trains_in_float32_and_the_seed_decides_it(tiny_model: Path) -> None:
    module = network(tiny_model, dtype=torch.bfloat16)
    parameters = trainable_parameters(module)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert all("lora_" in name for name in parameters)
    assert {p.dtype for name, p in module.named_parameters() if name not in parameters} == {torch.bfloat16}
    again, other = (trainable_parameters(network(tiny_model, seed=seed, dtype=torch.bfloat16)) for seed in (0, 1))
    name = next(name for name in parameters if "lora_A" in name)
    assert torch.equal(parameters[name], again[name])
    assert not torch.equal(parameters[name], other[name])


def test_attaching_leaves_the_global_random_state_alone(tiny_model: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    network(tiny_model)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(("targets", "said"), [(["absent"], "not found"), (["to_q", "norm1"], "is not supported")])
def test_layers_that_peft_cannot_adapt_are_one_line(tiny_model: Path, targets: list[str], said: str) -> None:
    module = FAMILY.load(ModelSource(str(tiny_model)))
    with pytest.raises(UserError, match=f"^peft_lora_target_modules: .*{said}") as caught:
        attach_lora(module, {"r": 4, "lora_alpha": 4, "target_modules": targets}, 0)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_run_can_start_from_an_adapter_of_another_alpha(tiny_model: Path, tmp_path: Path, use_dora: bool) -> None:
    source = randomised(network(tiny_model, alpha=8, use_dora=use_dora))
    path = FAMILY.save_lora(tmp_path, adapter_state(source), adapter_metadata(source))
    started = network(tiny_model, alpha=3, use_dora=use_dora)
    assert not torch.allclose(output(started), output(source), atol=1e-3)
    start_from(started, FAMILY, path)
    torch.testing.assert_close(output(started), output(source), rtol=1e-4, atol=1e-5)
    assert trainable_parameters(started).keys() == trainable_parameters(source).keys()


def test_an_adapter_of_another_rank_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = network(tiny_model, rank=8)
    path = FAMILY.save_lora(tmp_path, adapter_state(source), adapter_metadata(source))
    with pytest.raises(UserError, match="init_lora: .* another rank"):
        start_from(network(tiny_model), FAMILY, path)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path, use_dora: bool) -> None:
    source = network(tiny_model, use_dora=use_dora)
    path = FAMILY.save_lora(tmp_path, adapter_state(source), adapter_metadata(source))
    with pytest.raises(UserError, match="init_lora: .* another kind than this run's; .*use_dora"):
        start_from(network(tiny_model, use_dora=not use_dora), FAMILY, path)


def test_an_adapter_of_more_layers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = network(tiny_model)
    path = FAMILY.save_lora(tmp_path, adapter_state(source), adapter_metadata(source))
    module = FAMILY.load(ModelSource(str(tiny_model)))
    attach_lora(module, {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]}, 0)
    with pytest.raises(UserError, match="init_lora: .* has other layers"):
        start_from(module, FAMILY, path)


def test_a_file_that_is_no_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not an adapter")
    with pytest.raises(UserError, match="init_lora: .* is no adapter for this model"):
        start_from(network(tiny_model), FAMILY, tmp_path / "a.safetensors")


def test_pictures_are_drawn_with_rounded_weights_that_come_back(tiny_model: Path) -> None:
    module = randomised(network(tiny_model))
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(module).items()}
    with inference_dtype(module, torch.bfloat16):
        for name, parameter in trainable_parameters(module).items():
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, before[name].bfloat16())
    assert all(torch.equal(before[name], parameter) for name, parameter in trainable_parameters(module).items())


def test_adapters_can_be_switched_off_for_a_while(tiny_model: Path) -> None:
    base = output(FAMILY.load(ModelSource(str(tiny_model))))
    module = randomised(network(tiny_model))
    adapted = output(module)
    with adapters_off(module):
        torch.testing.assert_close(output(module), base)
    assert torch.equal(output(module), adapted)
    assert not torch.allclose(adapted, base, atol=1e-3)
