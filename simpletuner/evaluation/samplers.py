"""The ways to draw that are compared: the teacher at its own settings and in a few steps, and the student."""

from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.distillers._base import make_scheduler, own_scheduler
from simpletuner.evaluation.drawing import Sampler

TEACHER_STEPS, TEACHER_GUIDANCE = 25, 3.0
FEW_STEPS = (1, 2, 4, 8)


def teacher_sampler(scheduler_config: Mapping[str, Any]) -> Sampler:  # Any: JSON
    """Returns how the teacher draws when it may take its time: by its own scheduler, with guidance."""
    return Sampler(label_of("teacher", TEACHER_STEPS), own_scheduler(scheduler_config), TEACHER_STEPS, TEACHER_GUIDANCE)


def undistilled_samplers(scheduler_config: Mapping[str, Any]) -> list[Sampler]:  # Any: JSON
    """Returns what a user without a distilled model can try: three samplers, with and without guidance.

    DDIM and DPM-Solver++ start from pure noise (spacing "trailing"), which at few steps is the best that they can do.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "DDIM": (DDIMScheduler, {"timestep_spacing": "trailing"}),
        "DPM++": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
        "LCM": (LCMScheduler, {}),
    }
    return [
        Sampler(
            f"{label_of('teacher', steps)}, {name}{', guided' if guidance > 1 else ''}",
            make_scheduler(scheduler_class, scheduler_config, **changes),
            steps,
            guidance,
        )
        for steps in FEW_STEPS
        for name, (scheduler_class, changes) in kinds.items()
        for guidance in (0.0, TEACHER_GUIDANCE)
    ]


def student_samplers(
    scheduler_config: Mapping[str, Any], sampling: Mapping[str, Any], steps: Sequence[int] = FEW_STEPS
) -> list[Sampler]:  # Any: JSON
    """Returns how a run's result draws: by the scheduler beside its weights, in each number of steps.

    Args:
        scheduler_config: Of the result's own ``scheduler`` folder.
        sampling: The arguments of the pipeline's call with which the run's pictures are drawn.
        steps: To take.
    """
    options = {key: value for key, value in sampling.items() if key not in ("num_inference_steps", "guidance_scale")}
    return [
        Sampler(
            label_of("student", each),
            own_scheduler(scheduler_config),
            each,
            sampling["guidance_scale"],
            options,
        )
        for each in steps
        # LCMScheduler takes no more steps than the grid has that was trained.
        if each <= scheduler_config.get("original_inference_steps", each)
    ]


def label_of(who: str, steps: int) -> str:
    """Returns the heading of who draws in so many steps."""
    return f"{who}, {steps} step{'s' if steps > 1 else ''}"
