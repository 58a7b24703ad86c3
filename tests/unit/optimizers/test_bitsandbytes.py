"""8-bit Adam, where bitsandbytes is installed; what happens where it is not."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from simpletuner import registry
from simpletuner.config.errors import UserError
from simpletuner.config.schema import OptimizerSection
from simpletuner.training import checkpoint
from simpletuner.training.state_tree import flatten, restore_optimizer, unflatten

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra bitsandbytes")
SECTION = OptimizerSection(optimizer="bnb-adamw8bit", learning_rate=1e-2)


def build(parameters: list[Parameter], section: OptimizerSection = SECTION) -> Optimizer:
    return registry.load("optimizers", section.optimizer, "optimizer")(parameters, section)


def start() -> list[Parameter]:
    """Returns two tensors above min_8bit_size, and one below."""
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in ((80, 80), (50, 100), (7,))]


def descend(parameters: list[Parameter], optimizer: Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        sum((p - 0.25).square().sum() for p in parameters).backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="it is installed")
def test_without_the_package_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r'bnb-adamw8bit.*pip install "simpletuner\[bitsandbytes\]"'):
        build(start())


@installed
def test_it_follows_adam_in_32_bits() -> None:
    parameters, reference = start(), start()
    descend(parameters, build(parameters), 30)
    descend(reference, torch.optim.AdamW(reference, lr=1e-2), 30)
    moved = torch.cat([(a - b).flatten() for a, b in zip(reference, start(), strict=True)]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(parameters, reference, strict=True)]).norm()
    assert 0 < apart < 0.05 * moved
    assert (parameters[2] - reference[2]).abs().max() < 1e-6  # a small tensor has 32-bit moments


@installed
def test_the_moments_take_one_byte_each() -> None:
    parameters = start()
    optimizer = build(parameters)
    descend(parameters, optimizer, 1)
    state = optimizer.state[parameters[0]]
    assert (state["state1"].dtype, state["state2"].dtype) == (torch.uint8, torch.uint8)
    assert state["state1"].shape == parameters[0].shape


@installed
def test_a_resumed_run_equals_the_straight_run(tmp_path: Path) -> None:
    straight = start()
    descend(straight, build(straight), 12)
    halfway = start()
    optimizer = build(halfway)
    descend(halfway, optimizer, 5)
    tensors, rest = flatten(optimizer.state_dict())
    weights = {str(i): p.detach() for i, p in enumerate(halfway)}
    path = checkpoint.save(tmp_path, 5, {"weights": weights, "optimizer": tensors}, {"optimizer": rest}, None)
    loaded = checkpoint.load(path)
    resumed = [Parameter(loaded.tensors["weights"][str(i)].clone()) for i in range(3)]
    optimizer = build(resumed)
    restore_optimizer(optimizer, unflatten(loaded.tensors["optimizer"], loaded.state["optimizer"]))
    assert optimizer.state[resumed[0]]["state1"].dtype is torch.uint8
    descend(resumed, optimizer, 7)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@installed
def test_16_bit_weights_are_refused() -> None:
    with pytest.raises(UserError, match="adamw_bf16"):
        build([Parameter(torch.zeros(2, dtype=torch.bfloat16))])
