"""The loss of lcm and every gradient, of adapters and of full students, against the reference, in float64."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from simpletuner import registry
from simpletuner.batch import Batch, Cond
from simpletuner.denoiser import Denoiser
from simpletuner.distillers._base import Setup
from simpletuner.distillers.lcm import LCM, LCMConfig
from simpletuner.families._source import ModelSource
from simpletuner.randomness import Randomness
from simpletuner.schedules import from_scheduler_config
from tests.parity import reference
from tests.parity.toy import (
    SDXL_SCHEDULER,
    ToyFamily,
    ToyNetwork,
    add_lora,
    fill_lora,
    toy_batch,
    toy_setup,
    trainable,
    uncond,
)
from tests.tiny import RECIPES

RTOL = 1e-10


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        size = theirs[name].norm()
        assert size > 0, name
        assert (gradient - theirs[name]).norm() <= RTOL * size, name


def one(cond: Cond, index: int) -> Cond:
    return {name: value[index : index + 1] for name, value in cond.items()}


def reference_losses(
    lcm: LCM, config: LCMConfig, batch: Batch, kind: str, student: Any, teacher: Any, without: Any, **options: Any
) -> list[Tensor]:
    """Runs the reference on each sample, with the draws that the method made."""
    draw = lcm.draw(batch, Randomness(7))
    stride = 1000 // config.num_ddim_timesteps
    low, high = config.guidance_interval
    assert batch.std is not None
    assert draw.posterior is not None
    assert draw.w is not None
    assert draw.edge is not None
    x0 = batch.mean + batch.std * draw.posterior.double()
    losses: list[Tensor] = []
    for i in range(len(x0)):
        geometry = batch.geometry[i : i + 1]
        edges = {
            "origin": None,
            "phased": reference.phase_start(int(draw.start[i]), config.num_phases),
            "random": int(draw.edge[i]),
        }
        losses.append(
            reference.lcm_loss(
                x0=x0[i : i + 1],
                noise=draw.noise[i : i + 1].double(),
                index=(int(draw.start[i]) + 1) // stride - 1,
                w=float(draw.w[i]) if low <= (int(draw.start[i]) + 1) / 1000 <= high else 0.0,
                cond=(one(batch.cond, i), geometry, float(draw.w[i])),
                uncond=(one(without(batch.cond), i), geometry, float(draw.w[i])),
                student=student,
                teacher=teacher,
                num_ddim_timesteps=config.num_ddim_timesteps,
                scaling=config.timestep_scaling_factor,
                kind=kind,
                loss_type=config.loss_type,
                huber_c=config.huber_c,
                edge=edges[config.edge_policy],
                solver=config.solver,
                **options,
            )
        )
    return losses


POLICIES = [("origin", 4), ("phased", 1), ("phased", 2), ("phased", 5), ("random", 4)]


@pytest.mark.parametrize(("edge_policy", "num_phases"), POLICIES)
@pytest.mark.parametrize("solver", ["ddim", "dpm2s"])
@pytest.mark.parametrize("loss_type", ["l2", "huber", "cauchy"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edges_losses_and_solvers(kind: str, loss_type: Any, solver: Any, edge_policy: Any, num_phases: int) -> None:
    config = LCMConfig(
        num_ddim_timesteps=10,
        loss_type=loss_type,
        huber_c=0.5,
        timestep_scaling_factor=3.0,
        solver=solver,
        edge_policy=edge_policy,
        num_phases=num_phases,
    )
    assert_toy_network_agrees(config, kind)


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
@pytest.mark.parametrize(
    ("kind", "zero_terminal_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@pytest.mark.parametrize(("num_steps", "scaling"), [(50, 10.0), (10, 3.0)])
def test_toy_network(kind: str, zero_terminal_snr: bool, loss_type: Any, num_steps: int, scaling: float) -> None:
    config = LCMConfig(num_ddim_timesteps=num_steps, loss_type=loss_type, huber_c=0.01, timestep_scaling_factor=scaling)
    assert_toy_network_agrees(config, kind, zero_terminal_snr)


@pytest.mark.parametrize("interval", [(0.3, 1.0), (0.0, 0.5), (0.3, 0.7), (0.05, 0.15)])
@pytest.mark.parametrize("solver", ["ddim", "dpm2s"])
def test_guidance_within_an_interval(interval: tuple[float, float], solver: Any) -> None:
    config = LCMConfig(num_ddim_timesteps=10, w_min=2.0, w_max=6.0, solver=solver, guidance_interval=interval)
    assert_toy_network_agrees(config, "epsilon")


def assert_toy_network_agrees(config: LCMConfig, kind: str, zero_terminal_snr: bool = False) -> None:
    base = ToyNetwork()
    adapted = add_lora(copy.deepcopy(base))
    twin = copy.deepcopy(adapted)
    schedule = from_scheduler_config(SDXL_SCHEDULER | {"rescale_betas_zero_snr": zero_terminal_snr})
    lcm = LCM(toy_setup(config, schedule, kind, adapted))
    batch = toy_batch(8)
    output = lcm.loss("student", batch, lcm.draw(batch, Randomness(7)), 0)
    output.per_sample.sum().backward()

    def network(module: nn.Module) -> reference.Network:
        def call(z: Tensor, t: float, cond: Any) -> Tensor:
            features, geometry, _ = cond
            return module(z, torch.tensor([t], dtype=torch.float64), features["tokens"], features["pooled"], geometry)

        return call

    acp = reference.alphas_cumprod(zero_terminal_snr)
    losses = reference_losses(lcm, config, batch, kind, network(twin), network(base), uncond, acp=acp)
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(output.per_sample, torch.stack(losses), rtol=RTOL, atol=0)
    assert_same_gradients(
        {name: p.grad for name, p in trainable(adapted).items() if p.grad is not None},
        {name: p.grad for name, p in trainable(twin).items() if p.grad is not None},
    )
    assert len(trainable(adapted)) == 10


def test_a_step_makes_three_forwards_and_the_teacher_runs_once() -> None:
    family = ToyFamily()
    schedule = from_scheduler_config(SDXL_SCHEDULER)
    lcm = LCM(toy_setup(LCMConfig(), schedule, "epsilon", add_lora(ToyNetwork()), family))
    batch = toy_batch(3)
    lcm.loss("student", batch, lcm.draw(batch, Randomness(0)), 0)
    assert family.batch_sizes == [6, 3, 3]


MID_PHASE: Any = {"edge_policy": "phased", "num_phases": 5, "solver": "dpm2s", "loss_type": "cauchy"}
CASES: list[Any] = [
    (family, role, kind, {"loss_type": loss_type, "w_min": 3.0})
    for family in ("sd1x", "sdxl")
    for role in ("adapter", "full", "full of a teacher that embeds w")
    for kind in ("epsilon", "v_prediction")
    for loss_type in ("l2", "huber")
    if role != "full of a teacher that embeds w" or (kind, loss_type) == ("epsilon", "l2")
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    folder = tmp_path_factory.mktemp("models")
    return {name: ModelSource(str(RECIPES[name](folder / name))) for name in ("sd1x", "sdxl")}


@pytest.mark.parametrize(("name", "role", "kind", "options"), [*CASES, ("sdxl", "adapter", "epsilon", MID_PHASE)])
def test_unets(name: str, role: str, kind: str, options: Any, sources: dict[str, ModelSource]) -> None:
    """The real UNets with diffusers' own adapter switches, and their conditioning written out by hand."""
    family = registry.load("families", name)().for_model(sources[name])
    schedule = family.schedule(sources[name])
    config = LCMConfig(num_ddim_timesteps=25, **options)
    student, teacher, target = _networks(family, sources[name], role)
    twin = copy.deepcopy(student)
    base = teacher if teacher is not student else family.load(sources[name], torch.float64)
    batch, without = _unet_batch(student, name)
    told = role.endswith("embeds w")
    adapter = "default" if role == "adapter" else None
    denoisers = {
        role: Denoiser(family, module, chosen, kind, schedule, None, told)
        for role, module, chosen in (
            ("student", student, adapter),
            ("teacher", teacher, None),
            ("target", target, adapter),
        )
    }
    lcm = LCM(Setup(config, denoisers, schedule, lambda cond: family.uncond(cond, one(without(cond), 0))))
    output = lcm.loss("student", batch, lcm.draw(batch, Randomness(7)), 0)
    output.per_sample.sum().backward()

    def network(module: Any) -> reference.Network:
        def call(z: Tensor, t: float, cond: Any) -> Tensor:
            features, geometry, w = cond
            width = module.config.time_cond_proj_dim
            embedded = None if width is None else reference.guidance_features(w, width)
            added = {"text_embeds": features.get("pooled_prompt_embeds"), "time_ids": geometry}
            return module(z, t, features["prompt_embeds"], timestep_cond=embedded, added_cond_kwargs=added).sample

        return call

    parts = {"student": network(twin), "teacher": network(base), "target": network(twin if adapter else target)}
    acp = reference.alphas_cumprod()
    losses = reference_losses(lcm, config, batch, kind, without=without, acp=acp, teacher_embeds_w=told, **parts)
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(output.per_sample, torch.stack(losses), rtol=RTOL, atol=0)
    ours = {name: p.grad for name, p in trainable(student).items() if p.grad is not None}
    assert_same_gradients(ours, {name: p.grad for name, p in trainable(twin).items() if p.grad is not None})
    assert len(ours) == len(trainable(student)) >= 20


