"""Judges what runs have written beside the model that they started from: scenes, drawn and read.

Only a model that knows the quickstart's scenes can be judged so: their captions say all that a picture shows, and a
judge of rules reads it from the pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.evaluation.drawing import Progress, Sampler, draw_scenes
from simpletuner.evaluation.finished import finished_run
from simpletuner.evaluation.pipelines import base_pipeline, identity
from simpletuner.evaluation.report import Report
from simpletuner.evaluation.samplers import student_samplers, teacher_sampler, undistilled_samplers
from simpletuner.evaluation.scores import Row, best
from simpletuner.hooks.contact_sheet import write_contact_sheet
from simpletuner.plan import Plan
from simpletuner.quickstart.drawing import are_scenes, render
from simpletuner.quickstart.frechet import Moments, distance, features, moments, moments_of
from simpletuner.quickstart.judge import score
from simpletuner.quickstart.scenes import Scene, make_prompt

QUICK, FULL = 128, 512
"""Numbers of prompts."""
_COUNTS = (QUICK, 256, FULL)
"""Numbers of pictures for which an evaluation of more gives the Frechet distance too."""
UNDISTILLED = "undistilled.json"
"""How a model draws without distillation: where it is found in the model's folder, it is not measured again."""
_NUM_REAL, _REAL_SEED = 2048, 1
_NUM_SHOWN = 6
"""Scenes on the contact sheet."""


def evaluate(plan: Plan, results: Sequence[Path], num_prompts: int, progress: Progress) -> Report:
    """Returns how the results of runs draw, and writes it into ``evaluation`` in the plan's output_dir.

    Args:
        plan: Of one of the runs.
        results: Output folders of finished runs that differ in their seed alone.
        num_prompts: Pictures for each way to draw and each result.
        progress: Told how the drawing goes on.

    Raises:
        UserError: The model does not know the scenes, or a run has not finished.
    """
    require_scenes(plan)
    return _Evaluation(plan, num_prompts, progress).run(results)


def knows_scenes(plan: Plan) -> bool:
    """Returns whether the model of a run learns the scenes, so that its pictures can be read."""
    return any(are_scenes(summary.config.instance_data_dir) for summary in plan.datasets)


def require_scenes(plan: Plan) -> None:
    """Raises UserError for a run whose model cannot be judged; a run asks before it trains."""
    if not knows_scenes(plan):
        raise UserError(
            "evaluation: only models of the quickstart's scenes can be judged yet, and no dataset has drawn scenes; in "
            "a config of your own leave evaluation_prompts out"
        )


