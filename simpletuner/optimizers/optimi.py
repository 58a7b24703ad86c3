"""Optimizers of torch-optimi: Lion (arXiv 2302.06675), StableAdamW (2304.13013), RAdam (1908.03265) and Adam's kin."""

from collections.abc import Mapping

import optimi  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.optim import Optimizer

from simpletuner.config.errors import UserError
from simpletuner.optimizers._base import Groups, OptimizerLibrary, OptimizerPlugin, Options, options_of

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


def _plugin(name: str) -> OptimizerPlugin:
    kind = _CLASSES[name]
    options = options_of(kind, _OPTIONS)
    # Lion and Adan have betas of another meaning than Adam's: theirs are the library's unless optimizer_config says so.
    adam = {"betas", "eps"} <= options.keys() and name != "optimi-adan"
    decouples = {"decouple_wd": True} if options_of(kind, {"decouple_wd": bool}) else {}

    def create(groups: Groups, keywords: Options) -> Optimizer:
        if "eps" in options and any(p.dtype != torch.float32 for group in groups for p in group["params"]):
            # optimi keeps the second moment in the weights' dtype, where beta2 = 0.999 cannot let it decay.
            raise UserError(f"optimizer: '{name}' has 16-bit second moments for 16-bit weights; use 'adamw_bf16'")
        try:
            return kind(groups, **decouples, **keywords)
        except ValueError as error:
            raise UserError(f"optimizer_config: '{name}' says: {error}") from error

    return OptimizerPlugin(create, options, adam)


PLUGIN = OptimizerLibrary({name: _plugin(name) for name in NAMES})
