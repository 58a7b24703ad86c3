import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.config.errors import UserError
from simpletuner.config.schema import ObjectiveSection
from simpletuner.denoiser import Prediction
from simpletuner.distillers._base import RunFacts, distance
from simpletuner.distillers.lcm import LCM, LCMConfig, jump
from simpletuner.randomness import Randomness
from simpletuner.schedules import CLEAN_EDGE, FlowSchedule, from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER, ToyNetwork, add_lora, toy_batch, toy_setup

SCHEDULE = from_scheduler_config(SDXL_SCHEDULER)
ZERO_SNR = from_scheduler_config(SDXL_SCHEDULER | {"rescale_betas_zero_snr": True})
FACTS = RunFacts("lora", "epsilon", SCHEDULE, 4, 0.0)


def make(schedule: Any = SCHEDULE, kind: str = "epsilon", **options: Any) -> LCM:
    return LCM(toy_setup(LCMConfig(**options), schedule, kind, add_lora(ToyNetwork())))


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def test_defaults_are_the_published_adapters() -> None:
    assert LCMConfig().model_dump() == {
        "num_ddim_timesteps": 50,
        "w_min": 7.5,
        "w_max": 7.5,
        "loss_type": "l2",
        "huber_c": 0.001,
        "ema_decay": 0.95,
        "timestep_scaling_factor": 10.0,
        "edge_policy": "origin",
        "num_phases": 4,
        "eta": 0.3,
        "solver": "ddim",
        "guidance_interval": (0.0, 1.0),
    }