@dataclass(frozen=True)
class _Evaluation:
    """All pictures are of the same scenes, from the same noise."""

    plan: Plan
    num_prompts: int
    progress: Progress

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.plan.config.run.output_dir / "evaluation"

    @cached_property
    def scenes(self) -> list[Scene]:
        """What is to be drawn; its captions are made apart from those of training pictures."""
        return [make_prompt(0, index) for index in range(self.num_prompts)]

    @cached_property
    def real(self) -> Moments:
        """Of pictures of other scenes."""
        return moments([render(make_prompt(_REAL_SEED, index)) for index in range(_NUM_REAL)])

    @cached_property
    def base(self) -> Any:  # Any: a diffusers pipeline
        """Draws with the model that the runs started from."""
        return base_pipeline(self.plan.family, self.plan.source, self.plan.weight_dtype)

    @cached_property
    def teacher_samplers(self) -> list[Sampler]:
        """Of that model: first its own, then those of a few steps."""
        config = self.plan.facts.scheduler_config
        assert config is not None  # the model is on this machine
        return [teacher_sampler(config), *undistilled_samplers(config)]

    def run(self, results: Sequence[Path]) -> Report:
        """Returns the report, and writes it."""
        runs = [finished_run(result) for result in results]
        students = [run.pipeline() for run in runs]
        samplers = student_samplers(runs[0].scheduler_config, runs[0].sampling)
        real = self._judge("real pictures", 0, [[render(scene) for scene in self.scenes]])
        teacher, undistilled = self._undistilled()
        drawn = [self._draw(pipeline, samplers) for pipeline in students]
        student = [
            self._judge(sampler.label, sampler.num_inference_steps, [pictures[index] for pictures in drawn])
            for index, sampler in enumerate(samplers)
        ]
        report = Report(real, teacher, undistilled, student)
        with files_into(self.folder) as made:
            (made / "evaluation.md").write_text(report.markdown(), encoding="utf8")
            (made / "evaluation.json").write_text(json.dumps(report.json(), indent=1) + "\n", encoding="utf8")
        self._show([*self._teacher_columns(best(undistilled, 2).label), *zip(samplers, drawn[0], strict=True)])
        return report

    def _undistilled(self) -> tuple[Row, list[Row]]:
        """Returns how the model draws without distillation, slowly and fast: measured once, and kept."""
        samplers, model = self.teacher_samplers, identity(self.plan)
        labels = [sampler.label for sampler in samplers]
        for place in (Path(self.plan.source.path), self.folder):
            rows = _read(place / UNDISTILLED, model, labels, self.num_prompts)
            if rows:
                return rows[0], rows[1:]
        drawn = self._draw(self.base, samplers)
        rows = [
            self._judge(sampler.label, sampler.num_inference_steps, [pictures])
            for sampler, pictures in zip(samplers, drawn, strict=True)
        ]
        document = {"model": model, "rows": [row.to_json() for row in rows]}
        with files_into(self.folder) as made:
            (made / UNDISTILLED).write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")
        return rows[0], rows[1:]

    def _draw(self, pipeline: Any, samplers: Sequence[Sampler]) -> list[list[Image]]:
        """Returns for each sampler a picture of each scene."""
        return [draw_scenes(pipeline, sampler, self.scenes, self.progress) for sampler in samplers]

    def _judge(self, label: str, num_inference_steps: int, by_seed: Sequence[Sequence[Image]]) -> Row:
        """Returns the row of pictures, of each seed a picture of each scene."""
        right = [
            [all(score(picture, scene).values()) for picture, scene in zip(pictures, self.scenes, strict=True)]
            for pictures in by_seed
        ]
        counts = {count for count in (*_COUNTS, self.num_prompts) if count <= self.num_prompts}
        values = [features(pictures) for pictures in by_seed]
        frechet = {
            count: tuple(distance(moments_of(seed[:count]), self.real) for seed in values) for count in sorted(counts)
        }
        return Row(label, num_inference_steps, np.array(right, np.bool_), frechet)

    def _teacher_columns(self, few_label: str) -> list[tuple[Sampler, list[Image]]]:
        """Returns the shown pictures of the teacher at its own settings, and by the sampler of a label."""
        own, *others = self.teacher_samplers
        chosen = [own, *(sampler for sampler in others if sampler.label == few_label)]
        return [(each, draw_scenes(self.base, each, self.scenes[:_NUM_SHOWN], self.progress)) for each in chosen]

    def _show(self, columns: Sequence[tuple[Sampler, Sequence[Image]]]) -> None:
        """Writes the first pictures of each sampler, and the contact sheet."""
        names = [f"{index:03}.png" for index in range(min(_NUM_SHOWN, self.num_prompts))]
        folders: list[tuple[str, Path]] = []
        with files_into(self.folder) as made:
            for number, (sampler, pictures) in enumerate(columns):
                (made / f"pictures/{number}").mkdir(parents=True)
                folders.append((sampler.label, self.folder / f"pictures/{number}"))
                for name, picture in zip(names, pictures, strict=False):
                    picture.save(made / f"pictures/{number}" / name)
        rows = [(scene.caption, name) for scene, name in zip(self.scenes, names, strict=False)]
        write_contact_sheet(self.folder / "contact_sheet.png", folders, rows)


def _read(path: Path, model: str, labels: Sequence[str], num_prompts: int) -> list[Row]:
    """Returns the rows of a file for so many prompts, or none when it is not there or of something else."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf8"))
    rows = [Row.from_json(row) for row in document["rows"]]
    fits = document["model"] == model and [row.label for row in rows] == list(labels)
    if not fits or any(num_prompts not in row.frechet for row in rows):
        return []
    return [row.first(num_prompts) for row in rows]
