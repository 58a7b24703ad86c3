"""Keeps ``report.html`` in output_dir up to date: what a run is doing, on one page."""

import json
import logging
import time
from dataclasses import dataclass, field

from simpletuner.backends._base import open_backend
from simpletuner.config.errors import UserError
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.transforms import BadImage
from simpletuner.hooks.validation import NOTES, requests_of
from simpletuner.plan import Plan
from simpletuner.plan_view import plan_rows
from simpletuner.publishing.report import (
    BucketPictures,
    Report,
    code_of,
    curves_of,
    markdown_table,
    pictures_of,
    thumbnail_uri,
    write_report,
)
from simpletuner.publishing.result import CARD
from simpletuner.training import metrics
from simpletuner.training.state import TrainState

_LOG = logging.getLogger(__name__)
_IMAGES_OF_A_BUCKET = 6
_MOST_BUCKETS = 12


@dataclass
class ReportHook:
    """Writes the page when there are new pictures, at checkpoints, and at the end."""

    plan: Plan
    dataset: CachedDataset
    _buckets: list[BucketPictures] | None = field(default=None, repr=False)

    def on_start(self, state: TrainState) -> None:
        """Writes the page with what there is before the first step."""
        self.write(state)

    def on_step(self, state: TrainState, row: metrics.Row | None) -> None:
        """Writes the page where pictures or a checkpoint are due, save at the last step: see ``on_end``."""
        intervals = (self.plan.validation.step_interval, self.plan.config.run.checkpoint_step_interval)
        if not state.finished and any(interval and state.step % interval == 0 for interval in intervals):
            self.write(state)

    def on_end(self, state: TrainState) -> None:
        """Leaves the last page to the run, which writes it when the result is there and judged."""

    def write(self, state: TrainState) -> None:
        """Writes the page; what goes wrong is said, and ends no run."""
        try:
            write_report(self.plan.config.run.output_dir, self._report(state))
        except (OSError, UserError, ValueError, SyntaxError) as error:
            _LOG.warning("report.html could not be written: %s", self.plan.config.hide(str(error)))

    def _report(self, state: TrainState) -> Report:
        plan, hide = self.plan, self.plan.config.hide
        folder = plan.config.run.output_dir
        if self._buckets is None:
            self._buckets = list(self._bucket_pictures())
        rows = metrics.read(folder / metrics.FILE_NAME)
        steps, curves = curves_of(rows)
        moments, pictures = pictures_of(folder / "validation", self._prompts(), self._labels())
        card, judged = folder / CARD, folder / "evaluation" / "evaluation.md"
        method = "fine-tuning" if plan.method == "sft" else f"distillation by {plan.method}"
        return Report(
            title=f"{hide(plan.source.path.rstrip('/').rpartition('/')[2])}: {method}",
            status=[("Step", f"{state.step} of {plan.max_steps}"), *_latest(rows), ("Written", time.strftime("%F %T"))],
            warnings=[hide(notice) for notice in plan.notices],
            plan=[(heading, hide(text)) for heading, text in plan_rows(plan).items()],
            steps=steps,
            curves=curves,
            moments=moments,
            pictures=pictures,
            buckets=self._buckets,
            tables=[("Judged", markdown_table(judged.read_text(encoding="utf8")))] if judged.is_file() else [],
            code=hide(code_of(card.read_text(encoding="utf8"))) if card.is_file() else "",
        )

    def _prompts(self) -> dict[str, str]:
        """Returns the file of each picture of a column -> what is written over it."""
        hide = self.plan.config.hide
        return {request.file_name: hide(request.label) for request in requests_of(self.plan.validation)}

    def _labels(self) -> dict[str, str]:
        path = self.plan.config.run.output_dir / "validation" / NOTES
        noted = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
        return {folder: self.plan.config.hide(column["label"]) for folder, column in noted.items()}

    def _bucket_pictures(self) -> list[BucketPictures]:
        """Returns some images of each bucket; those that cannot be read are passed over."""
        configs = {summary.config.id: summary.config for summary in self.plan.datasets}
        found: list[BucketPictures] = []
        for dataset_id, (width, height), count, ids in self.dataset.examples(_IMAGES_OF_A_BUCKET, _MOST_BUCKETS):
            backend = open_backend(configs[dataset_id])
            pictures: list[tuple[str, str]] = []
            for name in ids:
                try:
                    with backend.open(name) as file:
                        pictures.append((name, thumbnail_uri(file.read())))
                except (OSError, BadImage):
                    continue
            hide = self.plan.config.hide
            named = [(hide(name), picture) for name, picture in pictures]
            found.append(BucketPictures(hide(f"{dataset_id}, {width}x{height}"), count, named))
        return found


def _latest(rows: list[metrics.Row]) -> list[tuple[str, str]]:
    """Returns the last loss and rate of a run."""
    names = {"loss": "Loss", "eval_loss": "Held-out loss", "samples_per_second": "Samples a second"}
    last = {key: value for row in rows for key, value in row.items()}
    return [(heading, f"{last[name]:.4g}") for name, heading in names.items() if name in last]
