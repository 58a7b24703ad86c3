"""Nested states (of optimizers, EMA, scalers, methods) as flat tensors plus JSON, and back, without pickle."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Json = Any  # Any: JSON is recursive (dict, list, str, int, float, bool, None)

CONFIGURED = frozenset(
    {"lr", "initial_lr", "betas", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "fused", "foreach", "capturable"}
)
"""Keys of an optimizer's groups that come from the config and the device; all others evolve and are restored."""

_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"


def flatten(tree: object) -> tuple[dict[str, Tensor], Json]:
    """Returns (tensors by their path in the tree, JSON of the rest): ``unflatten`` makes the same tree of them.

    Args:
        tree: Dicts (also with whole numbers as keys), lists, tuples, tensors, numbers, strings, None.

    Raises:
        TypeError: The tree holds something else, such as a tensor subclass whose parts only its library knows.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(tree, "", tensors)


def _flatten(node: object, path: str, tensors: dict[str, Tensor]) -> Json:
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, Tensor):
        if type(node) not in (Tensor, Parameter):
            raise TypeError(f"{path or 'state'}: a {type(node).__name__} cannot be saved as plain tensors")
        name = path or "tensor"
        while name in tensors:  # {"a.b": ..., "a": {"b": ...}} and {1: ..., "1": ...} have children of one path
            name += "'"
        tensors[name] = node.detach()
        return {_TENSOR: name}
    if isinstance(node, Mapping):
        items = cast("Mapping[object, object]", node).items()
        if any(type(key) not in (str, int) for key, _ in items):
            raise TypeError(f"{path or 'state'}: keys that are no words or whole numbers cannot be saved")
        children = [(key, _flatten(value, _join(path, key), tensors)) for key, value in items]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in children):
            return dict(children)
        return {_PAIRS: [[key, child] for key, child in children]}
    if type(node) in (list, tuple):
        values = cast("Iterable[object]", node)
        flat = [_flatten(value, _join(path, index), tensors) for index, value in enumerate(values)]
        return flat if type(node) is list else {_TUPLE: flat}
    raise TypeError(f"{path or 'state'}: a {type(node).__name__} cannot be saved without pickle")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def unflatten(tensors: Mapping[str, Tensor], rest: Json) -> Any:  # Any: whatever tree was flattened
    """Returns the tree that ``flatten`` was given; the tensors are not copied."""
    if isinstance(rest, list):
        return [unflatten(tensors, item) for item in cast("list[Json]", rest)]
    if not isinstance(rest, dict):
        return rest
    node = cast("dict[str, Json]", rest)
    if _TENSOR in node:
        return tensors[node[_TENSOR]]
    if _TUPLE in node:
        return tuple(unflatten(tensors, item) for item in node[_TUPLE])
    if _PAIRS in node:
        return {key: unflatten(tensors, value) for key, value in node[_PAIRS]}
    return {key: unflatten(tensors, value) for key, value in node.items()}


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Puts a saved ``state_dict()`` into an optimizer, except for what this run's config and device decide.

    So a changed learning rate or weight decay takes effect when resuming; with an unchanged config nothing differs.

    Raises:
        ValueError: The parameters are not those of the saved optimizer.
    """
    groups = [
        {**old, **{key: new[key] for key in CONFIGURED & new.keys()}}
        for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
