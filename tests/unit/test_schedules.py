import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.errors import UserError
from simpletuner.schedules import CLEAN_EDGE, DiscreteSchedule, FlowSchedule, from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER

SDXL = from_scheduler_config(SDXL_SCHEDULER)
ZERO_SNR = from_scheduler_config(SDXL_SCHEDULER | {"rescale_betas_zero_snr": True})
ALL_T = torch.arange(1000)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3]},
    ],
)
def test_alphas_are_diffusers(changes: dict[str, object]) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler.from_config(SDXL_SCHEDULER | changes).alphas_cumprod
    ours = from_scheduler_config(SDXL_SCHEDULER | changes)
    t = torch.arange(len(theirs))
    torch.testing.assert_close(ours.alpha(t) ** 2, theirs, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(ours.alpha(t, torch.float64) ** 2 + ours.sigma(t, torch.float64) ** 2, t.double() ** 0)


def test_absent_keys_have_diffusers_defaults() -> None:
    from diffusers import DDIMScheduler

    torch.testing.assert_close(
        from_scheduler_config({}).alpha(ALL_T) ** 2, DDIMScheduler().alphas_cumprod, rtol=2e-5, atol=1e-7
    )


def test_an_unknown_beta_schedule_is_named() -> None:
    with pytest.raises(UserError, match="beta_schedule 'sigmoid'"):
        from_scheduler_config({"beta_schedule": "sigmoid"})


def test_clean_edge_is_the_picture_and_t_0_is_not() -> None:
    x0, noise = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    edge = torch.full((2,), CLEAN_EDGE)
    assert torch.equal(SDXL.add_noise(x0, noise, edge), x0)
    rest = SDXL.add_noise(torch.zeros_like(x0), noise, edge + 1) / noise
    torch.testing.assert_close(rest, torch.full_like(rest, math.sqrt(0.00085)))


def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_first_alpha() -> None:
    assert isinstance(ZERO_SNR, DiscreteSchedule)
    assert isinstance(SDXL, DiscreteSchedule)
    assert float(ZERO_SNR.alpha(torch.tensor(999), torch.float64)) == 0.0
    assert float(ZERO_SNR.sigma(torch.tensor(999), torch.float64)) == 1.0
    torch.testing.assert_close(ZERO_SNR.alpha(ALL_T[:1]), SDXL.alpha(ALL_T[:1]))
    assert ZERO_SNR.zero_terminal_snr
    assert not SDXL.zero_terminal_snr


@pytest.mark.parametrize("num_steps", [1, 4, 10, 25, 30, 40, 50, 1000])
def test_grid_is_the_one_lcm_scheduler_samples(num_steps: int) -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(original_inference_steps=num_steps)
    scheduler.set_timesteps(num_steps)
    grid = SDXL.grid(num_steps)
    assert grid.dtype == torch.int64
    assert grid[1:].tolist() == scheduler.timesteps.flip(0).tolist()
    assert grid[0] == 0


def test_grid_of_50() -> None:
    assert SDXL.grid(50).tolist() == [0, *range(19, 1000, 20)]
    with pytest.raises(ValueError, match="1001 solver steps"):
        SDXL.grid(1001)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_noise_standard_deviation_is_right_at_every_grid_point(dtype: torch.dtype) -> None:
    """In bfloat16 the same sum misses by up to 4.8 %."""
    noise = normal(1, 4, 64, 64, dtype=torch.float32)
    from diffusers import DDPMScheduler

    acp = DDPMScheduler.from_config(SDXL_SCHEDULER).alphas_cumprod.double()
    for t in SDXL.grid(50):
        x_t = SDXL.add_noise(torch.zeros(1, 4, 64, 64, dtype=dtype), noise, t[None])
        assert x_t.dtype == torch.float32
        exact = (1 - acp[t]).sqrt()
        assert abs(float(x_t.double().std() / noise.double().std() / exact) - 1) < 1e-4


def test_schedule_mathematics_never_runs_in_bfloat16() -> None:
    x, t = normal(2, 4, 3, 3, dtype=torch.bfloat16), torch.tensor([19, 999])
    for schedule, kind, times in ((SDXL, "v_prediction", t), (FlowSchedule(), "flow_prediction", t / 1000)):
        results = (
            schedule.add_noise(x, x, times),
            *schedule.split(x, x, times, kind),
            schedule.ddim_step(x, x, times),
            schedule.prediction_target(x, x, times, kind),
            schedule.alpha(times),
            schedule.sigma(times),
            *schedule.boundary(times, 10.0),
        )
        assert {result.dtype for result in results} == {torch.float32}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@given(t=st.integers(0, 999), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_split_inverts_the_target(kind: str, t: int, seed: int) -> None:
    x0, noise, times = normal(2, 4, 3, 3, seed=seed), normal(2, 4, 3, 3, seed=seed + 100), torch.tensor([t, 999 - t])
    x_t = SDXL.add_noise(x0, noise, times)
    target = SDXL.prediction_target(x0, noise, times, kind)
    got_x0, got_noise = SDXL.split(target, x_t, times, kind)
    torch.testing.assert_close(got_x0, x0, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got_noise, noise, rtol=1e-9, atol=1e-11)


def test_v_is_finite_and_exact_at_zero_terminal_snr() -> None:
    x0, noise, t = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1), torch.tensor([999])
    x_t = ZERO_SNR.add_noise(x0, noise, t)
    assert torch.equal(x_t, noise)
    v = ZERO_SNR.prediction_target(x0, noise, t, "v_prediction")
    assert torch.equal(v, -x0)
    got_x0, got_noise = ZERO_SNR.split(v, x_t, t, "v_prediction")
    assert torch.equal(got_x0, x0)
    assert torch.equal(got_noise, noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_solver_is_ddim(kind: str) -> None:
    from diffusers import DDIMScheduler

    config = SDXL_SCHEDULER | {"prediction_type": kind, "steps_offset": 0}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(50)
    x_t, raw = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1)
    for start, end in ((980, 960), (20, 0)):
        theirs = scheduler.step(raw, start, x_t).prev_sample
        x0, noise = SDXL.split(raw, x_t, torch.tensor([start]), kind)
        torch.testing.assert_close(SDXL.ddim_step(x0, noise, torch.tensor([end])), theirs, rtol=1e-5, atol=1e-5)


def test_boundary_is_lcm_schedulers_and_the_identity_at_0() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(timestep_scaling=3.0)
    t = SDXL.grid(50)
    c_skip, c_out = SDXL.boundary(t, 3.0, torch.float64)
    for row, time in enumerate(t.tolist()):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(time)
        assert float(c_skip[row]) == pytest.approx(theirs[0], rel=1e-12)
        assert float(c_out[row]) == pytest.approx(theirs[1], rel=1e-12)
    for clean in (0, CLEAN_EDGE):
        skip, out = SDXL.boundary(torch.tensor([clean]), 10.0)
        assert (float(skip), float(out)) == (1.0, 0.0)


def test_training_times_cover_the_schedule_evenly() -> None:
    u = (torch.arange(2000) + 0.5) / 2000
    assert torch.equal(SDXL.time(u), ALL_T.repeat_interleave(2))
    assert SDXL.time(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 999]


def test_a_prediction_type_of_another_schedule_is_refused() -> None:
    x = normal(1, 4, 3, 3)
    with pytest.raises(UserError, match="'flow_prediction' does not go with"):
        SDXL.split(x, x, torch.tensor([1]), "flow_prediction")
    with pytest.raises(UserError, match="'epsilon' does not go with"):
        FlowSchedule().prediction_target(x, x, torch.tensor([0.5]), "epsilon")


def test_flow_closed_forms() -> None:
    flow = FlowSchedule(shift=3.0)
    x0, noise = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    t, end = torch.tensor([0.7, 1.0], dtype=torch.float64), torch.tensor([0.2, 0.5], dtype=torch.float64)
    at, to = t.view(2, 1, 1, 1), end.view(2, 1, 1, 1)
    x_t = flow.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, (1 - at) * x0 + at * noise)
    v = flow.prediction_target(x0, noise, t, "flow_prediction")
    assert torch.equal(v, noise - x0)
    got = flow.split(v, x_t, t, "flow_prediction")
    torch.testing.assert_close(got[0], x0)
    torch.testing.assert_close(got[1], noise)
    # The solver step is Euler's, toward less noise.
    torch.testing.assert_close(flow.ddim_step(*got, end), x_t + (to - at) * v)
    c_skip, c_out = flow.boundary(t, 10.0)
    assert c_skip.tolist() == [0, 0]
    assert c_out.tolist() == [1, 1]
    torch.testing.assert_close(flow.grid(4), torch.tensor([0, 0.5, 0.75, 0.9, 1], dtype=torch.float64))
    assert flow.for_size(64, 64) is flow
    torch.testing.assert_close(flow.model_t(end), torch.tensor([200.0, 500.0], dtype=torch.float64))


