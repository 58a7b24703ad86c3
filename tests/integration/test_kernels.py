"""How networks are computed: compiled ones train as the others do, and a kernel that cannot run is refused.

Adapters must still be switched, and gradients recomputed rightly.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from simpletuner.config.errors import UserError
from tests.integration.conftest import Project

FULL = {"model_type": "full", "lora_rank": None}
STEPS = {"max_train_steps": 4}  # by the second step the adapter is not zero, and so the teacher is another network


def rows(project: Project, folder: Path, backend: str, **changes: Any) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    other = project.at(folder)
    other.train(**STEPS, dynamo_backend=backend, **changes)
    return other.rows()


def compare(project: Project, tmp_path: Path, backend: str, tolerance: float, **changes: Any) -> None:
    plain = rows(project, tmp_path / "plain", "no", **changes)
    counters.clear()
    compiled = rows(project, tmp_path / "compiled", backend, **changes)
    assert counters["frames"]["ok"] > 0
    assert not counters["unimplemented"]
    assert len(plain) == len(compiled) == 4
    assert plain[0]["loss"] == pytest.approx(compiled[0]["loss"], rel=min(1e-5, tolerance))
    for one, two in zip(plain, compiled, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=tolerance)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=tolerance)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, FULL], ids=["lora", "checkpointed", "full"])
def test_the_eager_backend_changes_nothing(project: Project, tmp_path: Path, changes: dict[str, Any]):
    compare(project, tmp_path, "eager", 1e-6, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, FULL], ids=["lora", "full"])
def test_inductor_agrees(project: Project, tmp_path: Path, changes: dict[str, Any]):
    # Adam divides a gradient by its own size: where it is nearly zero, the last bits decide the sign of a whole step.
    compare(project, tmp_path, "inductor", 2e-3, **changes)


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_last_bit(project: Project, tmp_path: Path):
    rows(project, tmp_path / "straight", "inductor")
    other = project.at(tmp_path / "cut")
    for steps in (2, 4):
        torch._dynamo.reset()
        other.train(dynamo_backend="inductor", max_train_steps=steps)
    one, two = (
        load_file(tmp_path / name / "output" / "pytorch_lora_weights.safetensors") for name in ("straight", "cut")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_later_steps_of_a_bucket_compile_nothing(project: Project, tmp_path: Path):
    project.datasets[0] |= {"crop": True, "crop_aspect": "square"}
    graphs: list[int] = []
    for steps in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        project.at(tmp_path / f"{steps}").train(dynamo_backend="eager", max_train_steps=steps)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


@pytest.mark.skipif(torch.cuda.is_available() and find_spec("xformers") is not None, reason="it can run here")
def test_a_kernel_that_cannot_run_here_is_refused_in_the_plan_with_all_else_that_is_missing(project: Project):
    with pytest.raises(UserError) as caught:
        project.train(attention_mechanism="xformers", optimizer="none-such")
    other, line = caught.value.lines
    assert other.startswith("optimizer: unknown value 'none-such'")
    missing = 'needs its package: pip install "simpletuner[xformers]"'
    assert line == "attention_mechanism: 'xformers' " + (
        missing if find_spec("xformers") is None else "needs a CUDA device, and there is none; use 'diffusers'"
    )
