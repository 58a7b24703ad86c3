"""Every optimizer that the config can name, found through the registry."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from simpletuner import registry
from simpletuner.config.errors import UserError
from simpletuner.config.schema import OptimizerSection
from simpletuner.optimizers._base import averaged
from simpletuner.training import checkpoint
from simpletuner.training.lr_schedulers import learning_rate
from simpletuner.training.state_tree import flatten, restore_optimizer, unflatten

OPTIONAL = {
    "bnb-adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "adamw_schedulefree": "schedulefree",
    **dict.fromkeys(("ao-adamfp8", "ao-adamw4bit", "ao-adamw8bit", "ao-adamwfp8"), "torchao"),
}
"""Name -> the package that an extra brings."""

NAMES = [
    pytest.param(
        name,
        marks=[pytest.mark.skipif(find_spec(OPTIONAL[name]) is None, reason="an extra")] if name in OPTIONAL else [],
    )
    for name in registry.names("optimizers")
]
TARGET = torch.linspace(-1, 1, 12).view(3, 4)
RATES = {"prodigy": 1.0, "torch-adadelta": 1.0}
"""Name -> the rate that it is made for; the others' is 0.01."""


@pytest.fixture
def _uncompiled() -> Iterator[None]:
    """Lets torchao's optimizers run without compiling, which takes them seconds for every shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def section(name: str, **keys: object) -> OptimizerSection:
    return OptimizerSection.model_validate({"optimizer": name, "learning_rate": RATES.get(name, 1e-2), **keys})


def build(parameters: list[Parameter], settings: OptimizerSection) -> Optimizer:
    return registry.load("optimizers", settings.optimizer, "optimizer")(parameters, settings)


def descend(parameters: list[Parameter], optimizer: Optimizer, num_steps: int) -> None:
    """Steps on the distance to TARGET, and to 0 for the other parameters."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (parameters[0] - TARGET).square().mean() + sum(p.square().mean() for p in parameters[1:])
        loss.backward()
        optimizer.step()


def start() -> list[Parameter]:
    return [Parameter(torch.full((3, 4), 0.5)), Parameter(torch.ones(5))]


def start_with_a_large_one() -> list[Parameter]:
    """Returns parameters of which the last is large enough for moments of 8 bits."""
    return [*start(), Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))]


def test_the_names_of_the_config_are_there() -> None:
    assert {"adamw", "adamw_bf16", "optimi-lion", "optimi-adamw", "optimi-stableadamw"} <= set(
        registry.names("optimizers")
    )


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("name", NAMES)
def test_it_descends(name: str) -> None:
    parameters = start()
    before = (parameters[0] - TARGET).square().mean().item()
    descend(parameters, build(parameters, section(name)), 150)
    assert (parameters[0] - TARGET).square().mean().item() < 0.9 * before


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_from_a_checkpoint_equals_the_straight_run(name: str, tmp_path: Path) -> None:
    settings = section(name, lr_scheduler="cosine", lr_warmup_steps=3)

    def run(parameters: list[Parameter], optimizer: Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, 20, step)
            descend(parameters, optimizer, 1)

    straight = start_with_a_large_one()
    run(straight, build(straight, settings), 0, 20)

    halfway = start_with_a_large_one()
    optimizer = build(halfway, settings)
    run(halfway, optimizer, 0, 9)
    with averaged(optimizer):
        tensors, rest = flatten(optimizer.state_dict())
        weights = {str(i): p.detach() for i, p in enumerate(halfway)}
        path = checkpoint.save(tmp_path, 9, {"weights": weights, "optimizer": tensors}, {"optimizer": rest}, None)

    files = {file: file.read_bytes() for file in path.iterdir()}
    loaded = checkpoint.load(path)
    resumed = [Parameter(loaded.tensors["weights"][str(i)].clone()) for i in range(len(halfway))]
    optimizer = build(resumed, settings)
    restore_optimizer(optimizer, unflatten(loaded.tensors["optimizer"], loaded.state["optimizer"]))
    run(resumed, optimizer, 9, 20)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert files == {file: file.read_bytes() for file in path.iterdir()}  # tensors are mapped from there


@pytest.mark.parametrize("name", ["adamw", "torch-adam", "adamw_bf16", "optimi-adamw"])
def test_the_adam_keys_are_honoured(name: str) -> None:
    keys = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_weight_decay": 0.25, "adam_epsilon": 1e-3}
    parameters, reference = start(), start()
    descend(parameters, build(parameters, section(name, **keys)), 10)
    theirs = torch.optim.AdamW(reference, lr=1e-2, betas=(0.7, 0.8), weight_decay=0.25, eps=1e-3)
    descend(reference, theirs, 10)
    # optimi debiases the betas instead of the moments: the same formula but for the place of epsilon.
    rtol = 1e-2 if name.startswith("optimi") else 1e-6
    torch.testing.assert_close(parameters[0], reference[0], rtol=rtol, atol=1e-6)