def test_flow_clean_edge_is_sigma_0() -> None:
    x0, noise = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1)
    assert torch.equal(FlowSchedule().add_noise(x0, noise, torch.tensor([CLEAN_EDGE])), x0)


def test_flow_config_and_dynamic_shift_are_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "shift": 3.0,
    }
    schedule = from_scheduler_config(config).for_size(96, 128)
    sigmas = torch.linspace(1, 0.25, 4)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=calculate_shift(48 * 64, 256, 4096, 0.5, 1.15))
    torch.testing.assert_close(schedule.grid(4).flip(0).float(), scheduler.sigmas)
    assert isinstance(schedule, FlowSchedule)
    fixed = from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert float(fixed.grid(2)[1]) == pytest.approx(0.75)


def test_a_whole_number_as_floating_point_is_that_timestep() -> None:
    t = torch.tensor([0, 1, 500, 998, 999])
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for function in (SDXL.alpha, SDXL.sigma):
            torch.testing.assert_close(function(t.to(dtype), dtype), function(t, dtype), rtol=rtol, atol=0)


def test_between_two_timesteps_the_log_of_the_ratio_is_on_a_line() -> None:
    def ratio(t: list[float] | list[int]) -> torch.Tensor:
        times = torch.tensor(t)
        alpha, sigma = SDXL.alpha(times, torch.float64), SDXL.sigma(times, torch.float64)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-12, atol=0)
        return (alpha / sigma).log()

    low, high = ratio([0, 19, 998]), ratio([1, 20, 999])
    torch.testing.assert_close(ratio([0.25, 19.25, 998.25]), 0.75 * low + 0.25 * high, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps", [1, 10, 40, 50, 1000])
def test_half_way_is_the_mean_of_the_logs(num_steps: int) -> None:
    assert isinstance(SDXL, DiscreteSchedule)
    grid = SDXL.grid(num_steps).unique()
    middle = SDXL.half_way(grid[1:], grid[:-1])
    assert bool(((grid[:-1] < middle) & (middle < grid[1:])).all())

    def ratio(t: torch.Tensor) -> torch.Tensor:
        return (SDXL.alpha(t, torch.float64) / SDXL.sigma(t, torch.float64)).log()

    torch.testing.assert_close(ratio(middle), (ratio(grid[1:]) + ratio(grid[:-1])) / 2, rtol=1e-10, atol=1e-12)
    if num_steps == 50:  # far below the middle of 0 and 19, for noise rises fastest at first
        assert float(middle[0]) == pytest.approx(3.5845, abs=1e-3)
