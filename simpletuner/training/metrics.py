"""The numbers of a run: kept on the device until they are logged, then one line of JSON a step in metrics.jsonl."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from simpletuner.config.errors import UserError

Row = dict[str, float]
"""The numbers of one step; ``step`` counts finished optimizer steps."""

FILE_NAME = "metrics.jsonl"


@dataclass
class MetricsBuffer:
    """Rows whose tensors stay on their device until ``flush``, which moves all of them in one transfer."""

    _rows: list[dict[str, Tensor | float]] = field(default_factory=list[dict[str, Tensor | float]])

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Keeps the 0-d tensors and numbers of a step (as copies: the caller may go on with its accumulators)."""
        copies = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        self._rows.append({"step": step, **copies})

    def flush(self, reduce: Callable[[Tensor], Tensor] | None = None) -> list[Row]:
        """Returns the rows as plain numbers and forgets them; this is the one point that waits for the device.

        Args:
            reduce: Applied to the [N] vector of all tensor values before it is moved, such as a mean over ranks: every
                rank then calls ``flush`` at the same step with the same keys.
        """
        rows, self._rows = self._rows, []
        tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
        moved = iter(_to_host(tensors, reduce))
        return [
            {key: next(moved) if isinstance(value, Tensor) else value for key, value in row.items()} for row in rows
        ]


def _to_host(tensors: list[Tensor], reduce: Callable[[Tensor], Tensor] | None) -> list[float]:
    if not tensors:
        return []
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    stacked = torch.stack([t.to(device, dtype, non_blocking=True) for t in tensors])
    return cast("list[float]", (stacked if reduce is None else reduce(stacked)).tolist())  # pyright: ignore[reportUnknownMemberType]


class RowsInOrder:
    """Hands rows on in the order of their steps, though some are there before those of earlier steps."""

    def __init__(self, write: Callable[[Sequence[Row]], None], step: int) -> None:
        """Keeps who writes, and the step up to which all is written."""
        self._write, self._step = write, step
        self._early: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Hands on rows that follow on those before, and the early ones of their steps behind each."""
        if not rows:
            return
        self._step = int(rows[-1]["step"])
        ready = [row for row in self._early if row["step"] <= self._step]
        self._early = [row for row in self._early if row["step"] > self._step]
        self._write(sorted([*rows, *ready], key=lambda row: row["step"]))

    def add_early(self, row: Row) -> None:
        """Hands on a row as soon as all rows up to its step are."""
        if row["step"] <= self._step:
            self._write([row])
        else:
            self._early.append(row)


def append(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Adds rows to the file, a JSON object a line (NaN and infinity as null: JSON has none), and flushes it."""
    lines = [json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) for row in rows]
    with path.open("a", encoding="ascii") as file:
        file.writelines(line + "\n" for line in lines)


def read(path: Path) -> list[Row]:
    """Returns the file's rows (null as NaN), without a last line that a killed run left torn; no file is no rows.

    Raises:
        UserError: Another line is damaged.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged; mend or delete the line") from error
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def truncate(path: Path, step: int) -> int:
    """Returns how many rows were dropped because they lie after ``step``; the file is replaced in one rename."""
    rows = read(path)
    kept = [row for row in rows if row["step"] <= step]
    if path.exists():
        temporary = path.with_name(path.name + ".writing")
        temporary.unlink(missing_ok=True)
        append(temporary, kept)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    return len(rows) - len(kept)
