"""Draws the validation prompts every so often, with the sampler that the method's users will use."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from simpletuner.atomic import files_into
from simpletuner.batch import Cond
from simpletuner.data.cache import digest
from simpletuner.hooks.contact_sheet import write_contact_sheet
from simpletuner.plan import Plan, ValidationPlan
from simpletuner.training.build import Run
from simpletuner.training.metrics import Row
from simpletuner.training.sampling import SamplingSettings, base_dtype, base_settings, draw_picture, student_settings
from simpletuner.training.state import TrainState

_LOG = logging.getLogger(__name__)
NOTES = "columns.json"


@dataclass(frozen=True)
class Request:
    """One picture to draw at every validation."""

    prompt: str
    size_px: tuple[int, int]
    """Width and height."""
    seed: int
    negative_prompt: str | None = None
    """None: the run's."""
    guidance_scale: float | None = None
    """None: that of the column."""

    @property
    def file_name(self) -> str:
        """The file in each column's folder: readable, and another one for another prompt, or drawn otherwise."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower())[:40].strip("-")
        width, height = self.size_px
        own = [str(wish) for wish in (self.negative_prompt, self.guidance_scale) if wish is not None]
        return f"{words}-{digest(self.prompt, *own)[:6]}-{width}x{height}-{self.seed}.png"

    @property
    def label(self) -> str:
        """The row's heading on the contact sheet."""
        return f"{self.size_px[0]}x{self.size_px[1]}, seed {self.seed}: {self.prompt}"


@dataclass(frozen=True)
class Column:
    """A moment of the run on the contact sheet, or the base model to compare with."""

    folder: str
    label: str
    network: nn.Module
    settings: SamplingSettings
    use_adapter: bool

    @property
    def step(self) -> int:
        """Finished optimizer steps; 0 for the base model."""
        return int(self.folder.split("-")[1]) if self.folder.startswith("step-") else 0

    @property
    def is_base(self) -> bool:
        """Whether it shows the base model."""
        return not self.folder.startswith("step-")

    @property
    def role(self) -> str:
        """What is the same at every step: ``trained``, the name of an average, or of the base model."""
        return re.sub(r"^step-\d+-?", "", self.folder) or "trained"


ShowPictures = Callable[[int, Mapping[str, Path]], None]
"""Is told the step, and the pictures that were drawn of it, by a name that is the same at every step."""


def requests_of(validation: ValidationPlan) -> list[Request]:
    """Returns the pictures of a column."""
    return [
        Request(wish.prompt, size_px, seed, wish.negative_prompt, wish.guidance)
        for wish in validation.wishes
        for size_px in wish.sizes_px or validation.sizes_px
        for seed in (validation.seeds if wish.seed is None else (wish.seed,))
    ]


def make_validation(plan: Plan, run: Run, show: ShowPictures) -> "Validation":
    """Returns the hook that draws what the plan says, and shows it on the main process."""
    validation = plan.validation
    requests = requests_of(validation)
    # A file is named by its prompt, which others may not read where the environment filled it in.
    public = [plan.config.hide(request.prompt) == request.prompt for request in requests]
    return Validation(
        run,
        {r: r.file_name.removesuffix(".png") if public[i] else f"picture-{i}" for i, r in enumerate(requests)},
        validation.negative_prompt,
        student=student_settings(plan, run),
        other_steps=validation.other_steps,
        base=base_settings(plan),
        folder=plan.config.run.output_dir / "validation",
        step_interval=validation.step_interval,
        draws_base=not plan.config.run.disable_benchmark,
        draws_at_start=plan.config.validation.validation_on_startup,
        show=show,
    )


