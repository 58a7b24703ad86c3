"""AdamW of torch (arXiv 1711.05101), with the fused kernel where the device has one."""

import torch
from torch.optim import AdamW

from simpletuner.config.errors import UserError
from simpletuner.optimizers._base import ADAM_OPTIONS, Groups, OptimizerPlugin, Options

FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""Devices on which torch's fused AdamW is used: one kernel instead of a dozen per group of tensors."""


def _create(groups: Groups, options: Options) -> AdamW:
    parameters = [p for group in groups for p in group["params"]]
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        # Half precision keeps 8 bits of a weight: at a rate of 1e-5 most updates round to nothing, silently.
        raise UserError(
            "optimizer: 'adamw' updates 16-bit weights without compensation and loses most of the update; "
            "use 'adamw_bf16', or mixed_precision 'no'"
        )
    fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    return AdamW(groups, fused=True if fused else None, **options)


PLUGIN = OptimizerPlugin(_create, {**ADAM_OPTIONS, "amsgrad": bool})
