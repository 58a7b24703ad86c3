"""A trace of some steps, for chrome://tracing and https://ui.perfetto.dev (``profile_steps``)."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from simpletuner.hooks.progress import HasStep
from simpletuner.training.metrics import Row

_LOG = logging.getLogger(__name__)
_SETTLING_STEPS = 2
"""Steps of a process before the trace: the first compile kernels, fill caches and count the arithmetic."""


@dataclass
class ProfilingHook:
    """Traces ``num_steps`` steps of this process and writes them into ``folder``."""

    num_steps: int
    folder: Path
    _seen: int = 0
    _trace: profile | None = None

    def on_start(self, state: HasStep) -> None:
        """Has nothing to do yet."""

    def on_step(self, state: HasStep, row: Row | None) -> None:
        """Starts and ends the trace between two steps."""
        self._seen += 1
        if self._seen == _SETTLING_STEPS:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._trace = profile(activities=activities, record_shapes=True)
            self._trace.start()
        elif self._seen == _SETTLING_STEPS + self.num_steps:
            self._write(state.step)

    def on_end(self, state: HasStep) -> None:
        """Writes what there is of a trace that the end of the run cut short."""
        if self._seen <= _SETTLING_STEPS:
            _LOG.warning("profile_steps: no trace: the run ended within the %d steps before it", _SETTLING_STEPS)
            self._trace = None
        self._write(state.step)

    def _write(self, step: int) -> None:
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"trace-{step:06d}.json.gz"
        trace.export_chrome_trace(str(path))
        _LOG.info("a trace of the steps up to %d, for https://ui.perfetto.dev: %s", step, path)
