"""The loss of lcm and every LoRA gradient against the reference, in float64."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.batch import Batch, Cond
from simpletuner.denoiser import Denoiser
from simpletuner.distillers._base import Setup
from simpletuner.distillers.lcm import LCM, LCMConfig
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
                w=float(draw.w[i]),
                cond=(one(batch.cond, i), geometry),
                uncond=(one(without(batch.cond), i), geometry),
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
            features, geometry = cond
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


@pytest.mark.parametrize(("kind", "options"), [("epsilon", {}), ("v_prediction", {}), ("epsilon", MID_PHASE)], ids=str)
def test_sdxl(kind: Any, options: Any, tiny_model: Path, tiny_model_v: Path) -> None:
    """The real UNet with diffusers' own adapter switches, and its conditioning written out by hand."""
    from peft import LoraConfig

    from simpletuner.families._source import ModelSource
    from simpletuner.families.sdxl import PLUGIN

    source = ModelSource(path=str(tiny_model if kind == "epsilon" else tiny_model_v))
    family = PLUGIN().for_model(source)
    base = family.load(source, torch.float64)
    adapted = copy.deepcopy(base)
    adapted.requires_grad_(False)
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_out.0", "conv1"]))
    fill_lora(adapted, 3)
    twin = copy.deepcopy(adapted)
    schedule = family.schedule(source)
    assert family.facts(source).prediction_type == kind

    config = LCMConfig(num_ddim_timesteps=25, **options)
    denoisers = {
        name: Denoiser(family, adapted, adapter, kind, schedule, None)
        for name, adapter in (("student", "default"), ("teacher", None), ("target", "default"))
    }
    lcm = LCM(Setup(config, denoisers, schedule, family.uncond))
    batch = _sdxl_batch(base)
    output = lcm.loss("student", batch, lcm.draw(batch, Randomness(7)), 0)
    output.per_sample.sum().backward()

    keys = sorted(batch.cond)
    tokens_key = next(key for key in keys if batch.cond[key].ndim == 3)
    pooled_key = next(key for key in keys if batch.cond[key].ndim == 2)

    def network(module: nn.Module) -> reference.Network:
        def call(z: Tensor, t: float, cond: Any) -> Tensor:
            features, geometry = cond
            added = {"text_embeds": features[pooled_key], "time_ids": geometry}
            return module(z, t, features[tokens_key], added_cond_kwargs=added).sample

        return call

    def zeros(cond: Cond) -> Cond:
        return {name: torch.zeros_like(value) for name, value in cond.items()}

    acp = reference.alphas_cumprod()
    losses = reference_losses(lcm, config, batch, kind, network(twin), network(base), zeros, acp=acp)
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(output.per_sample, torch.stack(losses), rtol=RTOL, atol=0)
    ours = {name: p.grad for name, p in trainable(adapted).items() if p.grad is not None}
    assert_same_gradients(ours, {name: p.grad for name, p in trainable(twin).items() if p.grad is not None})
    assert len(ours) == len(trainable(adapted)) >= 20


def _sdxl_batch(unet: Any) -> Batch:
    """Returns two samples of float64 latents, with text features of the network's own widths."""
    sizes = unet.config
    pooled = sizes.projection_class_embeddings_input_dim - 6 * sizes.addition_time_embed_dim
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    cond = {"prompt_embeds": normal(7, sizes.cross_attention_dim), "pooled_prompt_embeds": normal(pooled)}
    return dataclasses.replace(toy_batch(2), mean=normal(4, 8, 8), std=0.1 * normal(4, 8, 8).abs(), cond=cond)
