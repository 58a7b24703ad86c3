"""What a training method is, and what methods share: draws, the posterior sample, distances.

A method knows no family and no network: it calls the denoisers of its roles. See documentation/ADDING_A_DISTILLER.md.

Shapes: B batch, C latent channels, h w latent size in latent pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from simpletuner.batch import Batch, Cond
from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.fields import Json, Section
from simpletuner.denoiser import Denoiser
from simpletuner.randomness import Randomness
from simpletuner.schedules import NoiseSchedule, wide

if TYPE_CHECKING:  # diffusers takes seconds to import, and the plan needs none of it
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

ModelType = Literal["lora", "full"]
Role = Literal["train", "frozen", "ema"]


@dataclass(frozen=True)
class RunFacts:
    """What a method may judge before any weight is loaded; None is unknown until the model has been downloaded."""

    model_type: ModelType
    prediction_type: str | None
    schedule: NoiseSchedule | None
    validation_num_inference_steps: int | None
    """None: nothing is validated, or the method's own default holds."""
    validation_guidance: float | None


@dataclass(frozen=True)
class Defaults:
    """What a method advises for keys that the user has not set; None leaves them to the family and the schema."""

    lora_targets: tuple[str, ...] | None = None
    lora_rank: int | None = None
    validation_num_inference_steps: int | None = None
    validation_guidance: float | None = None
    teacher_guidance: float | None = None
    """The ``guidance_scale`` at which the base model, in many steps, draws what the student learns to draw in few."""


@dataclass(frozen=True)
class Setting:
    """What decides the defaults of a method's options."""

    model_type: ModelType = "lora"
    guidance_range: tuple[float, float] = (3.0, 15.0)
    """The family's range of w, in the paper's form, for a network that is told w."""


@dataclass(frozen=True)
class Setup:
    """What a method is made of, by training/build.py."""

    config: Section
    """An instance of the method's ``Config``, from ``Distiller.configure``."""
    denoisers: Mapping[str, Denoiser]
    """By name: the roles, and what stands beside them (``target`` is the student without its wrapper)."""
    schedule: NoiseSchedule
    uncond: Callable[[Cond], Cond]
    """Returns the features that stand for no text, in the shape of those it is given."""


@dataclass(frozen=True)
class Draw:
    """The random numbers of one micro-batch; a method uses what it needs, and may add fields in a subclass."""

    noise: Tensor
    """[B, C, h, w] float32 standard normal."""
    posterior: Tensor | None
    """[B, C, h, w] float32 standard normal, None where the batch has no posterior standard deviation."""
    start: Tensor
    """[B] noise times at which the student is called."""
    end: Tensor | None = None
    """[B] noise times of the solver's result."""
    edge: Tensor | None = None
    """[B] noise times to which student and target jump."""
    w: Tensor | None = None
    """[B] float32 guidance scales in the paper's form."""
    middle: Tensor | None = None
    """[B] noise times between start and end, for solvers of second order."""
    guided: Tensor | None = None
    """[R] int64 places, in the micro-batch, of the samples whose teacher is guided; None: all."""

    @property
    def num_guided(self) -> int:
        """How many samples' teacher is guided; the device is not asked for it."""
        return len(self.start if self.guided is None else self.guided)

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        """Returns the draw with every tensor on the device."""
        moved: dict[str, Any] = {}  # Any: the values have the fields' own types
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


@dataclass(frozen=True)
class LossOutput:
    """The loss of one role for one micro-batch."""

    per_sample: Tensor
    """[B], in promote(dtype, float32)."""
    metrics: dict[str, Tensor]
    """0-d tensors on the device, without gradient."""


