"""AdamW of bitsandbytes with both moments in 8 bits, block by block (arXiv 2110.02861): a quarter of Adam's memory.

Tensors of fewer than ``min_8bit_size`` numbers keep theirs in 32 bits. Run so far with the CPU kernels only.
"""

from typing import Any, cast

import bitsandbytes  # pyright: ignore[reportMissingImports]  (an extra)
import torch
from torch.optim import Optimizer

from simpletuner.config.errors import UserError
from simpletuner.optimizers._base import ADAM_OPTIONS, Groups, OptimizerPlugin, Options

NAMES = ("bnb-adamw8bit",)


def _create(groups: Groups, options: Options) -> Optimizer:
    parameters = [p for group in groups for p in group["params"]]
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        raise UserError(
            "optimizer: 'bnb-adamw8bit' updates 16-bit weights without compensation and loses most of the update; "
            "use 'adamw_bf16', or mixed_precision 'no'"
        )
    return cast(Any, bitsandbytes).optim.AdamW8bit(groups, **options)


PLUGIN = OptimizerPlugin(_create, {**ADAM_OPTIONS, "min_8bit_size": int})
