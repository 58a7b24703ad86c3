from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.errors import UserError
from simpletuner.data.sampler import Window
from simpletuner.duration import never_shown, windows
from tests.unit.data.support import dataset


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({}, Window(0, None)),
        ({"start_step": 3, "end_step": 8}, Window(6, 16)),
        ({"start_epoch": 2, "end_epoch": 3}, Window(5, 15)),
        ({"start_step": 3, "start_epoch": 2}, Window(6, None)),  # both must have come
        ({"start_step": 2, "start_epoch": 2}, Window(5, None)),
        ({"end_step": 8, "end_epoch": 3}, Window(0, 15)),  # the first ends it
    ],
)
def test_steps_and_epochs_are_batches(tmp_path: Path, keys: dict[str, Any], window: Window):
    assert windows([dataset(tmp_path, **keys)], batches_per_epoch=5, accumulation=2) == {"pictures": window}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ([{}], []),
        ([{"end_step": 30}, {"start_step": 30}], []),
        ([{"end_step": 30}, {"start_step": 20, "end_step": 100}], []),
        ([{}, {"start_step": 100}], ["'b' is never shown: it begins at step 100, and the run has 100"]),
        ([{"end_step": 30}, {"start_step": 40}], "no dataset is shown from step 30 to step 40 of 100; let"),
        ([{"start_step": 1}], "no dataset is shown from step 0 to step 1 of 100"),
        ([{"end_step": 60}, {"start_step": 20, "end_step": 80}], "no dataset is shown from step 80 to step 100 of 100"),
        ([{"probability": 0.0}, {"start_step": 200}], "no dataset is shown from step 0 to step 100 of 100"),
    ],
)
def test_some_dataset_is_shown_at_every_step(tmp_path: Path, keys: list[dict[str, Any]], told: list[str] | str):
    datasets = [dataset(tmp_path, id=name, **own) for name, own in zip("ab", keys, strict=False)]
    shown = windows(datasets, 10, 3)
    if isinstance(told, str):
        with pytest.raises(UserError, match=told):
            never_shown(datasets, shown, 3, steps=100)
    else:
        lines = never_shown(datasets, shown, 3, steps=100)
        assert [line.removeprefix("dataset ") for line in lines] == told
