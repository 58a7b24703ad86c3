"""Uploads the weights of every checkpoint behind the run's back: what a sampler needs, never the optimizer's state."""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from simpletuner.plan import Plan
from simpletuner.publishing.hub import Hub
from simpletuner.publishing.result import write_weights
from simpletuner.training.build import Run
from simpletuner.training.metrics import Row
from simpletuner.training.sampling import student_settings
from simpletuner.training.state import TrainState

_LOG = logging.getLogger(__name__)
_PREFIX = ".upload-"


@dataclass(frozen=True)
class CheckpointUpload:
    """A hook of the main process; one checkpoint at a time is on its way, and later ones are left out meanwhile."""

    plan: Plan
    run: Run
    hub: Hub

    def on_start(self, state: TrainState) -> None:
        """Removes what a killed run had not uploaded yet."""
        for left in self.plan.config.run.output_dir.glob(f"{_PREFIX}*"):
            shutil.rmtree(left)

    def on_step(self, state: TrainState, row: Row | None) -> None:
        """Starts the upload of a checkpoint that was just saved, save that of the last step: it is the result."""
        settings = self.plan.config.run
        interval = settings.checkpoint_step_interval
        if state.finished or not interval or state.step % interval:
            return
        name = f"checkpoint-{state.step}"
        if self.hub.is_busy:
            _LOG.info("%s is not uploaded: the one before it is still on its way", name)
            return
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=settings.output_dir))
        with self.run.averaged_weights():
            write_weights(self.plan, self.run, student_settings(self.plan, self.run), folder)
        self.hub.upload_behind(folder, name)

    def on_end(self, state: TrainState) -> None:
        """Waits for what is on its way."""
        self.hub.wait()
