"""``report.html``: a run on one page that needs no server and no network.

All that stands on it is escaped, the pictures are small JPEGs within the file, and its content security policy allows
nothing from elsewhere.
"""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import jinja2
from PIL import Image

from simpletuner.atomic import files_into
from simpletuner.data.transforms import open_rgb
from simpletuner.training.metrics import Row

FILE_NAME = "report.html"
_MOST_POINTS = 1000
_MOST_MOMENTS = 12
_MOST_PICTURES = 240
"""Of all moments together, some 5 MB: many prompts are shown at fewer moments."""
_PICTURE_PX = 320
_THUMBNAIL_PX = 96
_NOTHING = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="  # transparent
_CURVES = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "samples_per_second": "samples a second",
}
"""Last part of a metric's name -> heading."""
_SMOOTHED = ("loss", "grad_norm")


@dataclass(frozen=True)
class Curve:
    """A metric by step."""

    name: str
    values: Sequence[Sequence[float | None]]
    """As it was, and smoothed where that helps."""

    @property
    def last(self) -> str:
        """The last value, for people."""
        found = [value for value in self.values[0] if value is not None]
        return f"{found[-1]:.4g}" if found else "none"


@dataclass(frozen=True)
class PictureRow:
    """The pictures of one prompt, as data URIs."""

    prompt: str
    fixed: Sequence[tuple[str, str]]
    """(label, picture) of what does not change with the run: the base model's."""
    moving: Sequence[str]
    """One for each moment."""


@dataclass(frozen=True)
class BucketPictures:
    """A bucket of a dataset with some of its images, (name, picture as data URI)."""

    name: str
    num_images: int
    pictures: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Report:
    """What stands on the page."""

    title: str
    status: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    plan: Sequence[tuple[str, str]]
    steps: Sequence[float]
    curves: Sequence[Curve]
    moments: Sequence[str]
    pictures: Sequence[PictureRow]
    buckets: Sequence[BucketPictures]
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]]
    """(heading, rows of cells)."""
    code: str


def report_html(report: Report) -> str:
    """Returns the page."""
    assets = files("simpletuner.publishing") / "assets"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    data = {
        "steps": report.steps,
        "curves": [{"name": curve.name, "values": curve.values} for curve in report.curves],
        "moments": report.moments,
        # The last moment is on the page as it is.
        "rows": [{"prompt": row.prompt, "moving": row.moving[:-1]} for row in report.pictures],
    }
    # Within a script element only "<" could end it; JSON may write it so.
    quoted = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return environment.from_string((assets / "report.html.jinja").read_text(encoding="utf8")).render(
        report=report,
        data=quoted,
        uplot_js=(assets / "uPlot.iife.min.js").read_text(encoding="utf8"),
        uplot_css=(assets / "uPlot.min.css").read_text(encoding="utf8"),
    )


def write_report(folder: Path, report: Report) -> Path:
    """Writes the page, atomically; returns its path."""
    page = report_html(report)
    with files_into(folder) as made:
        (made / FILE_NAME).write_text(page, encoding="utf8")
    return folder / FILE_NAME


def curves_of(rows: Sequence[Row]) -> tuple[list[float], list[Curve]]:
    """Returns the steps and the curves of a run's metrics, thinned out where there are very many."""
    by_step: dict[float, Row] = {}
    for row in rows:
        by_step[row["step"]] = by_step.get(row["step"], {}) | row
    rows = sorted(by_step.values(), key=lambda row: row["step"])
    stride = max(1, math.ceil(len(rows) / _MOST_POINTS))
    last = len(rows) - 1
    rows = [row for number, row in enumerate(rows) if number % stride == 0 or number == last or "eval_loss" in row]
    found: list[Curve] = []
    keys = dict.fromkeys(key for row in rows for key in row if key.rpartition("/")[2] in _CURVES)
    for key in sorted(keys, key=lambda key: list(_CURVES).index(key.rpartition("/")[2])):
        role, _, name = key.rpartition("/")
        values = [_finite(row.get(key)) for row in rows]
        heading = f"{role}: {_CURVES[name]}" if role else _CURVES[name]
        smooth = [list(_smoothed(values))] if name in _SMOOTHED and len(values) > 20 else []
        found.append(Curve(heading, [values, *smooth]))
    return [row["step"] for row in rows], found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _smoothed(values: Sequence[float | None], weight: float = 0.9) -> Iterator[float | None]:
    """Yields the running average of the values so far, the older ones the less."""
    total = mass = 0.0
    for value in values:
        if value is not None:
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        yield total / mass if mass else None


def pictures_of(
    folder: Path, requests: Mapping[str, str], labels: Mapping[str, str]
) -> tuple[list[str], list[PictureRow]]:
    """Returns the moments of the run that were drawn, and the pictures of each prompt.

    Args:
        folder: The folder of the validation, with a folder for each column.
        requests: File name in these -> the prompt as it may be read.
        labels: Column -> label.
    """
    columns = [path.name for path in sorted(folder.glob("*")) if path.is_dir()]
    fixed = [name for name in columns if not name.startswith("step-")]
    moving = [name for name in columns if name.startswith("step-")]
    most = min(_MOST_MOMENTS, max(2, _MOST_PICTURES // max(1, len(requests))))
    if len(moving) > most:
        places = [round(n * (len(moving) - 1) / (most - 1)) for n in range(most)]
        moving = [moving[place] for place in places]
    rows: list[PictureRow] = []
    for file, prompt in requests.items():
        whole = [name for name in (*fixed, *moving) if (folder / name / file).is_file()]
        still = [(labels.get(name, name), picture_uri(folder / name / file)) for name in whole if name in fixed]
        shown = [picture_uri(folder / name / file) if name in whole else _NOTHING for name in moving]
        if whole:
            rows.append(PictureRow(prompt, still, shown))
    return [labels.get(name, name) for name in moving], rows


def picture_uri(file: Path) -> str:
    """Returns a picture of ours as a data URI; one that was read before is not read again. Raises OSError."""
    return _read_uri(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _read_uri(file: Path, _changed: int) -> str:
    with Image.open(file) as opened:
        return _uri(opened.convert("RGB"), _PICTURE_PX)


def _uri(picture: Image.Image, edge_px: int) -> str:
    """Returns a picture, made no larger than the edge, as a data URI."""
    picture.thumbnail((edge_px, edge_px))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail_uri(content: bytes) -> str:
    """Returns an image of a dataset, as it is trained on, as a small data URI. Raises BadImage."""
    return _uri(open_rgb(io.BytesIO(content)), _THUMBNAIL_PX)


def markdown_table(text: str) -> list[list[str]]:
    """Returns the cells of the first table of a Markdown text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not all(set(cell) <= set("-: ") for cell in row) or not any(row)]


def code_of(card: str) -> str:
    """Returns the first block of Python in a model card."""
    _, found, rest = card.partition("```python\n")
    return rest.partition("```")[0].strip() if found else ""
