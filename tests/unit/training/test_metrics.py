"""metrics.jsonl and the buffer in front of it."""

import json
import math
from pathlib import Path

import pytest
import torch

from simpletuner.config.errors import UserError
from simpletuner.training import metrics
from simpletuner.training.metrics import MetricsBuffer


def test_rows_come_back_in_order_with_plain_numbers() -> None:
    buffer = MetricsBuffer()
    buffer.add(1, {"loss": torch.tensor(0.5), "learning_rate": 1e-4})
    buffer.add(2, {"loss": torch.tensor(0.25), "grad_norm": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert buffer.flush() == [
        {"step": 1, "loss": 0.5, "learning_rate": 1e-4},
        {"step": 2, "loss": 0.25, "grad_norm": 2.0},
    ]
    assert buffer.flush() == []


def test_a_caller_may_reuse_its_tensors_and_holds_no_graph() -> None:
    buffer = MetricsBuffer()
    running = torch.tensor(1.0, requires_grad=True) * 3
    buffer.add(1, {"loss": running})
    running.detach().zero_()
    assert buffer.flush() == [{"step": 1, "loss": 3.0}]


def test_float64_stays_exact() -> None:
    buffer = MetricsBuffer()
    buffer.add(1, {"loss": torch.tensor(1 / 3, dtype=torch.float64), "norm": torch.tensor(0.5)})
    assert buffer.flush() == [{"step": 1, "loss": 1 / 3, "norm": 0.5}]


def test_all_tensors_are_reduced_and_moved_as_one() -> None:
    seen: list[torch.Size] = []

    def double(vector: torch.Tensor) -> torch.Tensor:
        seen.append(vector.shape)
        return 2 * vector

    buffer = MetricsBuffer()
    for step in (1, 2, 3):
        buffer.add(step, {"loss": torch.tensor(float(step)), "learning_rate": 0.1, "norm": torch.tensor(1.0)})
    rows = buffer.flush(double)
    assert seen == [torch.Size([6])]
    assert [(row["loss"], row["learning_rate"], row["norm"]) for row in rows] == [(2, 0.1, 2), (4, 0.1, 2), (6, 0.1, 2)]


def test_appended_rows_are_read_back_and_are_valid_json(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE_NAME
    assert metrics.read(path) == []
    metrics.append(path, [{"step": 1, "loss": 0.1}])
    metrics.append(path, [{"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}])
    rows = metrics.read(path)
    assert rows[0] == {"step": 1, "loss": 0.1}
    assert math.isnan(rows[1]["loss"])
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.1, None, None]


def test_truncation_drops_later_rows_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE_NAME
    metrics.append(path, [{"step": step, "loss": step / 7} for step in range(1, 8)])
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    assert len(metrics.read(path)) == 7
    assert metrics.truncate(path, 5) == 2
    assert path.read_text().splitlines() == [json.dumps({"step": step, "loss": step / 7}) for step in range(1, 6)]
    metrics.append(path, [{"step": 6, "loss": 0.0}])
    assert metrics.read(path)[-1] == {"step": 6, "loss": 0.0}
    assert [p.name for p in tmp_path.iterdir()] == [metrics.FILE_NAME]


def test_truncation_without_a_file_is_nothing(tmp_path: Path) -> None:
    assert metrics.truncate(tmp_path / metrics.FILE_NAME, 5) == 0
    assert list(tmp_path.iterdir()) == []


def test_damage_in_the_middle_is_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE_NAME
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        metrics.read(path)
