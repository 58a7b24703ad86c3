import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner import registry
from simpletuner.config.schema import ObjectiveSection
from simpletuner.distillers._base import RunFacts
from simpletuner.distillers.lcm import LCMConfig
from simpletuner.randomness import Randomness
from simpletuner.schedules import from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER, ToyNetwork, add_lora, toy_batch, toy_setup

DOCUMENTATION = Path(__file__).parents[3] / "documentation"


def test_the_method_in_the_documentation_works() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCUMENTATION / "ADDING_A_DISTILLER.md").read_text(), re.S)
    names: dict[str, Any] = {"__name__": "halving"}
    exec(compile(code, "halving.py", "exec"), names)  # noqa: S102  (the repository's own page)
    plugin = names["PLUGIN"]
    config, notices = plugin.configure({"num_student_steps": 4}, ObjectiveSection())
    assert notices == []
    setup = toy_setup(config, from_scheduler_config(SDXL_SCHEDULER), "v_prediction", add_lora(ToyNetwork()))
    method = plugin(setup)
    batch = toy_batch(4)
    draw = method.draw(batch, Randomness(0))
    assert set(draw.start.tolist()) <= {249, 499, 749, 999}
    loss = method.loss("student", batch, draw, 0).per_sample
    assert loss.shape == (4,)
    assert bool((loss > 0).all())
    # A student that is its teacher still errs, by the teacher's own second step; without a step there is no error.
    still = method.loss(
        "student", batch, type(draw)(draw.noise, None, draw.start, draw.start, draw.start), 0
    ).per_sample
    torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-20)
    scheduler, arguments = method.sampling(SDXL_SCHEDULER)
    scheduler.set_timesteps(arguments["num_inference_steps"])
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("name", ["pcm", "tcd"])
def test_the_pages_on_lcms_kin_name_what_differs(name: str) -> None:
    page = (DOCUMENTATION / "distillers" / f"{name.upper()}.md").read_text()
    config, _ = registry.load("distillers", name).configure({}, ObjectiveSection())
    plain = LCMConfig().model_dump()
    differing = {key: value for key, value in config.model_dump().items() if value != plain[key]}
    assert differing.keys() >= {"edge_policy"}
    for key, value in differing.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key}`")]
        assert str(value) in row, key
    (given,) = re.findall(r"```json\n(.*?)```", page, re.S)
    assert json.loads(given)["distillation_method"] == name
    plugin = registry.load("distillers", name)
    config, notices = plugin.configure(json.loads(given)["distillation_config"], ObjectiveSection())
    steps = plugin.defaults(config, "lora").validation_num_inference_steps
    schedule = from_scheduler_config(SDXL_SCHEDULER)
    assert notices + plugin.check(config, RunFacts("lora", "epsilon", schedule, steps, 0.0)) == []
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    compile(code, name, "exec")
    method = plugin(toy_setup(config, schedule, "epsilon", add_lora(ToyNetwork())))
    scheduler, arguments = method.sampling(SDXL_SCHEDULER)
    assert type(scheduler).__name__ in code
    assert {f"{key}={value:g}" for key, value in arguments.items()} <= set(re.findall(r"\w+=[\d.]+", code))


def test_the_page_on_lcm_names_every_option_and_its_default() -> None:
    page = (DOCUMENTATION / "distillers" / "LCM.md").read_text()
    for key, value in LCMConfig().model_dump().items():
        (row,) = [line for line in page.splitlines() if line.startswith("| ") and f"`{key}`" in line]
        assert str(value) in row, key
