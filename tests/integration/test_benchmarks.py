"""The benchmarks of the step still run: they measure by hand, so nothing else would tell."""

from pathlib import Path

import torch

from simpletuner.training.adapters import trainable_parameters
from tests.benchmarks.savings import WAYS, Step
from tests.benchmarks.step import make_floor, make_trainer, write_model


def test_trainer_floor_and_each_way_of_a_step(tmp_path: Path):
    trainer = make_trainer("a", tmp_path, write_model("a", tmp_path), 2, compiles=False)
    floor, update = make_floor(trainer, None)
    before = {name: p.detach().clone() for name, p in trainable_parameters(trainer.run.module).items()}
    floor()
    update()
    trainer._optimizer_step(trainer.run.dataset.batches(None))
    assert trainer.state.step == 1
    after = trainable_parameters(trainer.run.module)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    batch, _ = next(iter(trainer.run.dataset.batches(None)))
    for way in WAYS.values():
        Step(trainer.run, batch, way)()