class Distiller(ABC):
    """A training method. The class answers for the plan, without weights; an instance trains."""

    Config: ClassVar[type[Section]]
    """The method's own options; keys that it shares with the objective section stand in for absent ones."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """What the family must provide."""

    def __init__(self, setup: Setup) -> None:
        self.schedule = setup.schedule
        self.denoisers = setup.denoisers
        self.uncond = setup.uncond

    @classmethod
    @abstractmethod
    def roles(cls, model_type: ModelType) -> dict[str, Role]:
        """Returns the networks that the method needs, by name."""

    @classmethod
    def guidance_embed_dim(cls, model_type: ModelType) -> int | None:
        """Returns the width of the guidance embedding that the student needs; None: it is not told w."""
        return None

    @classmethod
    def defaults(cls, config: Any, model_type: ModelType) -> Defaults:  # Any: an instance of the method's own Config
        """Returns what the method advises for keys that the user has not set."""
        return Defaults()

    @classmethod
    def check(cls, config: Any, facts: RunFacts) -> list[str]:  # Any: an instance of the method's own Config
        """Returns notices about a run. Raises UserError when it could not work."""
        return []

    @classmethod
    def configure(
        cls, given: Mapping[str, Json], objective: Section, setting: Setting | None = None
    ) -> tuple[Any, list[str]]:
        """Returns (the method's config, notices); see ``configure``."""
        return configure(cls.Config, given, objective)

    def updates(self, step: int) -> tuple[str, ...]:
        """Returns the roles whose optimizers step now."""
        return ("student",)

    @abstractmethod
    def draw(self, batch: Batch, randomness: Randomness) -> Draw:
        """Returns the random numbers of a micro-batch that is still on the CPU."""

    @abstractmethod
    def loss(self, role: str, batch: Batch, draw: Draw, step: int) -> LossOutput:
        """Returns a role's loss; batch and draw are on the device, and nothing may wait for it."""

    @property
    def ema_decay(self) -> float:
        """Share that an average keeps of itself at each step, for methods with a role of kind ``ema``."""
        raise TypeError(f"{type(self).__name__} has no averaged role")

    def after_step(self, step: int) -> None:
        """Acts after an optimizer step."""
        return

    def state_dict(self) -> dict[str, Any]:  # Any: tensors and JSON, read back by the same method only
        """Returns what a resumed run needs beside weights, optimizers and the sample position."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what state_dict returned."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, and was given {', '.join(state)}")

    @abstractmethod
    def sampling(self, base_scheduler_config: Mapping[str, Any]) -> "tuple[SchedulerMixin, dict[str, Any]]":
        """Returns (scheduler, pipeline arguments) with which the result must be sampled.

        Args:
            base_scheduler_config: The config of the base model's own scheduler.

        Returns:
            The scheduler; ``num_inference_steps`` and ``guidance_scale`` for keys that the user has not set; further
            arguments of the pipeline's call, which always hold.
        """


def configure(config: type[Section], given: Mapping[str, Json], objective: Section) -> tuple[Any, list[str]]:
    """Returns (an instance of a method's Config, notices).

    Args:
        config: The method's Config.
        given: ``distillation_config``, without the method's name around it.
        objective: The run's objective section; keys that its user set fill in what ``given`` leaves out.

    Raises:
        UserError: One line for each option that is unknown or has a wrong value.
    """
    notices: list[str] = []
    values: dict[str, Json] = {}
    for name in sorted(objective.model_fields_set):
        value = getattr(objective, name)
        if name not in config.model_fields:
            notices.append(f"{name}: has no effect, because the method has no such option")
        elif name in given and given[name] != value:
            notices.append(f"{name}: {given[name]!r} in distillation_config wins over {value!r} outside of it")
        else:
            values[name] = value
    try:
        made = config.model_validate(values | dict(given))
    except ValidationError as error:
        raise UserError(*(_line(config, given, problem) for problem in error.errors())) from error
    if "huber_c" in made.model_fields_set and made.model_dump().get("loss_type") == "l2":
        notices.append("huber_c: has no effect: loss_type is l2")
    return made, notices


def _line(config: type[Section], given: Mapping[str, Json], problem: Any) -> str:  # Any: pydantic's ErrorDetails
    """Returns one problem as a line that names the key, the value and what is allowed."""
    key = ".".join(str(part) for part in problem["loc"])
    place = "" if key and key not in given else "distillation_config"  # else the key stands outside of it
    if problem["type"] == "extra_forbidden" and isinstance(problem["input"], dict):
        return (
            f"distillation_config.{key}: these are options of '{key}', which is not the distillation_method; write "
            "them flat, or under the name of the method"
        )
    if problem["type"] == "extra_forbidden":
        return f"distillation_config.{key}: unknown option{suggestion(key, config.model_fields)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not key:
        return f"{place}: {message}"
    return (
        f"{place}{'.' if place else ''}{key}: {problem['input']!r} is not possible: {message[0].lower()}{message[1:]}"
    )


def make_scheduler(
    scheduler_class: Any,  # Any: from_config is untyped in diffusers
    base_config: Mapping[str, Any],
    **changes: Any,
) -> "SchedulerMixin":
    """Returns a diffusers scheduler with what it knows of another's config, and with changes."""
    return scheduler_class.from_config(dict(base_config), **changes)


def own_scheduler(base_config: Mapping[str, Any], prediction_type: str | None = None) -> "SchedulerMixin":
    """Returns the scheduler that a model's own scheduler_config.json names.

    Args:
        base_config: The content of the file.
        prediction_type: In place of the file's; None leaves it as it is.

    Raises:
        UserError: diffusers has no such scheduler.
    """
    import diffusers  # here, because it takes seconds, which the plan does not have

    name = str(base_config.get("_class_name", ""))
    scheduler_class: Any = getattr(diffusers, name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise UserError(f"the model's scheduler_config.json names the scheduler '{name}', which diffusers has not")
    changes = {} if prediction_type is None else {"prediction_type": prediction_type}
    return make_scheduler(scheduler_class, base_config, **changes)


def draw_latents(batch: Batch, randomness: Randomness) -> tuple[Tensor, Tensor | None]:
    """Returns ([B, C, h, w] noise, [B, C, h, w] posterior noise or None), float32 on the CPU."""
    shape = batch.mean.shape[1:]
    posterior = None if batch.std is None else randomness.normal("posterior", batch.position, shape)
    return randomness.normal("noise", batch.position, shape), posterior


def sample_posterior(batch: Batch, noise: Tensor | None) -> Tensor:
    """Returns [B, C, h, w] x0 = mean + std noise in promote(dtype, float32): cached moments may be narrower."""
    mean = batch.mean.to(wide(batch.mean))
    if batch.std is None or noise is None:
        return mean
    return mean + batch.std.to(mean.dtype) * noise.to(mean.dtype)


def distance(prediction: Tensor, target: Tensor, loss_type: str, huber_c: float) -> Tensor:
    """Returns [B] the mean distance of [B, C, h, w] tensors, in promote(dtype, float32).

    Args:
        prediction: With gradient.
        target: Without.
        loss_type: ``l2``; ``huber``: pseudo-Huber sqrt(d^2 + c^2) - c (arXiv 2310.14189, eq. 8); ``cauchy``:
            log(1 + d^2 / (2 c^2)) of a sample's root mean square d (arXiv 2502.01441, sec. 4.1); ``smooth_l1``.
        huber_c: Where huber and smooth_l1 turn from square to linear, and cauchy to logarithm.
    """
    dtype = wide(prediction, target)
    difference = prediction.to(dtype) - target.to(dtype)
    if loss_type == "cauchy":
        # The paper's d is the norm of the whole sample; the root mean square makes c mean the same for every size.
        # Per element, a c well below the differences would give the smallest ones the largest gradients.
        return torch.log1p((difference**2).flatten(1).mean(1) / (2 * huber_c**2))
    if loss_type == "l2":
        values = difference**2
    elif loss_type == "huber":
        # d^2 / (sqrt(d^2 + c^2) + c) is the same number without its cancellation: at d = c / 100 the plain form
        # has only 3 digits left in float32.
        values = difference**2 / ((difference**2 + huber_c**2).sqrt() + huber_c)
    elif loss_type == "smooth_l1":
        values = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=huber_c)
    else:
        raise ValueError(f"unknown loss_type {loss_type}")
    return values.flatten(1).mean(1)
