"""What the run reached, as one table at its end."""

import logging
import statistics
from dataclasses import dataclass, field

from simpletuner.hooks.progress import HasStep
from simpletuner.training.metrics import Row

_LOG = logging.getLogger(__name__)
_COLUMNS = (
    ("samples_per_second", "samples/s", "{:.3g}"),
    ("tflops_per_second", "TFLOP/s", "{:.3g}"),
    ("mfu", "of the device's peak", "{:.0%}"),
    ("data_wait", "waiting for data", "{:.1%}"),
    ("peak_memory_gib", "most memory, GiB", "{:.2f}"),
)


@dataclass
class ThroughputHook:
    """Collects the rates of the rows that were read; the first of a process has loading and compiling in it."""

    _rows: list[Row] = field(default_factory=list[Row])

    def on_start(self, state: HasStep) -> None:
        """Has nothing to do yet."""

    def on_step(self, state: HasStep, row: Row | None) -> None:
        """Keeps a row."""
        if row is not None:
            self._rows.append(row)

    def on_end(self, state: HasStep) -> None:
        """Says the medians."""
        if self._rows:
            _LOG.info("%s", self.table())

    def table(self) -> str:
        """Returns a heading and a line of figures: medians over the readings, of memory the most."""
        rows = self._rows[1:] or self._rows
        cells: list[tuple[str, str]] = []
        for key, heading, form in _COLUMNS:
            values = [row[key] for row in rows if key in row]
            if values:
                value = max(values) if key == "peak_memory_gib" else statistics.median(values)
                cells.append((heading, form.format(value)))
        widths = [max(map(len, cell)) for cell in cells]
        return "\n".join(
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
            for line in zip(*cells, strict=True)
        )