def test_optimizer_config_wins_over_the_adam_keys() -> None:
    keywords = registry.load("optimizers", "adamw").keywords(
        section("adamw", adam_beta1=0.5, optimizer_config={"betas": [0.8, 0.9], "amsgrad": True, "eps": 1})
    )
    assert keywords == {"lr": 1e-2, "weight_decay": 1e-2, "betas": (0.8, 0.9), "amsgrad": True, "eps": 1.0}
    assert type(keywords["eps"]) is float


def test_lion_keeps_its_own_betas() -> None:
    optimizer = build(start(), section("optimi-lion", adam_beta2=0.999))
    assert (optimizer.param_groups[0]["beta1"], optimizer.param_groups[0]["beta2"]) == (0.9, 0.99)


def test_wrong_options_are_named_all_at_once() -> None:
    with pytest.raises(UserError) as raised:
        build(start(), section("adamw", optimizer_config={"amsgard": True, "eps": "small", "betas": 0.9}))
    assert raised.value.lines == (
        "optimizer_config: unknown key 'amsgard' for optimizer 'adamw' - did you mean 'amsgrad'?"
        " (known: amsgrad, betas, eps, weight_decay)",
        "optimizer_config: eps is 'small', expected a number",
        "optimizer_config: betas is 0.9, expected a list of numbers",
    )


@pytest.mark.parametrize("name", ["adamw", "optimi-adamw"])
def test_16_bit_weights_without_exact_moments_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="adamw_bf16"):
        build([Parameter(torch.zeros(2, dtype=torch.bfloat16))], section(name))


def test_parameter_groups_keep_their_own_settings() -> None:
    first, second = start()
    plugin = registry.load("optimizers", "adamw_bf16")
    optimizer = plugin([{"params": [first], "weight_decay": 0.0}, {"params": [second]}], section("adamw_bf16"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-2]


@pytest.mark.parametrize("name", ["torch-sgd", "torch-rmsprop", "torch-adagrad"])
def test_a_decay_that_is_not_decoupled_is_none_unless_it_is_asked_for(name: str) -> None:
    assert "weight_decay" not in registry.load("optimizers", name).keywords(section(name, adam_weight_decay=0.1))
    asked = section(name, optimizer_config={"weight_decay": 0.1})
    assert registry.load("optimizers", name).keywords(asked)["weight_decay"] == 0.1


def test_muon_steps_matrices_and_adamw_the_rest() -> None:
    parameters, alone, others = start(), start(), start()
    optimizer = build(parameters, section("muon", adam_beta2=0.95))
    descend(parameters, optimizer, 5)
    settings = {"lr": 1e-2, "weight_decay": 1e-2}
    for reference in (
        torch.optim.Muon(alone[:1], **settings, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others[1:], **settings, betas=(0.9, 0.95)),
    ):
        descend(alone if isinstance(reference, torch.optim.Muon) else others, reference, 5)
    assert torch.equal(parameters[0], alone[0])
    torch.testing.assert_close(parameters[1], others[1])


@pytest.mark.skipif(find_spec("schedulefree") is None, reason="an extra")
def test_schedule_free_weights_are_averaged_for_a_while_and_go_on_bit_for_bit() -> None:
    import schedulefree

    ours, theirs, undisturbed = start(), start(), start()
    settings = section("adamw_schedulefree", adam_weight_decay=0.0)
    optimizer, other = build(ours, settings), build(undisturbed, settings)
    reference = schedulefree.AdamWScheduleFree(theirs, lr=1e-2)
    reference.train()
    for parameters, stepping in ((ours, optimizer), (undisturbed, other), (theirs, reference)):
        descend(parameters, stepping, 30)
    reference.eval()
    with averaged(optimizer):
        assert torch.equal(ours[0], theirs[0])
        assert not torch.equal(ours[0], undisturbed[0])
    assert torch.equal(ours[0], undisturbed[0])
    for parameters, stepping in ((ours, optimizer), (undisturbed, other)):
        descend(parameters, stepping, 5)
    assert torch.equal(ours[0], undisturbed[0])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="an extra")
@pytest.mark.parametrize(
    ("name", "num_bytes", "error"), [("ao-adamw8bit", 1.1, 0.1), ("ao-adamw4bit", 0.6, 0.5), ("ao-adamwfp8", 1.1, 0.1)]
)
def test_the_moments_of_torchao_are_small_and_follow_adam(name: str, num_bytes: float, error: float) -> None:
    parameters, reference = start_with_a_large_one(), start_with_a_large_one()
    optimizer = build(parameters, section(name))
    descend(parameters, optimizer, 30)
    descend(reference, torch.optim.AdamW(reference, lr=1e-2), 30)
    tensors, _ = flatten(optimizer.state_dict())
    large = [tensor for path, tensor in tensors.items() if path.startswith("state.2.exp_avg.")]
    assert sum(tensor.nbytes for tensor in large) < num_bytes * 64 * 64
    moved = (reference[2] - start_with_a_large_one()[2]).norm()
    assert 0 < (parameters[2] - reference[2]).norm() < error * moved
    assert (parameters[1] - reference[1]).abs().max() < 1e-5  # a small tensor has 32-bit moments
