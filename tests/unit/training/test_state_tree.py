"""Nested states as tensors plus JSON."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from simpletuner.training.state_tree import flatten, restore_optimizer, unflatten


def through_json(tree: object) -> object:
    tensors, rest = flatten(tree)
    return unflatten(tensors, json.loads(json.dumps(rest)))


@pytest.mark.parametrize(
    "tree",
    [
        {"lr": 0.1, "betas": (0.9, 0.999), "fused": None, "params": [0, 1], "name": "x", "flag": True, "big": 2**70},
        {"state": {0: {"a": 1}, 7: {}}, "mixed": {1: "int", "1": "str"}},
        {"$tensor": "a key of the user", "$tuple": [1], "nested": {"$pairs": ()}},
        [[], (), {}, [()]],
        float("inf"),
        None,
    ],
)
def test_a_tree_comes_back_as_it_was(tree: object) -> None:
    back = through_json(tree)
    assert back == tree
    assert repr(back) == repr(tree)  # tuples stay tuples, 1 stays 1 and not 1.0 or True


def test_tensors_are_named_by_their_path_and_not_copied() -> None:
    first, second = torch.zeros(2, dtype=torch.bfloat16), torch.tensor(3)
    tensors, rest = flatten({"state": {0: {"m": first}}, "list": [second]})
    assert tensors.keys() == {"state.0.m", "list.0"}
    back = unflatten(tensors, rest)
    assert back["state"][0]["m"].data_ptr() == first.data_ptr()
    assert back["list"] == [second]


def test_paths_that_look_alike_do_not_collide() -> None:
    back = through_json(
        {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "n": {1: torch.tensor(3), "1": torch.tensor(4)}}
    )
    assert isinstance(back, dict)
    assert (back["a.b"], back["a"]["b"], back["n"][1], back["n"]["1"]) == (1, 2, 3, 4)


def test_what_cannot_be_saved_is_named() -> None:
    class Quantized(Tensor):
        pass

    with pytest.raises(TypeError, match=r"^state\.0\.exp_avg: a Quantized cannot be saved"):
        flatten({"state": {0: {"exp_avg": torch.zeros(2).as_subclass(Quantized)}}})
    with pytest.raises(TypeError, match=r"^a\.1: a device cannot"):
        flatten({"a": [0, torch.device("cpu")]})
    with pytest.raises(TypeError, match="keys"):
        flatten({(1, 2): 3})


def stepped(lr: float, weight_decay: float = 0.1) -> tuple[Parameter, torch.optim.Optimizer]:
    parameter = Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=weight_decay)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return parameter, optimizer


def test_a_changed_config_takes_effect_and_the_moments_stay() -> None:
    _, old = stepped(1e-3)
    parameter, new = stepped(1e-4, weight_decay=0.5)
    saved = old.state_dict()
    saved["param_groups"][0]["evolving"] = 7  # some optimizers count in their groups
    restore_optimizer(new, saved)
    group = new.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["evolving"]) == (1e-4, 0.5, 7)
    assert torch.equal(new.state[parameter]["exp_avg"], torch.full((3,), 0.1))


def test_scalers_and_schedules_pass_through() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)  # pyright: ignore[reportPrivateImportUsage]
    scaler.scale(torch.ones(1))
    assert through_json(scaler.state_dict()) == scaler.state_dict()
    _, optimizer = stepped(1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    assert through_json(schedule.state_dict()) == schedule.state_dict()
