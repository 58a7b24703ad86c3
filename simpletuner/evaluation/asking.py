"""What ``simpletuner evaluate`` is asked for: scenes that can be read, or a comparison of any pictures."""

from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.errors import UserError
from simpletuner.config.schema import Config
from simpletuner.config.validation import ValidationSection
from simpletuner.evaluation.compare import Asked, Comparison, compare
from simpletuner.evaluation.evaluate import FULL, evaluate, knows_scenes
from simpletuner.evaluation.finished import FinishedRun, finished_run
from simpletuner.evaluation.report import Report
from simpletuner.hooks.caching import CachingProgress
from simpletuner.planning import look_ahead
from simpletuner.prompt_library import built_in_prompts, prompts_from, wishes
from simpletuner.run import train_with_seeds

_NUM_SEEDS = 3


@dataclass(frozen=True)
class Wanted:
    """The options of the command; None: the default that its help names."""

    num_prompts: int
    prompts_from: Path | None = None
    num_seeds: int = 2
    steps: str | None = None
    teacher_steps: int | None = None
    size: str | None = None
    clip: str | None = None
    base: str | None = None
    output: Path | None = None

    @property
    def is_of_any_pictures(self) -> bool:
        """Whether something is asked that only a comparison has."""
        return self != Wanted(self.num_prompts)


def judge_config(config: Config, full: bool, wanted: Wanted) -> Report | Comparison:
    """Returns what is found of the finished run of a config.

    Args:
        config: Of the run.
        full: Train it with three seeds, and judge more prompts; for scenes.
        wanted: What else is asked.

    Raises:
        UserError: No run has finished, or what is asked cannot be had.
    """
    plan = look_ahead(config)
    if not knows_scenes(plan) or wanted.is_of_any_pictures:
        if full:
            raise UserError("--full: it judges the quickstart's scenes alone; leave it out, or the other options")
        return judge_run(str(config.run.output_dir), wanted)
    first = config.run.seed
    results = train_with_seeds(config, range(first, first + _NUM_SEEDS)) if full else [config.run.output_dir]
    return evaluate(plan, results, FULL if full else wanted.num_prompts, CachingProgress())


def judge_run(run: str, wanted: Wanted) -> Comparison:
    """Returns how near the pictures of a finished run come to its base model's.

    Raises:
        UserError: No run has finished there, or what is asked cannot be had.
    """
    finished = finished_run(run, wanted.base)
    prompts = prompts_from(wanted.prompts_from) if wanted.prompts_from else _own_prompts(finished)
    own_folder = Path(run) / "evaluation" if Path(run).is_dir() else Path("evaluation")
    asked = Asked(
        prompts=prompts[: wanted.num_prompts],
        size_px=finished.size_px(wanted.size),
        seeds=range(wanted.num_seeds),
        steps=_steps(wanted.steps) if wanted.steps else None,
        teacher_steps=wanted.teacher_steps,
        clip=wanted.clip,
    )
    return compare(finished, asked, wanted.output or own_folder, CachingProgress())


def _own_prompts(finished: FinishedRun) -> list[str]:
    """Returns the validation prompts of a run; of one that has none, those of the package."""
    keys = ("validation_prompt", "user_prompt_library", "validation_prompt_library")
    given = {key: value for key in keys if (value := finished.option(key)) is not None}
    found = [wish.prompt for wish in wishes(ValidationSection.model_validate(given))]
    return found or built_in_prompts()


def _steps(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--steps: '{text}' is no list of whole numbers, such as 1,2,4")
    return sorted({int(part) for part in parts})
