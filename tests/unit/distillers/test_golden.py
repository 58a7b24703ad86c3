"""Losses of a few steps, float64, as they were when they were last right; a refactor leaves them as they are.

A change of numerics is written with ``python -m tests.unit.distillers.test_golden`` and explained in its commit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner import registry
from simpletuner.config.schema import ObjectiveSection
from simpletuner.randomness import Randomness
from simpletuner.schedules import FlowSchedule, from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER, ToyNetwork, add_lora, toy_batch, toy_setup, trainable

GOLDEN = Path(__file__).parents[2] / "golden" / "losses.json"
NUM_STEPS = 5
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lcm epsilon l2": ("lcm", "epsilon", {"w_min": 1.0, "w_max": 12.0}),
    "lcm v huber": (
        "lcm",
        "v_prediction",
        {"loss_type": "huber", "num_ddim_timesteps": 40, "w_min": 7.5, "w_max": 7.5},
    ),
    "pcm epsilon cauchy": ("pcm", "epsilon", {"loss_type": "cauchy", "huber_c": 0.1}),
    "tcd v dpm2s": ("tcd", "v_prediction", {"solver": "dpm2s", "num_ddim_timesteps": 40}),
    "sft epsilon": ("sft", "epsilon", {}),
    "sft v min-SNR offset": ("sft", "v_prediction", {"snr_gamma": 5.0, "offset_noise": True}),
    "sft flow huber": ("sft", "flow_prediction", {"loss_type": "huber"}),
}


def losses(name: str) -> list[float]:
    """Returns the mean losses of a run's first steps with plain gradient descent."""
    method, kind, options = RUNS[name]
    schedule = FlowSchedule(3.0) if kind == "flow_prediction" else from_scheduler_config(SDXL_SCHEDULER)
    module = add_lora(ToyNetwork())
    plugin = registry.load("distillers", method)
    config, _ = plugin.configure(options, ObjectiveSection())
    distiller = plugin(toy_setup(config, schedule, kind, module))
    optimizer = torch.optim.SGD(trainable(module).values(), lr=0.02)
    found: list[float] = []
    for step in range(NUM_STEPS):
        batch = toy_batch(4, first=4 * step)
        loss = distiller.loss("student", batch, distiller.draw(batch, Randomness(42)), step).per_sample.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(module).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_unchanged(name: str) -> None:
    assert losses(name) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-9)


def test_the_file_has_these_runs() -> None:
    assert json.loads(GOLDEN.read_text()).keys() == RUNS.keys()


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in RUNS}, indent=1) + "\n")
