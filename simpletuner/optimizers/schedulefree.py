"""Schedule-free AdamW (arXiv 2405.15682): the weights that are trained for are an average of those that are stepped.

Gradients are taken between the two. So pictures, checkpoints and results are made of the average (``averaged``), and
what training goes on with is put back bit for bit. It wants a constant learning rate, after a warmup.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import schedulefree  # pyright: ignore[reportMissingImports]  (an extra)
import torch
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.optimizers._base import ADAM_OPTIONS, Groups, OptimizerPlugin, Options, refuse_16_bit

NAMES = ("adamw_schedulefree",)


class AdamWScheduleFree(schedulefree.AdamWScheduleFree):  # pyright: ignore[reportUntypedBaseClass]
    """The library's optimizer, always in training mode but within ``averaged``."""

    def __init__(self, groups: Groups, **options: Any) -> None:  # Any: the constructor's own
        super().__init__(groups, **options)
        self.train()

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Generator[None]:
        """Puts the average into the parameters; the state that is saved meanwhile has what training goes on with."""
        if not self.param_groups[0]["train_mode"]:  # it is there already
            yield
            return
        moved: list[Tensor] = [p for group in self.param_groups for p in group["params"] if "z" in self.state[p]]
        for parameter in moved:
            self.state[parameter]["trained"] = parameter.detach().clone()
        self.eval()
        try:
            yield
        finally:
            self._go_on()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state; the parameters hold the average then, and get what training goes on with."""
        super().load_state_dict(state_dict)
        self._go_on()

    @torch.no_grad()
    def _go_on(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True
            for parameter in group["params"]:
                if "trained" in self.state[parameter]:
                    parameter.copy_(self.state[parameter].pop("trained"))


def _create(groups: Groups, options: Options) -> Optimizer:
    refuse_16_bit(groups, NAMES[0])
    return cast(Optimizer, AdamWScheduleFree(groups, **options))


PLUGIN = OptimizerPlugin(_create, {**ADAM_OPTIONS, "r": float, "weight_lr_power": float})
