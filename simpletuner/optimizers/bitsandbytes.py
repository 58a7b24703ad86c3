"""AdamW of bitsandbytes with both moments in 8 bits, block by block (arXiv 2110.02861): a quarter of Adam's memory.

Tensors of fewer than ``min_8bit_size`` numbers keep theirs in 32 bits. Run so far with the CPU kernels only.
"""

from typing import Any, cast

import bitsandbytes  # pyright: ignore[reportMissingImports]  (an extra)
from torch.optim import Optimizer

from simpletuner.optimizers._base import ADAM_OPTIONS, Groups, OptimizerPlugin, Options, refuse_16_bit

NAMES = ("bnb-adamw8bit",)


def _create(groups: Groups, options: Options) -> Optimizer:
    refuse_16_bit(groups, NAMES[0])
    return cast(Any, bitsandbytes).optim.AdamW8bit(groups, **options)


PLUGIN = OptimizerPlugin(_create, {**ADAM_OPTIONS, "min_8bit_size": int})
