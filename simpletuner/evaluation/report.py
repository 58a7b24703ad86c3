"""An evaluation as a table for people, as Markdown and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner.evaluation.samplers import FEW_STEPS
from simpletuner.evaluation.scores import Interval, Row, best


@dataclass(frozen=True)
class Report:
    """All rows of an evaluation; they have the same prompts."""

    real: Row
    """Pictures as they were drawn for the model to learn from: what nothing can beat."""
    teacher: Row
    undistilled: Sequence[Row]
    student: Sequence[Row]

    @property
    def num_prompts(self) -> int:
        """Pictures of each row and seed."""
        return self.teacher.right.shape[1]

    @property
    def rows(self) -> list[Row]:
        """The rows of the table: of the undistilled samplers the best for each number of steps."""
        return [self.real, self.teacher, *(best(self.undistilled, steps) for steps in FEW_STEPS), *self.student]

    def text(self) -> str:
        """Returns the table and the comparisons in plain text."""
        width = max(len(row.label) for row in self.rows)
        lines = [f"{'':{width}}  {'all right':>9}  {'95 %':>9}  {'Frechet':>7}"]
        lines += [f"{label:{width}}  {right:>9}  {ends:>9}  {far:>7}" for label, right, ends, far in self._cells()]
        return "\n".join([*lines, "", *self.comparisons()])

    def markdown(self) -> str:
        """Returns the table and the comparisons in Markdown."""
        lines = ["| | all right | 95 % | Frechet |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(cells)} |" for cells in self._cells()]
        return "\n".join([*lines, "", *(f"- {line}" for line in self.comparisons())]) + "\n"

    def json(self) -> dict[str, Any]:  # Any: JSON
        """Returns everything, the samplers that are not in the table included."""
        return {
            "num_prompts": self.num_prompts,
            "real": self.real.to_json(),
            "teacher": self.teacher.to_json(),
            "undistilled": [row.to_json() for row in self.undistilled],
            "student": [row.to_json() for row in self.student],
            "comparisons": self.comparisons(),
        }

    def comparisons(self) -> list[str]:
        """Returns a line for each number of steps: the student beside the teacher and the best undistilled sampler."""
        lines: list[str] = []
        for row in self.student:
            ratio, ends = row.ratio(self.teacher)
            rival = best(self.undistilled, row.num_inference_steps)
            lead, lead_ends = row.lead(rival)
            far = row.distance / self.teacher.distance
            lines.append(
                f"{row.label}: {ratio:.2f} ({ends[0]:.2f} to {ends[1]:.2f}) of the teacher's accuracy, "
                f"{100 * lead:+.0f} points ({100 * lead_ends[0]:+.0f} to {100 * lead_ends[1]:+.0f}) against the best "
                f"undistilled sampler, Frechet distance {far:.2f} times the teacher's"
            )
        return lines

    def _cells(self) -> list[tuple[str, str, str, str]]:
        return [
            (row.label, f"{100 * row.accuracy:.1f} %", _ends(row.interval), f"{row.distance:.2f}") for row in self.rows
        ]


def _ends(interval: Interval) -> str:
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}"
