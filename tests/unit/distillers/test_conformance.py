"""What every method must do; a new file under distillers/ is tested here the moment it exists."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from simpletuner import registry
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Resume
from simpletuner.config.schema import ObjectiveSection
from simpletuner.distillers._base import Distiller, RunFacts
from simpletuner.hooks.eval_loss import FixedLevels
from simpletuner.randomness import Randomness
from simpletuner.schedules import from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER, ToyNetwork, add_lora, toy_batch, toy_setup, trainable

METHODS = registry.names("distillers")
SCHEDULE = from_scheduler_config(SDXL_SCHEDULER)


def method(name: str) -> type[Distiller]:
    return registry.load("distillers", name)


def make(name: str, module: Any = None) -> Distiller:
    plugin = method(name)
    config, _ = plugin.configure({}, ObjectiveSection())
    return plugin(toy_setup(config, SCHEDULE, "epsilon", module or add_lora(ToyNetwork())))


def test_the_methods_are_found() -> None:
    assert {"sft", "lcm", "pcm", "tcd"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_documented_and_say_what_a_resume_does(name: str) -> None:
    for key, field in method(name).Config.model_fields.items():
        assert field.description, key
        assert isinstance(field.json_schema_extra, dict)
        assert field.json_schema_extra["resume"] in get_args(Resume), key


@pytest.mark.parametrize("name", METHODS)
def test_roles_have_a_student_that_trains(name: str) -> None:
    assert method(name).roles("lora")["student"] == "train"
    assert set(make(name).updates(0)) <= set(method(name).roles("lora"))


@pytest.mark.parametrize("name", METHODS)
def test_defaults_pass_the_methods_own_check(name: str) -> None:
    plugin = method(name)
    config, _ = plugin.configure({}, ObjectiveSection())
    defaults = plugin.defaults(config, "lora")
    facts = RunFacts("lora", "epsilon", SCHEDULE, defaults.validation_num_inference_steps, defaults.validation_guidance)
    assert isinstance(plugin.check(config, facts), list)
    # Before the model has been downloaded nothing is known, and nothing may be refused for it.
    plugin.check(config, RunFacts("lora", None, None, None, None))


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_is_named(name: str) -> None:
    key = next(iter(method(name).Config.model_fields))
    with pytest.raises(UserError, match=f"distillation_config.{key}x: unknown option - did you mean '{key}'"):
        method(name).configure({f"{key}x": 1}, ObjectiveSection())


@pytest.mark.parametrize("name", METHODS)
def test_noise_levels_can_be_given_and_decide_nothing_else(name: str) -> None:
    distiller, batch = make(name), toy_batch(4)
    levels = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    fixed, drawn = (distiller.draw(batch, each) for each in (FixedLevels(1, levels), Randomness(1)))
    assert (fixed.start.diff() > 0).all()
    torch.testing.assert_close(fixed.start.double() / 1000, levels, atol=0.025, rtol=0)
    assert torch.equal(fixed.noise, drawn.noise)


@pytest.mark.parametrize("name", METHODS)
def test_draws_do_not_depend_on_the_batch_a_sample_is_in(name: str) -> None:
    distiller = make(name)
    whole = distiller.draw(toy_batch(4), Randomness(1))
    halves = [distiller.draw(toy_batch(2, first=first), Randomness(1)) for first in (0, 2)]
    found = 0
    for field in dataclasses.fields(whole):
        value = getattr(whole, field.name)
        if isinstance(value, Tensor):
            found += 1
            assert torch.equal(value, torch.cat([getattr(half, field.name) for half in halves])), field.name
    assert found >= 3
    assert whole.to(torch.device("meta")).noise.device.type == "meta"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_per_sample_and_reach_the_adapter_alone(name: str, dtype: torch.dtype) -> None:
    module = add_lora(ToyNetwork()).float()
    distiller = make(name, module)
    batch = toy_batch(3)
    # Cached moments may be bfloat16; the features follow the network.
    batch = dataclasses.replace(
        batch,
        mean=batch.mean.to(dtype),
        std=None if batch.std is None else batch.std.to(dtype),
        cond={key: value.float() for key, value in batch.cond.items()},
    )
    before = {key: value.clone() for key, value in module.state_dict().items()}
    output = distiller.loss("student", batch, distiller.draw(batch, Randomness(1)), 0)
    assert output.per_sample.shape == (3,)
    assert output.per_sample.dtype == torch.float32
    assert bool((output.per_sample > 0).all())
    for metric in output.metrics.values():
        assert (metric.shape, metric.requires_grad) == ((), False)
    output.per_sample.sum().backward()
    for key, parameter in module.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in key), key
    assert len(trainable(module)) == 10
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_a_samples_loss_does_not_depend_on_its_neighbours(name: str) -> None:
    distiller = make(name)

    def losses(size: int, first: int) -> Tensor:
        batch = toy_batch(size, first)
        return distiller.loss("student", batch, distiller.draw(batch, Randomness(1)), 0).per_sample.detach()

    torch.testing.assert_close(losses(4, 0), torch.cat([losses(1, 0), losses(3, 1)]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_state_goes_through_a_checkpoint(name: str) -> None:
    distiller = make(name)
    distiller.after_step(1)
    state = distiller.state_dict()
    other = make(name)
    other.load_state_dict(state)
    assert other.state_dict() == state
    with pytest.raises(ValueError, match="no_such_thing"):
        other.load_state_dict(state | {"no_such_thing": 1})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "DDPMScheduler"])
def test_sampling_gives_a_scheduler_on_the_models_own_betas(name: str, scheduler: str) -> None:
    config = SDXL_SCHEDULER | {"_class_name": scheduler, "_use_default_values": ["prediction_type"]}
    distiller = make(name)
    made, arguments = distiller.sampling(config)
    assert arguments.keys() >= {"num_inference_steps", "guidance_scale"}
    assert made.config["beta_schedule"] == "scaled_linear"
    assert made.config["prediction_type"] == "epsilon"
    made.set_timesteps(arguments["num_inference_steps"])
    assert len(made.timesteps) == arguments["num_inference_steps"]


def test_objective_options_of_the_user_reach_a_method_that_has_them() -> None:
    lcm = method("lcm")
    given = ObjectiveSection(loss_type="huber", snr_gamma=5.0)
    config, notices = lcm.configure({"w_max": 8.0}, given)
    assert (config.loss_type, config.huber_c, config.w_max) == ("huber", 0.001, 8.0)
    assert notices == ["snr_gamma: has no effect, because the method has no such option"]
    config, notices = lcm.configure({"loss_type": "l2"}, given)
    assert config.loss_type == "l2"
    assert "loss_type: 'l2' in distillation_config wins over 'huber' outside of it" in notices


@pytest.mark.parametrize("name", METHODS)
def test_huber_c_has_no_effect_on_l2(name: str) -> None:
    idle = "huber_c: has no effect: loss_type is l2"
    outside = ObjectiveSection(huber_c=0.5)
    for given in ({}, {"huber_c": 0.5}):
        assert idle in method(name).configure(given, outside)[1]
        assert idle not in method(name).configure({"loss_type": "huber", **given}, outside)[1]
    assert method(name).configure({"loss_type": "l2"}, ObjectiveSection())[1] == []


def test_options_under_the_name_of_another_method_are_said_to_be_that() -> None:
    line = (
        r"^distillation_config.lcm: these are options of 'lcm', which is not the distillation_method; write them flat"
    )
    with pytest.raises(UserError, match=line):
        method("pcm").configure({"lcm": {"w_max": 8.0}}, ObjectiveSection())


def test_every_wrong_option_is_a_line_of_its_own() -> None:
    with pytest.raises(UserError) as caught:
        method("lcm").configure(
            {"num_ddim_timesteps": 0, "w_min": -1, "loss_type": "l1", "huber": 1}, ObjectiveSection()
        )
    assert len(caught.value.lines) == 4
    assert "distillation_config.num_ddim_timesteps: 0 is not possible: input should be greater" in caught.value.lines[0]
    # Of a key outside of distillation_config, that place is not named.
    allowed = "input should be 'l2', 'huber' or 'cauchy'"
    with pytest.raises(UserError, match=f"^loss_type: 'smooth_l1' is not possible: {allowed}"):
        method("lcm").configure({}, ObjectiveSection(loss_type="smooth_l1"))
