"""Learning rate schedules against closed values; steps are optimizer steps."""

import pytest

from simpletuner.config.schema import OptimizerSection
from simpletuner.training.lr_schedulers import SHAPES, factor, learning_rate


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
    found = [factor(settings, 10, update - 1) for update in (1, 2, 3, 5, 7, 10)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_warms_up_from_a_nonzero_rate_to_the_full_one(name: str) -> None:
    settings = section(name, lr_warmup_steps=1000)
    assert [factor(settings, 10_000, step) for step in (0, 499, 999, 1000)] == [0.001, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", SHAPES)
def test_without_warmup_the_first_update_has_the_full_rate(name: str) -> None:
    assert factor(section(name), 100, 0) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_decays_arrive_at_lr_end_and_stay_there(name: str) -> None:
    settings = section(name, lr_end=1e-5)
    assert [factor(settings, 100, step) for step in (100, 101, 1000)] == pytest.approx([0.01] * 3)
    assert factor(settings, 100, 99) > 0.01


def test_a_warmup_longer_than_the_run_is_still_a_warmup() -> None:
    settings = section("cosine", lr_warmup_steps=1000)
    assert [factor(settings, 10, step) for step in (0, 9)] == [0.001, 0.01]


@pytest.mark.parametrize("name", SHAPES)
def test_the_rate_is_never_zero_while_the_run_lasts(name: str) -> None:
    # sine touches lr_end in the middle; all others stay above it up to the last update.
    settings = section(name, lr_warmup_steps=5, lr_end=1e-9)
    assert all(0 < learning_rate(settings, 1000, step) <= 1e-3 for step in range(1000))


def test_lr_end_is_a_rate_and_not_a_factor() -> None:
    settings = OptimizerSection.model_validate({"lr_scheduler": "linear", "learning_rate": 1e-2, "lr_end": 1e-4})
    assert [learning_rate(settings, 10, step) for step in (0, 5, 10)] == pytest.approx([1e-2, 5.05e-3, 1e-4], rel=1e-12)
