import logging
from pathlib import Path

import pytest

from simpletuner.hooks.profiling import ProfilingHook
from simpletuner.training.state import TrainState


@pytest.mark.parametrize(("steps", "last"), [(1, None), (2, None), (3, 3), (9, 4)])
def test_a_run_that_ends_before_its_trace_says_so_and_writes_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, last: int | None
):
    caplog.set_level(logging.INFO)
    hook, state = ProfilingHook(2, tmp_path), TrainState(steps)
    hook.on_start(state)
    for step in range(1, steps + 1):
        state.step = step
        hook.on_step(state, None)
    hook.on_end(state)
    assert [path.name for path in tmp_path.iterdir()] == ([] if last is None else [f"trace-{last:06}.json.gz"])
    assert ("no trace: the run ended" in caplog.text) == (last is None)
