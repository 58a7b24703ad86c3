"""Builds everything that a run trains with, in the one order that is right.

Load the roles -> freeze -> adapters (float32) -> quantize the base -> average -> gradient checkpointing ->
compilation -> optimizer -> prepare (the student, nothing else).
"""

import copy
import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from simpletuner.config.errors import UserError
from simpletuner.data.dataset import CachedDataset
from simpletuner.denoiser import Denoiser, checkpoint_with_adapters
from simpletuner.distillers._base import Distiller, Setup
from simpletuner.families._base import ModelFamily, Part
from simpletuner.families._source import ModelSource
from simpletuner.optimizers._base import averaged
from simpletuner.plan import Plan, untold_guidance
from simpletuner.quantization import quantize
from simpletuner.schedules import NoiseSchedule
from simpletuner.training.adapters import ADAPTER, attach_lora, start_from, trainable_parameters
from simpletuner.training.ema import Average
from simpletuner.training.kernels import choose_attention, compile_networks
from simpletuner.training.lycoris import attach_lycoris

_PATIENCE = timedelta(days=2)
"""How long a process waits for the others."""


@dataclass(frozen=True)
class Learner:
    """One role that trains, with what steps it."""

    module: nn.Module
    """The network as the accelerator wrapped it: gradients are averaged over the ranks through it."""
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    scaler: GradScaler


@dataclass(frozen=True)
class Run:
    """The networks, denoisers and optimizers of a run; what changes while it trains is in TrainState."""

    accelerator: Accelerator
    family: ModelFamily
    source: ModelSource
    module: nn.Module
    """The student's network, not wrapped."""
    has_adapter: bool
    schedule: NoiseSchedule
    distiller: Distiller
    learners: Mapping[str, Learner]
    averages: Mapping[str, Average]
    """Roles that follow the student, which the trainer updates after each step."""
    teacher: nn.Module
    """The frozen base: under LoRA the student's network, whose adapter can be switched off."""
    dataset: CachedDataset
    host_group: torch.distributed.ProcessGroup | None
    """A gloo group of all ranks for questions between hosts; None for a single process."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Returns the element-wise sum of a tensor over all ranks."""
        if self.host_group is not None:
            torch.distributed.all_reduce(values)
        return values

    @contextmanager
    def averaged_weights(self) -> Generator[None]:
        """Shows the weights that are trained for, where optimizers step from others: for pictures and for files."""
        with ExitStack() as entered:
            for learner in self.learners.values():
                entered.enter_context(averaged(learner.optimizer))
            yield

    def load_vae(self, dtype: torch.dtype) -> nn.Module:
        """Returns the VAE, freshly loaded onto the run's device."""
        # Families refuse to encode in float16, where many a VAE overflows; pipelines know how to decode with it.
        full = self.family.load_encoders(self.source, self.accelerator.device, torch.float32, frozenset[Part]({"vae"}))
        assert full.vae is not None
        return nn.Module.to(
            full.vae, dtype
        )  # diffusers' own warns of modules to be kept in float32, of which it has none