def _networks(family: Any, source: ModelSource, role: str) -> tuple[Any, Any, Any]:
    """Returns student, teacher and target in float64, every weight of the student and the target moved."""
    if role == "adapter":
        network = family.load(source, torch.float64).requires_grad_(False)
        network.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_out.0", "conv1"]))
        fill_lora(network, 3)
        return network, network, network
    generator = torch.Generator().manual_seed(5)

    def moved(module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return module

    teacher = family.load(source, torch.float64, 16 if role.endswith("embeds w") else None)
    student, target = (moved(family.load(source, torch.float64, 16)) for _ in range(2))
    return student, moved(teacher).requires_grad_(False), target.requires_grad_(False)


def _unet_batch(unet: Any, name: str) -> tuple[Batch, Callable[[Cond], Cond]]:
    """Returns two samples of float64 latents, with text features of the network's widths, and what stands for none."""
    sizes = unet.config
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    cond = {"prompt_embeds": normal(7, sizes.cross_attention_dim)}
    empty = normal(7, sizes.cross_attention_dim)[:1].expand(2, -1, -1)
    if name == "sdxl":
        pooled = sizes.projection_class_embeddings_input_dim - 6 * sizes.addition_time_embed_dim
        cond["pooled_prompt_embeds"] = normal(pooled)

    def without(features: Cond) -> Cond:
        return uncond(features) if name == "sdxl" else {"prompt_embeds": empty}

    batch = dataclasses.replace(toy_batch(2), mean=normal(4, 8, 8), std=0.1 * normal(4, 8, 8).abs(), cond=cond)
    return batch, without
