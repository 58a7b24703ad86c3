"""One optimizer step: its gradient is the mean of all samples, however they are cut; it is clipped; nothing waits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.batch import Batch
from simpletuner.config.errors import UserError
from simpletuner.data.sampler import Position
from simpletuner.randomness import Randomness
from simpletuner.training.build import Run
from simpletuner.training.meter import StepMeter
from simpletuner.training.metrics import Row
from simpletuner.training.state import TrainState
from simpletuner.training.trainer import LoopSettings, Trainer
from tests.integration.conftest import SETTINGS, Project
from tests.tiny import image_folder

NOWHERE: Position = {"samples": 0, "datasets": {}}


class Recorder(Optimizer):
    """Keeps the gradients that it is given, and leaves the weights alone."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.given: list[Tensor] = []

    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.given = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@dataclass
class Bench:
    """A run in float64 whose steps leave no trace but their gradients, and a batch of five samples for it."""

    run: Run
    batch: Batch
    written: list[Row] = field(default_factory=list[Row])
    meter: StepMeter = field(default_factory=lambda: StepMeter(torch.device("cpu")))

    def step(self, window: Sequence[Batch], **settings: Any) -> tuple[list[Tensor], Row]:
        """Returns the gradients and the row of one optimizer step over a window of micro-batches."""
        parameters = self.run.learners["student"].parameters
        learner = replace(self.run.learners["student"], optimizer=Recorder(parameters))
        defaults = {"max_grad_norm": 0.0, "clips_values": False, "learning_rate": lambda step: 0.25}
        numbers = LoopSettings(
            seed=42,
            gradient_accumulation_steps=len(window),
            checkpoint_step_interval=0,
            logging_steps=1,
            **defaults | settings,
        )
        run = replace(self.run, learners={"student": learner})
        trainer = Trainer(run, numbers, TrainState(9), [], lambda state: None, self.written.extend, self.meter)
        trainer._optimizer_step(iter([(batch, NOWHERE) for batch in window]))
        row = trainer._flush()
        assert row is not None
        return learner.optimizer.given, row

    def samples(self, *indices: int, filler: int = 0) -> Batch:
        """Returns a micro-batch of some of the five samples, and behind them so many copies with weight 0."""
        rows = torch.tensor([*indices, *[0] * filler])
        weight = torch.tensor([1.0] * len(indices) + [0.0] * filler)
        pick = {name: getattr(self.batch, name)[rows] for name in ("mean", "std", "dropped", "geometry", "position")}
        cond = {name: value[rows] for name, value in self.batch.cond.items()}
        ids = tuple(self.batch.ids[row] for row in rows)
        return replace(self.batch, **pick, cond=cond, ids=ids, weight=weight, global_weight=float(len(indices)))

    def mean_gradient(self) -> list[Tensor]:
        """Returns the mean of the five samples' gradients, each taken alone."""
        parameters = self.run.learners["student"].parameters
        total = [torch.zeros_like(p) for p in parameters]
        for index in range(5):
            batch = self.samples(index)
            draw = self.run.distiller.draw(batch, Randomness(42))
            (loss,) = self.run.distiller.loss("student", batch, draw, 0).per_sample
            for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                sum_ += gradient / 5
        return total


