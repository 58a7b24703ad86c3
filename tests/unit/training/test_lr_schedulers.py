"""Learning rate schedules against closed values; steps are optimizer steps."""

import warnings

import pytest
import torch
from torch.nn import Parameter

from simpletuner.config.schema import OptimizerSection
from simpletuner.training.lr_schedulers import SHAPES, factor, make_lr_scheduler, seek


def section(name: str, **keys: float) -> OptimizerSection:
    return OptimizerSection.model_validate({"lr_scheduler": name, "learning_rate": 1e-3, **keys})


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        # 10 steps of which 2 warm up: p = 0, 1/8, ... from the third update on; entries are updates 1, 2, 3, 5, 7, 10.
        ("constant", {}, [0.5, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", {}, [0.5, 1, 1, 1, 1, 1]),
        ("linear", {}, [0.5, 1, 1, 0.75, 0.5, 0.125]),
        ("linear", {"lr_end": 2e-4}, [0.5, 1, 1, 0.8, 0.6, 0.3]),
        ("cosine", {}, [0.5, 1, 1, 0.8535533905932737, 0.5, 0.03806023374435663]),
        ("cosine_with_restarts", {"lr_num_cycles": 2}, [0.5, 1, 1, 0.5, 1, 0.14644660940672627]),
        ("sine", {}, [0.5, 1, 1, 0.5, 0, 0.8535533905932737]),
        ("sine", {"lr_num_cycles": 2, "lr_end": 1e-4}, [0.5, 1, 1, 0.1, 1, 0.55]),
        ("polynomial", {"lr_power": 2}, [0.5, 1, 1, 0.5625, 0.25, 0.015625]),
        ("polynomial", {"lr_power": 2, "lr_end": 5e-4}, [0.5, 1, 1, 0.78125, 0.625, 0.5078125]),
    ],
)  # fmt: skip
def test_closed_values(name: str, keys: dict[str, float], expected: list[float]) -> None:
    settings = section(name, lr_warmup_steps=2, **keys)
    found = [factor(settings, 1e-3, 10, update - 1) for update in (1, 2, 3, 5, 7, 10)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_warms_up_from_a_nonzero_rate_to_the_full_one(name: str) -> None:
    settings = section(name, lr_warmup_steps=1000)
    assert [factor(settings, 1e-3, 10_000, step) for step in (0, 499, 999, 1000)] == [0.001, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", SHAPES)
def test_without_warmup_the_first_update_has_the_full_rate(name: str) -> None:
    assert factor(section(name), 1e-3, 100, 0) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_decays_arrive_at_lr_end_and_stay_there(name: str) -> None:
    settings = section(name, lr_end=1e-5)
    assert [factor(settings, 1e-3, 100, step) for step in (100, 101, 1000)] == pytest.approx([0.01] * 3)
    assert factor(settings, 1e-3, 100, 99) > 0.01


def test_a_warmup_longer_than_the_run_is_still_a_warmup() -> None:
    settings = section("cosine", lr_warmup_steps=1000)
    assert [factor(settings, 1e-3, 10, step) for step in (0, 9)] == [0.001, 0.01]


def rates(first: int, settings: OptimizerSection, num_steps: int) -> list[float]:
    """Returns the rates of the updates after ``first`` steps, as an optimizer sees them."""
    parameter = Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=settings.learning_rate)
    scheduler = make_lr_scheduler(optimizer, settings, num_steps)
    if first:
        seek(scheduler, first)
    seen: list[float] = []
    for _ in range(first, num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [seen[-1]]
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", SHAPES)
def test_a_resumed_schedule_goes_on_exactly(name: str) -> None:
    settings = section(name, lr_warmup_steps=3, lr_num_cycles=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        straight = rates(0, settings, 20)
        assert straight == [1e-3 * factor(settings, 1e-3, 20, step) for step in range(20)]
        assert all(rates(cut, settings, 20) == straight[cut:] for cut in (1, 3, 10, 19))


def test_groups_keep_their_own_full_rates() -> None:
    groups = [{"params": [Parameter(torch.zeros(1))], "lr": 1e-2}, {"params": [Parameter(torch.zeros(1))]}]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    scheduler = make_lr_scheduler(optimizer, section("linear", lr_end=1e-4), 10)
    seek(scheduler, 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5.05e-3, 5.5e-4], rel=1e-12)
