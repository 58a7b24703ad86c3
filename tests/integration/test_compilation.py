"""Compiled networks train as the others do: adapters are still switched, and gradients are recomputed rightly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

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
    for one, two in zip(plain, compiled, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=tolerance)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=tolerance)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, FULL], ids=["lora", "checkpointed", "full"])
def test_the_eager_backend_changes_nothing(project: Project, tmp_path: Path, changes: dict[str, Any]):
    compare(project, tmp_path, "eager", 1e-6, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, FULL], ids=["lora", "full"])
def test_inductor_agrees(project: Project, tmp_path: Path, changes: dict[str, Any]):
    compare(project, tmp_path, "inductor", 1e-4, **changes)
