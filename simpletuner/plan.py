"""The plan of a run: classes chosen, numbers derived, conflicts refused, before any weight is loaded.

It reads JSON files and safetensors headers only, writes nothing, and imports neither diffusers nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from simpletuner.adapter_plan import LoraPlan, plan_adapter
from simpletuner.chosen import Chosen, choose
from simpletuner.config.errors import Problems
from simpletuner.config.schema import Config, OptimizerSection
from simpletuner.data.identity import Encoding
from simpletuner.data.manifest import Manifest
from simpletuner.data.precompute import Outstanding, outstanding
from simpletuner.data.sampler import Window
from simpletuner.data.summary import DatasetSummary
from simpletuner.distillers._base import Defaults, Distiller, ModelType, RunFacts, Setting
from simpletuner.duration import count_steps, warmup_notices, windows
from simpletuner.families._base import Facts, ModelFamily
from simpletuner.families._source import ModelSource
from simpletuner.idle import idle_settings
from simpletuner.optimizers._base import OptimizerPlugin
from simpletuner.prompt_library import Wish, wishes
from simpletuner.quantization import check_precisions, text_precisions
from simpletuner.schedules import from_scheduler_config

T = TypeVar("T")

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_VAE_DTYPES = {"default": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ValidationPlan:
    """The pictures to draw while training; without prompts nothing is drawn."""

    wishes: tuple[Wish, ...]
    negative_prompt: str
    sizes_px: tuple[tuple[int, int], ...]
    """(width, height) of each."""
    seeds: tuple[int, ...]
    step_interval: int
    num_inference_steps: int
    other_steps: tuple[int, ...]
    """Numbers of steps that are drawn too, a column each."""
    guidance_scale: float
    """As diffusers counts it; up to 1 is off."""
    guidance_rescale: float

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is drawn."""
        return tuple(wish.prompt for wish in self.wishes)


