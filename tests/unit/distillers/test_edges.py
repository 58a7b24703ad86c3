"""Edge policies: where jumps end, what may be sampled, and the schedulers that sample it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner import registry
from simpletuner.config.errors import UserError
from simpletuner.config.schema import ObjectiveSection
from simpletuner.distillers._base import RunFacts
from simpletuner.distillers.lcm import LCM, LCMConfig
from simpletuner.randomness import Randomness
from simpletuner.schedules import CLEAN_EDGE, from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER, ToyFamily, ToyNetwork, add_lora, toy_batch, toy_setup, trainable

SCHEDULE = from_scheduler_config(SDXL_SCHEDULER)
ZERO_SNR = from_scheduler_config(SDXL_SCHEDULER | {"rescale_betas_zero_snr": True})
FACTS = RunFacts("lora", "epsilon", SCHEDULE, None, None)


def make(name: str = "lcm", kind: str = "epsilon", **options: Any) -> LCM:
    plugin = registry.load("distillers", name)
    config, _ = plugin.configure(options, ObjectiveSection())
    return plugin(toy_setup(config, SCHEDULE, kind, add_lora(ToyNetwork())))


def edges_by_start(method: LCM, size: int = 200) -> dict[int, set[int]]:
    draw = method.draw(toy_batch(size, latent_px=1), Randomness(0))
    assert draw.edge is not None
    found: dict[int, set[int]] = {}
    for start, edge in zip(draw.start.tolist(), draw.edge.tolist(), strict=True):
        found.setdefault(start, set()).add(edge)
    return found


def test_methods_are_one_family_with_other_defaults() -> None:
    names = ("lcm", "pcm", "tcd")
    configs = {name: registry.load("distillers", name).configure({}, ObjectiveSection())[0] for name in names}
    lcm = configs["lcm"].model_dump()
    assert configs["pcm"].model_dump() == lcm | {"num_ddim_timesteps": 40, "edge_policy": "phased"}
    assert configs["tcd"].model_dump() == lcm | {"edge_policy": "random"}


@pytest.mark.parametrize(
    ("num_phases", "edges"),
    [
        (1, {t: -1 for t in range(124, 1000, 125)}),
        (2, {124: -1, 249: -1, 374: -1, 499: -1, 624: 499, 749: 499, 874: 499, 999: 499}),
        (4, {124: -1, 249: -1, 374: 249, 499: 249, 624: 499, 749: 499, 874: 749, 999: 749}),
        (8, {124: -1, 249: 124, 374: 249, 499: 374, 624: 499, 749: 624, 874: 749, 999: 874}),
    ],
)
def test_phases_begin_where_the_last_sampling_step_ended(num_phases: int, edges: dict[int, int]) -> None:
    found = edges_by_start(make("pcm", num_ddim_timesteps=8, num_phases=num_phases))
    assert found == {start: {edge} for start, edge in edges.items()}


@pytest.mark.parametrize("loss_type", ["l2", "huber", "cauchy"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_phase_is_lcm_bit_for_bit(kind: str, loss_type: str) -> None:
    results: list[tuple[Tensor, ...]] = []
    for options in ({"edge_policy": "origin"}, {"edge_policy": "phased", "num_phases": 1}):
        method = make("pcm", kind, loss_type=loss_type, **options)
        batch = toy_batch(12)
        loss = method.loss("student", batch, method.draw(batch, Randomness(3)), 0).per_sample
        loss.sum().backward()
        gradients = [p.grad for p in trainable(method.denoisers["student"].module).values()]
        results.append((loss.detach(), *(g for g in gradients if g is not None)))
    assert len(results[0]) == 11
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_random_edges_are_uniform_over_the_grid_times_up_to_the_solvers_result() -> None:
    tcd = make("tcd", num_ddim_timesteps=5)
    draw = tcd.draw(toy_batch(1500, latent_px=1), Randomness(0))
    assert draw.edge is not None
    assert draw.end is not None
    grid = [0, 199, 399, 599, 799, 999]
    for i, start in enumerate(grid[1:]):
        here = draw.edge[draw.start == start].tolist()
        counts = torch.tensor([here.count(time) for time in grid[: i + 1]], dtype=torch.float64)
        assert int(counts.sum()) == len(here)
        expected = len(here) / (i + 1)
        assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # chi-squared, 4 degrees, 1 in 1000
    assert bool((draw.edge <= draw.end).all())
    # An edge has a stream of its own: the other numbers are those of lcm, and no other stream decides it.
    plain = make("lcm", num_ddim_timesteps=5).draw(toy_batch(1500, latent_px=1), Randomness(0))
    assert torch.equal(plain.start, draw.start)
    top = draw.start == 999
    u = Randomness(0).uniform("edge", torch.arange(1500))[top]
    assert torch.equal(draw.edge[top], torch.tensor(grid)[(5 * u).long()])


def test_what_is_compared_at_an_edge_is_the_noisy_picture() -> None:
    """At the solver's result itself the target's jump is no jump, so the target is z there, whatever it predicts."""
    tcd = make("tcd", num_ddim_timesteps=10)
    batch = toy_batch(8)
    draw = tcd.draw(batch, Randomness(0))
    assert draw.end is not None
    draw = dataclasses.replace(draw, edge=draw.end)
    before = tcd.loss("student", batch, draw, 0).per_sample
    setup = toy_setup(tcd.config, SCHEDULE, "epsilon", tcd.denoisers["student"].module)
    another = LCM(dataclasses.replace(setup, denoisers={**setup.denoisers, "target": setup.denoisers["teacher"]}))
    torch.testing.assert_close(another.loss("student", batch, draw, 0).per_sample, before, rtol=1e-9, atol=0)
    low = dataclasses.replace(draw, edge=torch.zeros_like(draw.end))
    moved = (d.loss("student", batch, low, 0).per_sample for d in (tcd, another))
    assert not torch.allclose(*moved)


SAMPLED = [
    ("pcm", {"num_phases": 1}, 1, [999]),
    ("pcm", {"num_phases": 2}, 2, [999, 499]),
    ("pcm", {}, 4, [999, 749, 499, 249]),
    ("pcm", {"num_phases": 8}, 8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ("pcm", {}, 8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ("tcd", {}, 1, [999]),
    ("tcd", {}, 2, [999, 499]),
    ("tcd", {}, 4, [999, 759, 499, 259]),
    ("tcd", {"num_ddim_timesteps": 40}, 8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ("lcm", {}, 4, [999, 759, 499, 259]),
]


@pytest.mark.parametrize("base", ["EulerDiscreteScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(("name", "options", "steps", "times"), SAMPLED)
def test_schedulers_stay_on_the_trained_grid(
    name: str, options: dict[str, Any], steps: int, times: list[int], base: str, tmp_path: Path
) -> None:
    method = make(name, "v_prediction", **options)
    # clip_sample and leading steps are DDIM's defaults; Stable Diffusion's own files say set_alpha_to_one false.
    given = SDXL_SCHEDULER | {"_class_name": base, "clip_sample": True, "set_alpha_to_one": False}
    made, _ = method.sampling(given)
    made.save_pretrained(tmp_path)
    scheduler = type(made).from_pretrained(tmp_path)
    assert {"pcm": "DDIMScheduler", "tcd": "TCDScheduler", "lcm": "LCMScheduler"}[name] == type(scheduler).__name__
    assert (scheduler.config["prediction_type"], scheduler.config["clip_sample"]) == ("v_prediction", False)
    method.check(method.config, dataclasses.replace(FACTS, validation_num_inference_steps=steps))
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times
    grid = SCHEDULE.grid(method.config.num_ddim_timesteps)
    assert set(times) <= set(grid.tolist())


@pytest.mark.parametrize("steps", [4, 8])
def test_a_scheduler_step_is_the_jump_that_was_trained(steps: int) -> None:
    """Trailing DDIM goes from the top of a phase to its start, and from the lowest to alpha 1."""
    pcm = make("pcm", num_phases=steps)
    found = edges_by_start(pcm, 800)
    scheduler, _ = pcm.sampling(SDXL_SCHEDULER)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    for t in scheduler.timesteps:
        (edge,) = found[int(t)]
        x0, _ = SCHEDULE.split(noise, z, t[None], "epsilon")
        ours = SCHEDULE.add_noise(x0, noise, torch.tensor([edge]))
        torch.testing.assert_close(scheduler.step(noise, t, z).prev_sample, ours, rtol=1e-5, atol=1e-5)
    assert edge == CLEAN_EDGE


def test_tcd_lands_at_the_grids_0_and_adds_noise_as_eta_says() -> None:
    tcd = make("tcd", eta=0.5)
    scheduler, arguments = tcd.sampling(SDXL_SCHEDULER)
    assert arguments == {"num_inference_steps": 4, "guidance_scale": 0.0, "eta": 0.5}
    scheduler.set_timesteps(1)
    z, noise, t = torch.randn(1, 4, 3, 3).double(), torch.randn(1, 4, 3, 3).double(), torch.tensor([999])
    x0, _ = SCHEDULE.split(noise, z, t, "epsilon")
    ours = SCHEDULE.add_noise(x0, noise, torch.tensor([0]))
    torch.testing.assert_close(scheduler.step(noise, t[0], z, eta=0.5).prev_sample, ours, rtol=1e-5, atol=1e-5)


def refused(name: str, facts: RunFacts = FACTS, **options: Any) -> str:
    plugin = registry.load("distillers", name)
    config, _ = plugin.configure(options, ObjectiveSection())
    with pytest.raises(UserError) as caught:
        plugin.check(config, facts)
    (line,) = caught.value.lines
    return line


def test_phases_that_do_not_meet_the_grid_are_refused() -> None:
    line = refused("lcm", edge_policy="phased")
    assert line.startswith("distillation_config.num_phases: 4 phases do not divide num_ddim_timesteps (50); 40 steps")
    line = refused("pcm", num_ddim_timesteps=32)
    assert "32 does not divide the model's 1000 training timesteps" in line
    assert "num_phases" in refused("pcm", num_phases=41)
    with pytest.raises(UserError, match="num_phases: 0 is not possible"):
        registry.load("distillers", "pcm").configure({"num_phases": 0}, ObjectiveSection())


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 16, 12, 80])
def test_steps_off_the_phases_are_refused(steps: int) -> None:
    line = refused("pcm", dataclasses.replace(FACTS, validation_num_inference_steps=steps))
    assert line.startswith(f"validation_num_inference_steps: {steps} steps jump over the start of a phase")
    assert line.endswith("set it to one of 4, 8, 20, 40")


def test_steps_on_the_grid_are_allowed_and_told() -> None:
    def notices(name: str, steps: int, **options: Any) -> list[str]:
        plugin = registry.load("distillers", name)
        config, _ = plugin.configure(options, ObjectiveSection())
        return plugin.check(config, dataclasses.replace(FACTS, validation_num_inference_steps=steps))

    assert notices("pcm", 4) == []
    (line,) = notices("pcm", 8)
    assert line.startswith("validation_num_inference_steps: 8 steps for 4 phases end inside of phases")
    for steps in (1, 2, 3, 7, 50):
        assert notices("tcd", steps) == []
    line = refused("tcd", dataclasses.replace(FACTS, validation_num_inference_steps=51))
    assert line.startswith("validation_num_inference_steps: 51 is more than num_ddim_timesteps (50)")
    (line,) = notices("tcd", 4, num_ddim_timesteps=40)
    assert "TCDScheduler.from_pretrained of the base model always takes 50" in line


@pytest.mark.parametrize("name", ["lcm", "pcm", "tcd"])
def test_an_option_of_another_policy_is_named(name: str) -> None:
    plugin = registry.load("distillers", name)
    given = {"eta": 0.1, "num_phases": 8, "timestep_scaling_factor": 10.0}
    config, _ = plugin.configure(given, ObjectiveSection())
    lines = [line for line in plugin.check(config, FACTS) if "has no effect" in line]
    idle = {"lcm": ["num_phases", "eta"], "pcm": ["eta"], "tcd": ["timestep_scaling_factor", "num_phases"]}[name]
    policy = {"lcm": "origin", "pcm": "phased", "tcd": "random"}[name]
    assert lines == [f"distillation_config.{key}: has no effect with edge_policy '{policy}'" for key in idle]


def test_defaults_follow_the_phases() -> None:
    plugin = registry.load("distillers", "pcm")
    config, _ = plugin.configure({"num_phases": 8}, ObjectiveSection())
    steps = plugin.defaults(config, "lora").validation_num_inference_steps
    assert steps == 8
    assert plugin.check(config, dataclasses.replace(FACTS, validation_num_inference_steps=steps)) == []


def test_the_second_order_solver_asks_the_teacher_twice() -> None:
    for solver, sizes in (("ddim", [6, 3, 3]), ("dpm2s", [6, 6, 3, 3])):
        family = ToyFamily()
        config = LCMConfig(solver=solver)
        lcm = LCM(toy_setup(config, SCHEDULE, "epsilon", add_lora(ToyNetwork()), family))
        batch = toy_batch(3)
        lcm.loss("student", batch, lcm.draw(batch, Randomness(0)), 0)
        assert family.batch_sizes == sizes


def test_the_second_order_solver_and_zero_terminal_snr_are_refused() -> None:
    facts = dataclasses.replace(FACTS, schedule=ZERO_SNR, prediction_type="v_prediction")
    assert refused("lcm", facts, solver="dpm2s").startswith("distillation_config.solver: 'dpm2s' has no middle")
    assert LCM.check(LCMConfig(), facts) == []