@pytest.fixture(scope="module", params=["lcm", "sft"])
def bench(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("five")
    paths = {"pretrained_model_name_or_path": str(tiny_model), "output_dir": str(folder / "output")}
    project = Project(folder, SETTINGS | paths)
    project.use_pictures(image_folder(folder / "pictures", 5, [(96, 96)]), folder / "cache")
    sft = {"distillation_method": None, "distillation_config": None} if request.param == "sft" else {}
    run = project.build(train_batch_size=5, **sft)
    run.module.double()
    with torch.no_grad():
        for parameter in run.learners["student"].parameters:  # lora_B starts at zero, where lora_A has no gradient
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    batch, _ = next(run.dataset.batches())
    return Bench(run, batch)


def norm_of(gradients: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    scale = max(float(gradient.abs().max()) for gradient in expected)
    assert scale > 1e-6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * scale)


def test_the_gradient_is_the_mean_of_the_samples_however_they_are_cut(bench: Bench):
    expected = bench.mean_gradient()
    losses: list[float] = []
    for window in (
        [bench.samples(0, 1, 2, 3, 4)],
        [bench.samples(0), bench.samples(1, 2, 3, 4)],
        [bench.samples(3, 1), bench.samples(0, 2), bench.samples(4)],
        [bench.samples(0, 1, filler=1), bench.samples(2, 3, 4, filler=2)],
    ):
        gradients, row = bench.step(window)
        close(gradients, expected)
        losses.append(row["loss"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)  # logged in float32


def test_the_logged_norm_is_that_of_the_gradient(bench: Bench):
    window = [bench.samples(0, 1), bench.samples(2, 3, 4)]
    expected = norm_of(bench.mean_gradient())
    for limit in (0.0, 0.5 * expected, 2 * expected):
        assert bench.step(window, max_grad_norm=limit)[1]["grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_clipping_scales_the_gradient_down_to_the_limit(bench: Bench):
    window, expected = [bench.samples(0, 1), bench.samples(2, 3, 4)], bench.mean_gradient()
    limit = 0.25 * norm_of(expected)
    gradients, _ = bench.step(window, max_grad_norm=limit)
    assert norm_of(gradients) == pytest.approx(limit, rel=1e-3)  # torch adds 1e-6 to the norm
    factor = norm_of(gradients) / norm_of(expected)
    close(gradients, [factor * gradient for gradient in expected])


def test_a_limit_above_the_norm_changes_nothing(bench: Bench):
    window, expected = [bench.samples(0, 1), bench.samples(2, 3, 4)], bench.mean_gradient()
    close(bench.step(window, max_grad_norm=2 * norm_of(expected))[0], expected)


def test_values_are_clipped_one_by_one(bench: Bench):
    window, expected = [bench.samples(0, 1), bench.samples(2, 3, 4)], bench.mean_gradient()
    limit = 0.1 * max(float(gradient.abs().max()) for gradient in expected)
    gradients, row = bench.step(window, max_grad_norm=limit, clips_values=True)
    close(gradients, [gradient.clamp(-limit, limit) for gradient in expected])
    assert row["grad_norm"] == pytest.approx(norm_of(expected), rel=1e-6)


class NoWaiting(TorchDispatchMode):
    """Raises where a value of a tensor, or a shape that depends on one, would be read: on a GPU that waits for it."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(read in str(func) for read in self.READS):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_an_update_waits_for_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Draws are made on the host, from positions that are there; from then on until metrics are read nothing waits."""
    waited = Trainer._update

    def guarded(self: Trainer, role: str, window: Any) -> Any:
        with NoWaiting():
            return waited(self, role, window)

    monkeypatch.setattr(Trainer, "_update", guarded)
    window = [bench.samples(0, 1), bench.samples(2, 3, 4)]
    for settings in ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1e-3, "clips_values": True}):
        bench.step(window, **settings)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        window[0].mean.sum().item()


def test_the_rate_of_a_step_is_set_and_logged(bench: Bench):
    learner = bench.run.learners["student"]
    _, row = bench.step([bench.samples(0)], learning_rate=lambda step: 0.125 * (step + 1))
    assert row["learning_rate"] == 0.125
    assert learner.parameters[0].grad is None  # nothing is left for the next step to add to


def test_a_loss_that_is_no_number_stops_the_run(bench: Bench):
    """Its row is written, so that a reader sees where; nothing is saved after it."""
    broken = bench.samples(0, 1)
    broken = replace(broken, mean=broken.mean * math.nan)
    with pytest.raises(UserError, match="the loss is not finite at step 1"):
        bench.step([broken])
    assert math.isnan(bench.written[-1]["loss"])
