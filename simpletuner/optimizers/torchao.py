"""AdamW of torchao with both moments in 8 or 4 bits, or 8-bit floats, block by block (arXiv 2110.02861, 2309.01507).

Tensors of fewer than 4096 numbers, or of no whole number of blocks, keep theirs in 32 bits. torchao compiles the update
of each shape of tensor: the first steps take minutes, and it needs a C++ compiler, on a GPU Triton.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchao import optim as library  # pyright: ignore  (an extra)

from simpletuner.optimizers._base import ADAM_OPTIONS, Groups, OptimizerLibrary, OptimizerPlugin, Options, refuse_16_bit

NAMES = ("ao-adamfp8", "ao-adamw4bit", "ao-adamw8bit", "ao-adamwfp8")

_LIBRARY = cast(Any, library)
_CLASSES: Mapping[str, Any] = {
    "ao-adamfp8": _LIBRARY.AdamFp8,
    "ao-adamw4bit": _LIBRARY.AdamW4bit,
    "ao-adamw8bit": _LIBRARY.AdamW8bit,
    "ao-adamwfp8": _LIBRARY.AdamWFp8,
}
_INNER = ("codes", "scale")
"""What is saved of a quantized moment; its third part is a table that is always the same."""


def _plain(value: Any) -> Any:
    """Returns a quantized moment as a dict of plain tensors, anything else as it is."""
    if isinstance(value, Tensor) and type(value) is not Tensor:
        return {name: getattr(value, name) for name in _INNER}
    return value


class _Saved(Optimizer):
    """Makes the state of torchao's optimizers one of plain tensors, and takes learning rates that are numbers."""

    _new_buffer: Callable[[Tensor, bool], Tensor]

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        state = {key: {name: _plain(value) for name, value in own.items()} for key, own in found["state"].items()}
        groups = [{**group, "lr": float(group["lr"])} for group in found["param_groups"]]
        return {**found, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(saved_ids, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = self._restored(parameter, name, value)

    def _restored(self, parameter: Tensor, name: str, value: Any) -> Tensor:
        if name == "step":
            return value.clone()
        buffer = self._new_buffer(parameter, name == "exp_avg")
        if not isinstance(value, dict):
            return buffer.copy_(value)
        for part in _INNER:
            cast(Tensor, getattr(buffer, part)).copy_(value[part])
        return buffer


def _plugin(name: str) -> OptimizerPlugin:
    kind = type(name, (_Saved, _CLASSES[name]), {})

    def create(groups: Groups, options: Options) -> Optimizer:
        refuse_16_bit(groups, name)
        return kind(groups, **options)

    return OptimizerPlugin(create, {**ADAM_OPTIONS, "block_size": int}, decays=name != "ao-adamfp8")


PLUGIN = OptimizerLibrary({name: _plugin(name) for name in NAMES})
