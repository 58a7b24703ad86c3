"""A run's state as a checkpoint's tensors and JSON, and back into freshly built networks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from simpletuner.training.adapters import restore_trainable, trainable_parameters
from simpletuner.training.build import Run
from simpletuner.training.checkpoint import Loaded
from simpletuner.training.state import TrainState
from simpletuner.training.state_tree import flatten, restore_optimizer, unflatten


def take(run: Run, state: TrainState) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """Returns (tensors by group, JSON): everything that the next step depends on, not copied.

    The schedule of the learning rate and the random draws are functions of the step and of sample positions, so
    neither has anything to save.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {
        "weights": {name: parameter.detach() for name, parameter in trainable_parameters(run.module).items()}
    }
    for role, average in run.averages.items():
        tensors[role] = average.network.state_dict()
    trees: dict[str, Any] = {}
    learned = {
        role: {"optimizer": learner.optimizer.state_dict(), "scaler": learner.scaler.state_dict()}
        for role, learner in run.learners.items()
    }
    for group, tree in {"learners": learned, "method": run.distiller.state_dict()}.items():
        tensors[group], trees[group] = flatten(tree)
    return tensors, {
        "step": state.step,
        "samples": state.samples,
        "position": state.position,
        "max_steps": state.max_steps,
        "trees": trees,
    }


def restore(run: Run, loaded: Loaded, max_steps: int) -> TrainState:
    """Returns the state of a checkpoint, and puts its tensors into the run's networks, optimizers and method."""
    restore_trainable(run.module, loaded.tensors["weights"])
    for role, average in run.averages.items():
        average.network.load_state_dict(loaded.tensors[role])
    trees = {group: unflatten(loaded.tensors[group], tree) for group, tree in loaded.state["trees"].items()}
    for role, learner in run.learners.items():
        restore_optimizer(learner.optimizer, trees["learners"][role]["optimizer"])
        learner.scaler.load_state_dict(trees["learners"][role]["scaler"])
    run.distiller.load_state_dict(trees["method"])
    saved = loaded.state
    return TrainState(max_steps, saved["step"], saved["samples"], saved["position"])