def test_draws_are_neighbours_on_the_grid_and_cover_it() -> None:
    draw = make(num_ddim_timesteps=10, w_min=3.0, w_max=5.0).draw(toy_batch(400, latent_px=1), Randomness(0))
    assert draw.end is not None
    assert draw.w is not None
    assert sorted(set(draw.start.tolist())) == list(range(99, 1000, 100))
    assert torch.equal(draw.end, (draw.start - 100).clamp(min=0))
    assert 3.0 <= float(draw.w.min()) < 3.05 < 4.95 < float(draw.w.max()) < 5.0
    assert abs(float(draw.w.mean()) - 4) < 0.1
    counts = torch.bincount(draw.start // 100, minlength=10)
    assert float(((counts - 40.0) ** 2 / 40).sum()) < 27.9  # chi-squared, 9 degrees of freedom, 1 in 1000


def test_a_grid_that_does_not_divide_ends_where_lcm_scheduler_does() -> None:
    draw = make(num_ddim_timesteps=30).draw(toy_batch(300, latent_px=1), Randomness(0))
    assert int(draw.start.max()) == 989


def test_the_picture_is_sampled_from_the_posterior() -> None:
    lcm, batch = make(), toy_batch(2)
    draw = lcm.draw(batch, Randomness(0))
    assert draw.posterior is not None
    assert not torch.equal(draw.posterior, draw.noise)
    sampled = lcm.loss("student", batch, draw, 0).per_sample
    assert batch.std is not None
    moved = dataclasses.replace(batch, mean=batch.mean + batch.std * draw.posterior, std=None)
    torch.testing.assert_close(lcm.loss("student", moved, draw, 0).per_sample, sampled, rtol=1e-10, atol=0)
    without = dataclasses.replace(batch, std=None)
    assert lcm.draw(without, Randomness(0)).posterior is None
    assert not torch.allclose(lcm.loss("student", without, draw, 0).per_sample, sampled)


def test_jump_at_t_0_is_the_identity() -> None:
    z, other = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    edge, t = torch.full((2,), CLEAN_EDGE), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(jump(SCHEDULE, Prediction(other, other, other), z, t, edge, 10.0), z)


def test_jump_to_the_clean_edge_is_lcm_schedulers_denoised_picture() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler.from_config(SDXL_SCHEDULER, timestep_scaling=2.0)
    scheduler.set_timesteps(1)
    z, raw, t = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), scheduler.timesteps[:1]
    theirs = scheduler.step(raw, t[0], z).denoised
    prediction = Prediction(raw, *SCHEDULE.split(raw, z, t, "epsilon"))
    ours = jump(SCHEDULE, prediction, z, t, torch.tensor([CLEAN_EDGE]), 2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_jump_to_another_edge_is_a_ddim_step_and_edges_may_differ_in_a_batch() -> None:
    x0, noise = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    t, edge = torch.tensor([999, 999]), torch.tensor([CLEAN_EDGE, 499])
    z = SCHEDULE.add_noise(x0, noise, t)
    landed = jump(SCHEDULE, Prediction(noise, x0, noise), z, t, edge, 10.0)
    torch.testing.assert_close(landed[1:], SCHEDULE.add_noise(x0, noise, edge)[1:])
    torch.testing.assert_close(landed[:1], x0[:1], rtol=1e-5, atol=1e-5)
    # A jump to where the sample already is changes nothing: the boundary of a phase.
    stay = jump(SCHEDULE, Prediction(noise, x0, noise), z, t, t, 10.0)
    torch.testing.assert_close(stay, z, rtol=1e-12, atol=1e-12)


def test_an_edge_policy_needs_no_other_loss() -> None:
    """Two phases: at a phase's first step the target's boundary is the identity there, so the target is z_end."""

    class TwoPhases(LCM):
        def edges(self, index: Tensor, batch: Any, randomness: Randomness) -> Tensor:
            grid = self.schedule.grid(self.config.num_ddim_timesteps)
            half = self.config.num_ddim_timesteps // 2
            return torch.where(index >= half, grid[half], torch.full_like(index, CLEAN_EDGE))

    setup = toy_setup(LCMConfig(num_ddim_timesteps=10), SCHEDULE, "epsilon", add_lora(ToyNetwork()))
    phased, plain = TwoPhases(setup), LCM(setup)
    batch = toy_batch(16)
    draw = phased.draw(batch, Randomness(0))
    assert draw.edge is not None
    assert set(draw.edge.tolist()) == {CLEAN_EDGE, 499}
    ours, theirs = (d.loss("student", batch, d.draw(batch, Randomness(0)), 0).per_sample for d in (phased, plain))
    low = draw.start <= 499
    torch.testing.assert_close(ours[low], theirs[low], rtol=1e-12, atol=0)
    assert bool((ours[~low] != theirs[~low]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pseudo_huber(dtype: torch.dtype) -> None:
    d = torch.tensor([0.0, 1e-5, 1e-3, 0.5, 30.0], dtype=torch.float64)
    exact = ((d**2 + 1e-6).sqrt() - 1e-3).mean()
    got = distance(d.to(dtype)[None], torch.zeros(1, 5, dtype=dtype), "huber", 1e-3)
    assert got.dtype == dtype
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    # Near zero the plain form keeps one digit in float32; ours keeps them all.
    tiny = distance(torch.full((1, 1), 1e-6), torch.zeros(1, 1), "huber", 1e-3)
    assert float(tiny) == pytest.approx(5e-10, rel=1e-5)


def test_pseudo_huber_has_a_gradient_at_zero() -> None:
    d = torch.zeros(1, 3, requires_grad=True)
    distance(d, torch.zeros(1, 3), "huber", 1e-3).sum().backward()
    assert d.grad is not None
    assert torch.equal(d.grad, torch.zeros(1, 3))


def test_losses_are_means_over_a_sample() -> None:
    a, b = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.zeros(2, 2)
    assert distance(a, b, "l2", 1.0).tolist() == [5.0, 2.0]
    assert distance(a, b, "smooth_l1", 1.0).tolist() == [1.5, 0.75]
    with pytest.raises(ValueError, match="unknown loss_type l3"):
        distance(a, b, "l3", 1.0)


def test_v_with_zero_terminal_snr_is_finite_and_trains_at_the_top() -> None:
    lcm = make(ZERO_SNR, "v_prediction")
    batch = toy_batch(64)
    draw = lcm.draw(batch, Randomness(0))
    assert int(draw.start.max()) == 999
    output = lcm.loss("student", batch, draw, 0).per_sample
    assert bool(output.isfinite().all())
    output[draw.start == 999].sum().backward()
    lora = [p for p in lcm.denoisers["student"].module.parameters() if p.requires_grad]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in lora)


@pytest.mark.parametrize("base", ["EulerDiscreteScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(("num_steps", "scaling"), [(50, 10.0), (40, 3.0), (10, 10.0)])
def test_inference_stays_on_the_trained_grid(base: str, num_steps: int, scaling: float) -> None:
    lcm = make(kind="v_prediction", num_ddim_timesteps=num_steps, timestep_scaling_factor=scaling)
    # clip_sample is DDIM's default; latents must not be clipped.
    config = SDXL_SCHEDULER | {"_class_name": base, "clip_sample": True, "rescale_betas_zero_snr": True}
    scheduler, arguments = lcm.sampling(config)
    assert type(scheduler).__name__ == "LCMScheduler"
    assert arguments == {"num_inference_steps": 4, "guidance_scale": 0.0}
    expected = {
        "original_inference_steps": num_steps,
        "timestep_scaling": scaling,
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": True,
        "beta_start": 0.00085,
    }
    assert {key: scheduler.config[key] for key in expected} == expected
    grid = set(SCHEDULE.grid(num_steps)[1:].tolist())
    for steps in range(1, min(num_steps, 10) + 1):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        assert set(scheduler.timesteps.tolist()) <= grid
        assert int(scheduler.timesteps[0]) == max(grid)


def refused(config: LCMConfig, **facts: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        LCM.check(config, dataclasses.replace(FACTS, **facts))
    return caught.value.lines


def test_what_cannot_work_is_refused_in_one_line_each() -> None:
    (line,) = refused(LCMConfig(num_ddim_timesteps=10), validation_num_inference_steps=11)
    assert line.startswith("validation_num_inference_steps: 11 is more than num_ddim_timesteps (10)")
    (line,) = refused(LCMConfig(), schedule=ZERO_SNR)
    assert line.startswith("prediction_type: 'epsilon' says nothing about the picture")
    (line,) = refused(LCMConfig(num_ddim_timesteps=1001))
    assert "1001 is above the model's 1000 training timesteps" in line
    (line,) = refused(LCMConfig(num_ddim_timesteps=600))
    assert "600 steps of 1 timesteps end at 600 of 1000" in line
    (line,) = refused(LCMConfig(guidance_interval=(0.05, 0.055)))
    assert "none of the 50 steps from noise to picture starts between 0.05 and 0.055" in line
    (line,) = refused(LCMConfig(), schedule=FlowSchedule(), prediction_type="flow_prediction")
    assert "not built yet for flow models" in line
    assert len(refused(LCMConfig(), schedule=ZERO_SNR, validation_num_inference_steps=51)) == 2


def test_v_with_zero_terminal_snr_is_allowed() -> None:
    facts = dataclasses.replace(FACTS, schedule=ZERO_SNR, prediction_type="v_prediction")
    assert LCM.check(LCMConfig(w_min=7.5, w_max=7.5), facts) == []


def test_options_out_of_bounds_are_refused() -> None:
    with pytest.raises(UserError, match=r"distillation_config: w_min \(8\) is above w_max \(3\)"):
        LCM.configure({"w_min": 8, "w_max": 3}, ObjectiveSection())
    for key, value in (
        ("huber_c", 0),
        ("guidance_interval", [0.8, 0.2]),
        ("guidance_interval", [0.5, 1.5]),
        ("timestep_scaling_factor", -1),
        ("w_max", math.inf),
        ("num_ddim_timesteps", 2.5),
    ):
        with pytest.raises(UserError, match=f"distillation_config.{key}"):
            LCM.configure({key: value}, ObjectiveSection())


def test_notices() -> None:
    assert LCM.check(LCMConfig(w_min=7.0, w_max=8.0), FACTS) == []
    (line,) = LCM.check(LCMConfig(w_min=1.0, w_max=12.0), FACTS)
    assert line.startswith("w_min 1, w_max 12: an adapter is not told w")
    assert LCM.check(LCMConfig(), FACTS) == []
    narrow = {"w_min": 7.5, "w_max": 7.5}
    for options in ({"num_ddim_timesteps": 40}, {"timestep_scaling_factor": 5.0}):
        (line,) = LCM.check(LCMConfig(**narrow, **options), FACTS)
        assert "load the scheduler from the run" in line
    lines = LCM.check(LCMConfig(**narrow, num_ddim_timesteps=30), FACTS)
    assert lines[1] == "num_ddim_timesteps: 30 does not divide 1000; the grid ends at timestep 989"
    (line,) = LCM.check(LCMConfig(**narrow), dataclasses.replace(FACTS, validation_guidance=7.5))
    assert line.startswith("validation_guidance: 7.5 guides a student that has learned guidance already")


def test_default_targets_are_the_published_adapters() -> None:
    defaults = LCM.defaults(LCMConfig(), "lora")
    assert defaults.lora_rank == 64
    assert defaults.lora_targets is not None
    assert len(defaults.lora_targets) == 14
    assert defaults.validation_num_inference_steps == 4