def make_accelerator() -> Accelerator:
    """Returns the process's accelerator: device, ranks and data parallelism.

    Precision is not its business here: autocast is opened around the network's forward by the Denoiser alone, since
    accelerate would wrap the forward of the one module that teacher and student share.

    Raises:
        UserError: Several processes were started, and the device cannot be shared by several.
    """
    # One rank scans, downloads or encodes for hours while the others wait; the default would end them after 10 minutes.
    patient = InitProcessGroupKwargs(timeout=_PATIENCE)
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Unless it is told that there is nothing but a CPU, accelerate 1.15 makes each of several ranks the only one.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[parallel, patient])
    num_asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != num_asked:
        raise UserError(
            f"{num_asked} processes cannot share a run on a device of this kind ({accelerator.device.type}):"
            " start one, or set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def build(plan: Plan, accelerator: Accelerator, dataset: CachedDataset) -> Run:
    """Returns the run of a plan, its networks on the accelerator's device, before any step.

    Args:
        plan: What to build.
        accelerator: Of ``make_accelerator``.
        dataset: The micro-batches of this rank, and the text features of prompts.
    """
    module, teacher, target = _networks(plan, accelerator.device)
    schedule = plan.family.schedule(plan.source)
    learner = _learner(plan, accelerator, module)
    empty = {key: value.to(accelerator.device) for key, value in dataset.prompt("").items()}
    networks = {"student": learner.module, "target": target, "teacher": teacher}
    denoisers = _denoisers(plan, networks, schedule)
    setup = Setup(plan.method_config, denoisers, schedule, lambda cond: plan.family.uncond(cond, empty))
    distiller = plan.distiller(setup)
    averages = {"target": Average(module, target, distiller.ema_decay)} if target is not module else {}
    return Run(
        accelerator=accelerator,
        family=plan.family,
        source=plan.source,
        module=module,
        has_adapter=plan.lora is not None,
        schedule=schedule,
        distiller=distiller,
        learners={"student": learner},
        averages=averages,
        teacher=teacher,
        dataset=dataset,
        host_group=_host_group(accelerator),
    )


def _networks(plan: Plan, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns the networks of student, teacher and target; one and the same where the method needs no copy."""
    model_type = plan.config.model.model_type
    roles = plan.distiller.roles(model_type)
    embed_dim = plan.distiller.guidance_embed_dim(model_type)
    student = plan.family.load(plan.source, plan.weight_dtype, embed_dim)
    if plan.lora is not None and plan.lora.is_lycoris:
        attach_lycoris(student, plan.lora.settings, plan.config.run.seed, ADAPTER)
    elif plan.lora is not None:
        attach_lora(student, plan.lora.settings, plan.config.run.seed)
        if plan.config.lora.init_lora is not None:
            start_from(student, plan.family, Path(plan.config.lora.init_lora))
        quantize(student, plan.config.model.base_model_precision, device)
    teacher = target = student.to(device)
    if plan.lora is None and "teacher" in roles:
        teacher = (
            plan.family.load(plan.source, plan.compute_dtype or plan.weight_dtype).to(device).requires_grad_(False)
        )
    if roles.get("target") == "ema":
        target = copy.deepcopy(student).float().requires_grad_(False)
    student.train()
    if plan.config.model.gradient_checkpointing:
        network: Any = student  # Any: diffusers' own base class, which would import diffusers here
        interval = plan.config.model.gradient_checkpointing_interval
        network.enable_gradient_checkpointing(checkpoint_with_adapters(student, interval))
    choose_attention((student, teacher, target), plan.config.model.attention_mechanism)
    compile_networks((student, teacher, target), plan.config.run.dynamo_backend)
    return student, teacher, target


def _host_group(accelerator: Accelerator) -> torch.distributed.ProcessGroup | None:
    if accelerator.num_processes == 1:
        return None
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group


def _learner(plan: Plan, accelerator: Accelerator, module: nn.Module) -> Learner:
    """Returns the student's optimizer and schedule, and the module wrapped for data parallelism."""
    parameters = list(trainable_parameters(module).values())
    optimizer = plan.optimizer(parameters, plan.optimizer_section)
    scaler = GradScaler(accelerator.device.type, enabled=plan.compute_dtype is torch.float16)
    return Learner(
        module=accelerator.prepare_model(module),
        parameters=parameters,
        optimizer=optimizer,
        scaler=scaler,
    )


def _denoisers(plan: Plan, networks: Mapping[str, nn.Module], schedule: NoiseSchedule) -> dict[str, Denoiser]:
    """Returns the roles of a method as denoisers.

    Passes without gradient use the module without its wrapper: data parallelism has nothing to do there.
    """
    adapter = ADAPTER if plan.lora is not None else None
    facts = plan.family.facts(plan.source)  # anew: a model of the hub has been downloaded since the plan was made
    if untold := untold_guidance(plan.source, facts, plan.distiller, plan.config.model.model_type):
        raise UserError(*untold)
    prediction_type = plan.config.model.prediction_type or facts.prediction_type or plan.family.prediction_type
    embeds_w = facts.guidance_embed_dim is not None

    def denoiser(role: str) -> Denoiser:
        name = None if role == "teacher" else adapter
        return Denoiser(plan.family, networks[role], name, prediction_type, schedule, plan.compute_dtype, embeds_w)

    return {role: denoiser(role) for role in networks}
