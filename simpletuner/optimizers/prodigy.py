"""Prodigy (arXiv 2306.06101): Adam that finds its own rate, which ``learning_rate`` scales; 1 is what it is made for.

It reads numbers back from the device at every step, for every tensor.
"""

import contextlib
import io
from typing import Any, cast

import prodigyopt  # pyright: ignore[reportMissingImports]  (an extra)
from torch.optim import Optimizer

from simpletuner.optimizers._base import ADAM_OPTIONS, Groups, OptimizerPlugin, Options, refuse_16_bit

_OPTIONS = {
    **ADAM_OPTIONS,
    "beta3": float,
    "use_bias_correction": bool,
    "safeguard_warmup": bool,
    "d0": float,
    "d_coef": float,
    "growth_rate": float,
    "slice_p": int,
}


def _create(groups: Groups, options: Options) -> Optimizer:
    refuse_16_bit(groups, "prodigy")
    with contextlib.redirect_stdout(io.StringIO()):  # it says that decay is decoupled
        return cast(Any, prodigyopt).Prodigy(groups, **options)


PLUGIN = OptimizerPlugin(_create, _OPTIONS)
