"""Optimizers of torch-optimi: Lion (arXiv 2302.06675), StableAdamW (2304.13013), RAdam (1908.03265) and Adam's kin."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import optimi  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from simpletuner.config.errors import UserError
from simpletuner.config.schema import OptimizerSection
from simpletuner.optimizers._base import Groups, OptimizerPlugin, Options

NAMES = (
    "optimi-adam",
    "optimi-adamw",
    "optimi-adan",
    "optimi-lion",
    "optimi-radam",
    "optimi-ranger",
    "optimi-sgd",
    "optimi-stableadamw",
)

_CLASSES: Mapping[str, type[Optimizer]] = {
    "optimi-adam": optimi.Adam,
    "optimi-adamw": optimi.AdamW,
    "optimi-adan": optimi.Adan,
    "optimi-lion": optimi.Lion,
    "optimi-radam": optimi.RAdam,
    "optimi-ranger": optimi.Ranger,
    "optimi-sgd": optimi.SGD,
    "optimi-stableadamw": optimi.StableAdamW,
}
_OPTIONS: Mapping[str, type] = {
    "betas": tuple,
    "eps": float,
    "momentum": float,
    "dampening": bool,
    "weight_decay": float,
    "decouple_lr": bool,
    "max_lr": float,
    "kahan_sum": bool,
    "k": int,
    "alpha": float,
}
"""The types of optimi's options; each class takes some. Its ``triton`` kernels are chosen by the device."""


class _Optimi:
    """The plug-in of all NAMES."""

    trains_bf16 = False

    def __call__(self, parameters: Iterable[Parameter | Mapping[str, Any]], section: OptimizerSection) -> Optimizer:
        return _plugin(section.optimizer)(parameters, section)

    def keywords(self, section: OptimizerSection) -> Options:
        return _plugin(section.optimizer).keywords(section)


def _plugin(name: str) -> OptimizerPlugin:
    accepted = inspect.signature(_CLASSES[name]).parameters
    options = {key: kind for key, kind in _OPTIONS.items() if key in accepted}
    # Lion and Adan have betas of another meaning than Adam's: theirs are the library's unless optimizer_config says so.
    adam = {"betas", "eps"} <= accepted.keys() and name != "optimi-adan"

    def create(groups: Groups, keywords: Options) -> Optimizer:
        if "eps" in accepted and any(p.dtype != torch.float32 for group in groups for p in group["params"]):
            # optimi keeps the second moment in the weights' dtype, where beta2 = 0.999 cannot let it decay.
            raise UserError(f"optimizer: '{name}' has 16-bit second moments for 16-bit weights; use 'adamw_bf16'")
        try:
            return _CLASSES[name](groups, **keywords)
        except ValueError as error:
            raise UserError(f"optimizer_config: '{name}' says: {error}") from error

    return OptimizerPlugin(create, options, adam)


PLUGIN = _Optimi()