@dataclass(frozen=True)
class Plan:
    """What will be done; every number that more than one place needs is derived here, once."""

    config: Config
    family: ModelFamily
    source: ModelSource
    facts: Facts
    method: str
    distiller: type[Distiller]
    method_config: Any  # Any: an instance of the method's own Config, which only the method reads
    optimizer: OptimizerPlugin
    optimizer_section: OptimizerSection
    """The config's section with the learning rate that is really used."""
    lora: LoraPlan | None
    validation: ValidationPlan
    datasets: tuple[DatasetSummary, ...]
    held_out: tuple[DatasetSummary, ...]
    """What the loss is measured on, and that is never trained on."""
    world: int
    """Number of processes."""
    max_steps: int
    batches_per_epoch: int
    """Micro-batches of all ranks together in which every dataset is shown once."""
    caches: tuple[Outstanding, ...]
    """What the latents of each dataset, and the text features, lack."""
    weight_dtype: torch.dtype
    """Of the network's weights; an adapter's are float32."""
    vae_dtype: torch.dtype
    text_precisions: tuple[str, ...]
    """How each text encoder is quantized; empty where none is."""
    compute_dtype: torch.dtype | None
    """Of autocast around the network; None: no autocast."""
    notices: tuple[str, ...]

    @property
    def windows(self) -> dict[str, Window]:
        """Dataset id -> when it is shown."""
        accumulation = self.config.run.gradient_accumulation_steps
        return windows(self.config.datasets, self.batches_per_epoch, accumulation)

    @property
    def eval_step_interval(self) -> int:
        """Steps between two measurements of the held-out loss; 0: only at both ends."""
        section = self.config.validation
        interval = section.eval_steps_interval
        return section.validation_step_interval if interval is None else interval

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts to encode beside the captions."""
        negatives = (wish.negative_prompt for wish in self.validation.wishes if wish.negative_prompt)
        return (*self.validation.prompts, self.validation.negative_prompt, *negatives)

    def encoding(self, device: torch.device) -> Encoding:
        """Returns who encodes the caches, on a device.

        Text in the weights' dtype: the result is loaded as one pipeline, which encodes its prompts in that dtype too.
        """
        return Encoding(self.family, self.source, device, self.vae_dtype, self.weight_dtype, self.text_precisions)

    @property
    def effective_batch(self) -> int:
        """Samples of a full optimizer step, over all processes."""
        run = self.config.run
        return max(s.config.train_batch_size for s in self.datasets) * run.gradient_accumulation_steps * self.world

    @property
    def epochs(self) -> float | None:
        """Passes over the data that the steps make; None as long as no image is counted."""
        if self.batches_per_epoch == 0:
            return None
        return self.max_steps * self.config.run.gradient_accumulation_steps / self.batches_per_epoch


def make_plan(
    config: Config, datasets: Sequence[DatasetSummary], world: int = 1, held_out: Sequence[DatasetSummary] = ()
) -> Plan:
    """Returns the plan of a run.

    Args:
        config: As loaded.
        datasets: What the scan found of each dataset.
        world: Number of processes.
        held_out: What the scan found of the held-out datasets.

    Raises:
        UserError: One line for each mistake that the config still has.
    """
    chosen = choose(config)
    problems = Problems()
    notices = [*config.notices, *chosen.facts.notices]
    weight_dtype, compute_dtype = _dtypes(config, chosen.optimizer, notices, problems)
    notices.extend(problems.attempt(lambda: check_precisions(config.model, chosen.facts.num_text_encoders)) or [])
    problems.lines.extend(_misfits(chosen, config.model.model_type))
    method_config = problems.attempt(lambda: _method_config(config, chosen, notices))
    problems.raise_any()
    defaults = chosen.distiller.defaults(method_config, config.model.model_type)
    validation = problems.attempt(lambda: _validation(config, defaults, chosen.family))
    _check_method(config, chosen, method_config, validation, notices, problems)
    batches = sum(summary.batches_per_epoch(world) for summary in datasets)
    unknown = batches == 0 and not all(summary.complete for summary in datasets)
    max_steps = problems.attempt(lambda: count_steps(config, None if unknown else batches, notices))
    problems.raise_any()
    assert validation is not None
    assert max_steps is not None
    guided = validation.guidance_scale > 1
    notices += [*idle_settings(config, guided), *_idle_optimizer_keys(config, chosen.optimizer)]
    lora = plan_adapter(config, chosen, defaults, notices) if config.model.model_type == "lora" else None
    notices.extend(warmup_notices(config.optimizer.lr_warmup_steps, max_steps))
    plan = Plan(
        config=config,
        family=chosen.family,
        source=chosen.source,
        facts=chosen.facts,
        method=chosen.method,
        distiller=chosen.distiller,
        method_config=method_config,
        optimizer=chosen.optimizer,
        optimizer_section=_scaled(config, world, notices),
        lora=lora,
        validation=validation,
        datasets=tuple(datasets),
        held_out=tuple(held_out),
        world=world,
        max_steps=max_steps,
        batches_per_epoch=batches,
        caches=(),
        weight_dtype=weight_dtype,
        vae_dtype=_VAE_DTYPES[config.model.vae_dtype],
        text_precisions=text_precisions(config.model, chosen.facts.num_text_encoders),
        compute_dtype=compute_dtype,
        notices=tuple(dict.fromkeys(notices)),
    )
    return replace(plan, caches=caches_of(plan, [summary.manifest for summary in (*plan.datasets, *plan.held_out)]))


def _check_method(
    config: Config,
    chosen: Chosen,
    method_config: Any,  # Any: of the method's own Config
    validation: ValidationPlan | None,
    notices: list[str],
    problems: Problems,
) -> None:
    """Asks the method about the run, for each number of steps in which pictures are drawn."""
    for facts in _run_facts(config, chosen, validation):
        notices.extend(problems.attempt(partial(chosen.distiller.check, method_config, facts)) or [])
    problems.lines[:] = dict.fromkeys(problems.lines)  # what is wrong with each number of steps alike


def _idle_optimizer_keys(config: Config, optimizer: OptimizerPlugin) -> list[str]:
    own = f"has no effect: '{config.optimizer.optimizer}' takes its own from optimizer_config"
    return [f"{key}: {own}" for key in sorted(optimizer.idle_keys(config.optimizer) & config.explicit)]


def _misfits(chosen: Chosen, model_type: ModelType) -> list[str]:
    """Returns a line for each reason why the method cannot train the model."""
    lines: list[str] = []
    missing = chosen.distiller.requires - chosen.family.provides
    if missing:
        lines.append(f"distillation_method: {chosen.method} needs a family with {', '.join(sorted(missing))}")
    needed = {"lora"} if model_type == "lora" else set[str]()
    if chosen.distiller.guidance_embed_dim(model_type) is not None:
        needed.add("guidance_embedding")
    if unable := needed - chosen.family.provides:
        lines.append(f"model_type: {model_type} by {chosen.method} needs a family with {', '.join(sorted(unable))}")
    return lines + untold_guidance(chosen.source, chosen.facts, chosen.distiller, model_type)


def untold_guidance(source: ModelSource, facts: Facts, distiller: type[Distiller], model_type: ModelType) -> list[str]:
    """Returns a line when the model wants to be told its guidance, and the method does not tell it."""
    if facts.guidance_embed_dim is None or distiller.guidance_embed_dim(model_type) is not None:
        return []
    return [
        f"pretrained_model_name_or_path: the network of '{source.place('unet').path}' is told its guidance already "
        "(time_cond_proj_dim), as a distilled one is; set model_type to full and distillation_method to one that tells "
        "it w, such as lcm, or give the base model"
    ]


def _dtypes(
    config: Config, optimizer: OptimizerPlugin, notices: list[str], problems: Problems
) -> tuple[torch.dtype, torch.dtype | None]:
    """Returns (the dtype of the network's weights, of autocast or None)."""
    precision, name = config.run.mixed_precision, config.optimizer.optimizer
    if precision == "fp16" and not torch.cuda.is_available():
        problems.lines.append("mixed_precision: 'fp16' needs a GPU, and this machine has none; use 'bf16' or 'no'")
    dtype = _DTYPES[precision]
    compute = None if dtype is torch.float32 else dtype
    if config.model.model_type == "lora":
        if optimizer.trains_bf16:
            notices.append(f"optimizer: '{name}' acts as plain AdamW here: an adapter's weights stay float32")
        return dtype, compute
    if dtype is torch.bfloat16 and optimizer.trains_bf16:
        return dtype, compute
    if compute is not None:
        why = f"'{name}'" if dtype is torch.bfloat16 else precision
        notices.append(
            f"mixed_precision: the weights stay float32, as {why} needs; the network computes in {precision}"
        )
    return torch.float32, compute


def _validation(config: Config, defaults: Defaults, family: ModelFamily) -> ValidationPlan:
    """Returns what to draw. Raises UserError for a prompt library that cannot be read."""
    section = config.validation
    asked = wishes(section)
    seed = section.validation_seed if section.validation_seed is not None else config.run.seed
    usual_steps, usual_guidance = family.usual_sampling
    advised = int(defaults.validation_num_inference_steps or usual_steps)
    given = section.validation_num_inference_steps or (advised,)
    steps = advised if advised in given else given[-1]
    guidances = section.validation_guidance, defaults.validation_guidance, usual_guidance
    return ValidationPlan(
        wishes=() if section.validation_disable else tuple(asked),
        negative_prompt=section.validation_negative_prompt,
        sizes_px=section.resolutions,
        seeds=tuple(seed + i for i in range(section.num_validation_images)),
        step_interval=section.validation_step_interval,
        num_inference_steps=steps,
        other_steps=tuple(number for number in given if number != steps),
        guidance_scale=next(guidance for guidance in guidances if guidance is not None),
        guidance_rescale=section.validation_guidance_rescale,
    )


def _method_config(config: Config, chosen: Chosen, notices: list[str]) -> Any:  # Any: of the method's own Config
    """Returns the method's checked options. Raises UserError for each that is wrong."""
    setting = Setting(config.model.model_type, chosen.family.guidance_range)
    # Without a method the options of one are left over: the config's notices say that they have no effect.
    given = config.distillation.distillation_config if config.distillation.distillation_method else {}
    averages = "ema" in chosen.distiller.roles(config.model.model_type).values()
    if averages and "ema_decay" in config.explicit:
        given = {"ema_decay": config.ema.ema_decay, **given}
    method_config, own_notices = chosen.distiller.configure(given, config.objective, setting)
    notices.extend(own_notices)
    return method_config


def _run_facts(config: Config, chosen: Chosen, validation: ValidationPlan | None) -> list[RunFacts]:
    """Returns what the method may judge a run by, for each number of steps in which pictures are drawn."""
    scheduler = chosen.facts.scheduler_config
    drawn = validation if validation is not None and validation.wishes else None
    facts = RunFacts(
        model_type=config.model.model_type,
        prediction_type=config.model.prediction_type or chosen.facts.prediction_type,
        schedule=from_scheduler_config(scheduler) if scheduler is not None else None,
        validation_num_inference_steps=drawn.num_inference_steps if drawn else None,
        validation_guidance=drawn.guidance_scale if drawn else None,
    )
    others = drawn.other_steps if drawn else ()
    return [facts, *(replace(facts, validation_num_inference_steps=steps) for steps in others)]


def caches_of(plan: Plan, manifests: Sequence[Manifest]) -> tuple[Outstanding, ...]:
    """Returns what the caches lack of the plan's datasets."""
    facts = plan.facts
    encoding = plan.encoding(torch.device("cpu"))
    cache = plan.config.text_cache
    return tuple(outstanding(manifests, cache, encoding, facts.cond_numbers, plan.prompts, facts.encoders_here))


def _scaled(config: Config, world: int, notices: list[str]) -> OptimizerSection:
    """Returns the optimizer's section with ``scale_lr`` applied to the learning rate."""
    section = config.optimizer
    if not section.scale_lr:
        return section
    scale = config.run.gradient_accumulation_steps * config.run.train_batch_size * world
    rate = section.learning_rate * scale
    notices.append(f"scale_lr: the learning rate is {section.learning_rate:g} x {scale} = {rate:g}")
    return section.model_copy(update={"learning_rate": rate})
