"""Optimizers of torch itself, with the fused kernel where the device has one.

Decay is decoupled (arXiv 1711.05101) where torch can; where it would be added to the gradient it is 0, unless
``optimizer_config`` asks for it. Adafactor (1804.04235) reads numbers back from the device at every step.
"""

from collections.abc import Mapping

from torch import optim
from torch.optim import Optimizer

from simpletuner.optimizers._base import Groups, OptimizerLibrary, OptimizerPlugin, Options, options_of, refuse_16_bit

NAMES = (
    "adafactor",
    "adamw",
    "torch-adadelta",
    "torch-adafactor",
    "torch-adagrad",
    "torch-adam",
    "torch-adamax",
    "torch-adamw",
    "torch-nadam",
    "torch-radam",
    "torch-rmsprop",
    "torch-sgd",
)

FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""Devices on which torch's fused kernels are used: one instead of a dozen per group of tensors."""

_CLASSES: Mapping[str, type[Optimizer]] = {
    "adafactor": optim.Adafactor,
    "adamw": optim.AdamW,
    "torch-adadelta": optim.Adadelta,
    "torch-adafactor": optim.Adafactor,
    "torch-adagrad": optim.Adagrad,
    "torch-adam": optim.Adam,
    "torch-adamax": optim.Adamax,
    "torch-adamw": optim.AdamW,
    "torch-nadam": optim.NAdam,
    "torch-radam": optim.RAdam,
    "torch-rmsprop": optim.RMSprop,
    "torch-sgd": optim.SGD,
}
_OPTIONS: Mapping[str, type] = {
    "betas": tuple,
    "eps": float,
    "weight_decay": float,
    "amsgrad": bool,
    "momentum": float,
    "dampening": float,
    "nesterov": bool,
    "alpha": float,
    "centered": bool,
    "rho": float,
    "lr_decay": float,
    "initial_accumulator_value": float,
    "momentum_decay": float,
    "beta2_decay": float,
    "d": float,
}


def _plugin(name: str) -> OptimizerPlugin:
    kind = _CLASSES[name]
    known = options_of(kind, {"decoupled_weight_decay": bool, "fused": type(None)})
    decouples = {"decoupled_weight_decay": True} if "decoupled_weight_decay" in known else {}

    def create(groups: Groups, options: Options) -> Optimizer:
        refuse_16_bit(groups, name)
        fuses = "fused" in known and all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"])
        return kind(groups, **decouples, **({"fused": True} if fuses else {}), **options)

    options = options_of(kind, _OPTIONS)
    decoupled = bool(decouples) or kind in (optim.AdamW, optim.Adafactor)
    return OptimizerPlugin(create, options, adam={"betas", "eps"} <= options.keys(), decays=decoupled)


PLUGIN = OptimizerLibrary({name: _plugin(name) for name in NAMES})
