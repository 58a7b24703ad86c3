"""Muon of torch (arXiv 2502.16982): the update of a matrix is made orthogonal.

It is for matrices. Everything else (the adapters of convolutions, norms, biases) is stepped by AdamW, at the same rate:
updates of matrices are scaled to the size that AdamW's have (``adjust_lr_fn``).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import optim
from torch.optim import Optimizer

from simpletuner.optimizers._base import ADAM_OPTIONS, Groups, OptimizerPlugin, Options, refuse_16_bit

_MUON_OPTIONS = {"momentum": float, "nesterov": bool, "ns_steps": int, "adjust_lr_fn": str}


class Muon(Optimizer):
    """Muon over the matrices of each group, AdamW over its other parameters."""

    def __init__(self, groups: Groups, lr: float, weight_decay: float, **options: Any) -> None:
        """Makes both; options of ``_MUON_OPTIONS`` are Muon's, the others AdamW's."""
        split: Groups = []
        for group in groups:
            for is_matrix in (True, False):
                parameters = [p for p in group["params"] if (p.ndim == 2) == is_matrix]
                split += [{**group, "params": parameters, "is_matrix": is_matrix}] if parameters else []
        super().__init__(split, {"lr": lr, "weight_decay": weight_decay})
        of_muon: Options = {key: options.pop(key) for key in _MUON_OPTIONS if key in options}
        of_muon.setdefault("adjust_lr_fn", "match_rms_adamw")
        kinds: dict[bool, Callable[[Groups], Optimizer]] = {
            True: lambda own: optim.Muon(own, **of_muon),
            False: lambda own: optim.AdamW(own, **options),
        }
        # Each is made of the groups themselves, into which it writes its own options; from then on it steps them.
        self._parts = {kind: make(own) for kind, make in kinds.items() if (own := self._groups(kind))}

    def _groups(self, is_matrix: bool) -> Groups:
        return [group for group in self.param_groups if group["is_matrix"] == is_matrix]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # Any: torch overloads it
        """Updates every parameter that has a gradient."""
        for is_matrix, part in self._parts.items():
            part.param_groups, part.state = self._groups(is_matrix), self.state
            part.step()


def _create(groups: Groups, options: Options) -> Muon:
    refuse_16_bit(groups, "muon")
    return Muon(groups, **options)


PLUGIN = OptimizerPlugin(_create, {**ADAM_OPTIONS, **_MUON_OPTIONS})
