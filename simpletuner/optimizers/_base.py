"""What an optimizer plug-in offers.

A plug-in file binds ``PLUGIN``, an ``OptimizerPlugin`` or something with its methods, such as an ``OptimizerLibrary``;
``registry.load("optimizers", section.optimizer, "optimizer")(parameters, section)`` builds the optimizer, and
``.keywords(section)`` checks the section without parameters, which is how the plan does it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.schema import OptimizerSection

Options = dict[str, Any]  # Any: an optimizer's keyword arguments differ by optimizer; check() has seen their types
"""Keyword arguments of an optimizer's constructor, hyper-parameters included."""

Groups = list[dict[str, Any]]  # Any: torch's parameter groups hold parameters and hyper-parameters

ADAM_OPTIONS: Mapping[str, type] = {"betas": tuple, "eps": float, "weight_decay": float}
"""Keys of ``optimizer_config`` that every Adam-like optimizer takes."""


@dataclass(frozen=True)
class OptimizerPlugin:
    """An optimizer that the config can name; calling it builds the optimizer."""

    create: Callable[[Groups, Options], Optimizer]
    """(parameter groups, keyword arguments) -> optimizer."""
    options: Mapping[str, type] = field(default_factory=lambda: dict(ADAM_OPTIONS))
    """Keys that ``optimizer_config`` may hold, with their types (``tuple`` is a list of numbers)."""
    adam: bool = True
    """Whether ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` mean something to it."""
    decays: bool = True
    """Whether ``adam_weight_decay`` means something to it: whether its decay is decoupled from the gradient."""
    trains_bf16: bool = False
    """Whether bfloat16 weights lose nothing of their updates under it, so that a full model may be bfloat16."""

    def __call__(self, parameters: Iterable[Parameter | Mapping[str, Any]], section: OptimizerSection) -> Optimizer:
        """Returns the optimizer over the parameters (or groups of them) with the section's hyper-parameters.

        Raises:
            UserError: ``optimizer_config`` has a key or a value that this optimizer does not take.
        """
        given = list(parameters)
        groups = [dict(group) for group in given if isinstance(group, Mapping)]
        alone = [parameter for parameter in given if isinstance(parameter, Parameter)]
        if alone:
            groups.append({"params": alone})
        return self.create(groups, self.keywords(section))

    def keywords(self, section: OptimizerSection) -> Options:
        """Returns the constructor's keyword arguments; ``optimizer_config`` wins over the ``adam_*`` keys.

        Raises:
            UserError: As for building. (So the plan can check the section without any parameter.)
        """
        found: Options = {"lr": section.learning_rate}
        if self.decays:
            found["weight_decay"] = section.adam_weight_decay
        if self.adam:
            found |= {"betas": (section.adam_beta1, section.adam_beta2), "eps": section.adam_epsilon}
        problems: list[str] = []
        for key, value in section.optimizer_config.items():
            kind = self.options.get(key)
            if kind is None:
                known = ", ".join(sorted(self.options)) or "none"
                problems.append(
                    f"optimizer_config: unknown key '{key}' for optimizer '{section.optimizer}'"
                    f"{suggestion(key, self.options)} (known: {known})"
                )
            elif (converted := _as(kind, value)) is None:
                problems.append(f"optimizer_config: {key} is {value!r}, expected {_KINDS[kind]}")
            else:
                found[key] = converted
        if problems:
            raise UserError(*problems)
        return found

    def idle_keys(self, section: OptimizerSection) -> frozenset[str]:
        """Returns the config's keys that mean nothing to it."""
        moments = () if self.adam else ("adam_beta1", "adam_beta2", "adam_epsilon")
        return frozenset((*moments, *(() if self.decays else ("adam_weight_decay",))))


@dataclass(frozen=True)
class OptimizerLibrary:
    """The plug-in of a file that serves several names, each with options of its own."""

    plugins: Mapping[str, OptimizerPlugin]
    trains_bf16: bool = False

    def __call__(self, parameters: Iterable[Parameter | Mapping[str, Any]], section: OptimizerSection) -> Optimizer:
        """Returns the section's optimizer, as ``OptimizerPlugin`` does."""
        return self.plugins[section.optimizer](parameters, section)

    def keywords(self, section: OptimizerSection) -> Options:
        """Returns the keyword arguments of the section's optimizer, as ``OptimizerPlugin`` does."""
        return self.plugins[section.optimizer].keywords(section)

    def idle_keys(self, section: OptimizerSection) -> frozenset[str]:
        """Returns the config's keys that mean nothing to the section's optimizer."""
        return self.plugins[section.optimizer].idle_keys(section)


def options_of(optimizer: Callable[..., Optimizer], kinds: Mapping[str, type]) -> dict[str, type]:
    """Returns those of the options that an optimizer takes: by name, and as one value or a tuple as its default is."""
    defaults = {key: parameter.default for key, parameter in inspect.signature(optimizer).parameters.items()}
    return {
        key: kind
        for key, kind in kinds.items()
        if key in defaults and isinstance(defaults[key], tuple) == (kind is tuple)
    }


def refuse_16_bit(groups: Groups, name: str) -> None:
    """Raises UserError for weights of 16 bits: at a rate of 1e-5 most of their updates round to nothing, silently."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for group in groups for p in group["params"]):
        raise UserError(
            f"optimizer: '{name}' updates 16-bit weights without compensation and loses most of the update; "
            "use 'adamw_bf16', or mixed_precision 'no'"
        )


def averaged(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Shows the weights that an optimizer trains for, where those that it steps from are others (schedule-free)."""
    context: Callable[[], AbstractContextManager[None]] = getattr(optimizer, "averaged", nullcontext)
    return context()


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list of numbers"}


def _as(kind: type, value: object) -> object | None:
    """Returns the value as the kind, or None when it is not one (``1`` is a number for a float, never for a bool)."""
    if kind is tuple and isinstance(value, list | tuple):
        numbers = [_as(float, item) for item in cast("Iterable[object]", value)]
        return None if None in numbers else tuple(numbers)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is kind else None