class Validation:
    """A hook that draws every request at every interval and keeps the contact sheet up to date."""

    def __init__(
        self,
        run: Run,
        requests: Mapping[Request, str],
        negative_prompt: str,
        student: SamplingSettings,
        other_steps: Sequence[int],
        base: SamplingSettings,
        folder: Path,
        step_interval: int,
        draws_base: bool,
        draws_at_start: bool,
        show: ShowPictures,
    ) -> None:
        self._run = run
        self._requests = list(requests)
        self._names = requests
        self._negative_prompt = negative_prompt
        self._student, self._other_steps = student, other_steps
        self._step_interval = step_interval
        self._folder = folder
        self._draws_at_start = draws_at_start
        self._show = show
        few = f"base, {student.num_inference_steps} steps"
        self._base_columns = [
            Column("base", f"base, {base.num_inference_steps} steps", run.teacher, base, use_adapter=False),
            Column("base-few-steps", few, run.teacher, student, use_adapter=False),
        ][: 2 if draws_base else 0]

    def on_start(self, state: TrainState) -> None:
        """Draws the base model once, while it is still at hand: it may be the very weights that are trained."""
        if self._run.accelerator.is_main_process:
            self._remove_stale(state.step)
        self._run.accelerator.wait_for_everyone()
        stays = self._run.has_adapter or self._run.teacher is not self._run.module
        self._draw(self._base_columns if stays or state.step == 0 else [])
        if state.step:
            self.on_step(state, None)
        elif self._draws_at_start:
            self._draw(self._columns(0))

    def _remove_stale(self, step: int) -> None:
        """Removes what was drawn by steps that are about to be made again; from the start on, by another model too."""
        if step == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        for folder in self._folder.glob("step-*"):
            if _step_of(folder) > step:
                shutil.rmtree(folder)

    def on_step(self, state: TrainState, row: Row | None) -> None:
        """Draws the student where the interval or the end of the run asks for it."""
        if state.finished or (self._step_interval and state.step % self._step_interval == 0):
            self._draw(self._columns(state.step))

    def on_end(self, state: TrainState) -> None:
        """Has nothing left to do: the last step was drawn when it was made."""

    def _columns(self, step: int) -> list[Column]:
        """Returns what is drawn at a step: the trained weights, and each average of them."""
        folder, label = f"step-{step:06d}", f"step {step}, {self._student.num_inference_steps} steps"
        trained = Column(folder, label, self._run.module, self._student, use_adapter=True)
        others = [
            Column(
                f"{folder}-{number}steps",
                f"step {step}, {number} step{'s' if number > 1 else ''}",
                self._run.module,
                replace(self._student, num_inference_steps=number),
                use_adapter=True,
            )
            for number in self._other_steps
        ]
        averages = [
            Column(f"{folder}-{role}", f"{label}, average", average.network, self._student, use_adapter=True)
            for role, average in self._run.averages.items()
        ]
        return [trained, *others, *averages]

    def _draw(self, columns: Sequence[Column]) -> None:
        """Draws what is missing of the columns, then the sheet."""
        drawn = [column for column in columns if self._draw_column(column)]
        if drawn and self._run.accelerator.is_main_process:
            self._write_sheet()
            for column in drawn:
                paths = {
                    name: self._folder / column.folder / request.file_name for request, name in self._names.items()
                }
                self._show(column.step, {f"{column.role}/{name}": path for name, path in paths.items()})

    def _draw_column(self, column: Column) -> bool:
        """Draws this rank's share of a column's missing pictures; returns whether there were any."""
        run, folder = self._run, self._folder / column.folder
        if run.accelerator.is_main_process:
            self._note(column)
        run.accelerator.wait_for_everyone()
        missing = [request for request in self._requests if not (folder / request.file_name).exists()]
        run.accelerator.wait_for_everyone()  # all have looked before one draws: else they would share different lists
        if missing:
            started = time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            vae = run.load_vae(base_dtype(column.network))
            with run.averaged_weights():
                for request in missing[run.accelerator.process_index :: run.accelerator.num_processes]:
                    self._draw_one(column, request, vae, folder / request.file_name)
            del vae
            if run.accelerator.is_main_process:
                pictures = f"{len(missing)} picture{'s' if len(missing) > 1 else ''}"
                _LOG.info("drew %s in %.1f s: %s", pictures, time.perf_counter() - started, folder)
        run.accelerator.wait_for_everyone()
        return bool(missing)

    def _note(self, column: Column) -> None:
        """Writes down how a column is drawn; removes what was drawn otherwise, save whole columns of finished steps."""
        folder, how = self._folder / column.folder, column.settings.identity(self._negative_prompt)
        noted = self._noted()
        before = noted.get(column.folder, {}).get("how", how if not column.is_base else None)
        whole = all((folder / request.file_name).exists() for request in self._requests)
        if before != how:
            if whole and not column.is_base:
                return
            shutil.rmtree(folder, ignore_errors=True)
        with files_into(self._folder) as made:
            document = {**noted, column.folder: {"label": column.label, "how": how}}
            (made / NOTES).write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")

    def _noted(self) -> dict[str, dict[str, str]]:
        """Returns the label of each column that was drawn, and how it was: the config may say otherwise by now."""
        path = self._folder / NOTES
        return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}

    def _draw_one(self, column: Column, request: Request, vae: nn.Module, path: Path) -> None:
        cond, settings = self._run.dataset.prompt(request.prompt), column.settings
        if request.guidance_scale is not None:
            settings = replace(settings, guidance_scale=request.guidance_scale)
        picture = draw_picture(
            self._run.family,
            column.network,
            vae,
            settings,
            cond,
            self._negative(cond, request),
            request.size_px,
            request.seed,
            column.use_adapter,
        )
        temporary = path.with_suffix(".tmp")
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)

    def _negative(self, cond: Cond, request: Request) -> Cond:
        """Returns the features [1, ...] of the negative prompt; without one, what a pipeline takes that got none."""
        text = self._negative_prompt if request.negative_prompt is None else request.negative_prompt
        negative = self._run.dataset.prompt(text)
        return negative if text else self._run.family.uncond(cond, negative)

    def _write_sheet(self) -> None:
        steps = sorted({_step_of(folder) for folder in self._folder.glob("step-*")})
        columns = [*self._base_columns, *(column for step in steps for column in self._columns(step))]
        noted = self._noted()
        write_contact_sheet(
            self._folder / "contact_sheet.png",
            [(noted.get(each.folder, {}).get("label", each.label), self._folder / each.folder) for each in columns],
            [(request.label, request.file_name) for request in self._requests],
        )


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])
