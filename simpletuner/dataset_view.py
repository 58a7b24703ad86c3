"""What the trainer sees of its datasets: counts, buckets, captions, problems, and a picture of each bucket."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simpletuner.atomic import files_into
from simpletuner.backends._base import Backend, Unusable, open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError, printable
from simpletuner.data.buckets import Bucket, assign
from simpletuner.data.captions import read_captions
from simpletuner.data.columns import integers
from simpletuner.data.encode import NUM_DECODERS
from simpletuner.data.geometry import Geometry, geometry
from simpletuner.data.identity import ahead
from simpletuner.data.manifest import Manifest, Progress, scan
from simpletuner.data.summary import DatasetSummary, summarise
from simpletuner.data.transforms import BadImage, open_rgb
from simpletuner.hooks.contact_sheet import fitting

_NUM_SAMPLES = 4
"""Captions shown, and images named for a problem."""
_BAR_WIDTH = 40
_COLUMNS = 4
_CELL_PX = 240
_LABEL_PX = 32
_GAP_PX = 8


@dataclass(frozen=True)
class Look:
    """How closely to look."""

    images_per_sheet: int = 12
    """0: no sheets are drawn."""
    decode_all: bool = False
    """Whether to decode every image, and so to find the damage behind the headers."""
    output: Path | None = None
    """Folder for the sheets, in one folder a dataset; None: the caches of the datasets."""


def dataset_lines(datasets: Iterable[DatasetConfig], look: Look, progress: Progress | None = None) -> Iterator[str]:
    """Yields what is to be said, dataset by dataset; writes the manifests and the sheets.

    Raises:
        UserError: A dataset cannot be read, or has no image left.
    """
    for dataset in datasets:
        summary = summarise(read_captions(scan(dataset, progress=progress)))
        folder = dataset.cache_dir_vae / "sheets" if look.output is None else look.output / dataset.id
        sheets, damaged = _look_at_images(summary, look, folder, progress)
        yield from _counts(summary)
        yield from _captions(summary.manifest)
        yield from _problems({**summary.problems, **damaged})
        yield f"sheets      {sheets} in {folder}" if sheets else "sheets      none"


def _counts(summary: DatasetSummary) -> Iterator[str]:
    config, largest = summary.config, max(map(len, summary.buckets))
    yield (
        f"dataset     {printable(config.id)}: {summary.num_images} images in {len(summary.buckets)} buckets, "
        f"{summary.batches_per_epoch(1)} batches of {config.train_batch_size} an epoch"
    )
    for bucket in summary.buckets:
        bar = "#" * max(1, round(_BAR_WIDTH * len(bucket) / largest))
        yield f"  {bucket.name:>10}  {len(bucket):>8}  {bar}"
    if short := summary.num_short(1):
        yield f"            {short} of them smaller than a batch: trained as a short batch, nothing is dropped"


def _captions(manifest: Manifest) -> Iterator[str]:
    """Yields how many captions there are and some of them, from all over the dataset."""
    captions, ids = manifest.captions, manifest.ids
    words = [len(caption.split()) for own in captions for caption in own]
    lengths = f"{min(words)} to {max(words)}" if min(words) < max(words) else f"{max(words)}"
    yield f"captions    {len(words)} of {lengths} words"
    for row in np.unique(np.linspace(0, len(ids) - 1, _NUM_SAMPLES).astype(int)).tolist():
        more = f" (and {len(captions[row]) - 1} more)" if len(captions[row]) > 1 else ""
        yield printable(f"            {ids[row]}: {captions[row][0] or '(empty)'}{more}")


def _problems(problems: dict[str, Sequence[str]]) -> Iterator[str]:
    heading = "problems"
    if not problems:
        yield f"{heading:12}none"
    for reason, ids in sorted(problems.items(), key=lambda item: -len(item[1])):
        more = f" and {len(ids) - _NUM_SAMPLES} more" if len(ids) > _NUM_SAMPLES else ""
        yield printable(f"{heading:12}{len(ids)} left out: {reason}: {', '.join(ids[:_NUM_SAMPLES])}{more}")
        heading = ""


def _look_at_images(
    summary: DatasetSummary, look: Look, folder: Path, progress: Progress | None
) -> tuple[int, dict[str, list[str]]]:
    """Draws the sheets; returns their number, and reason -> images that cannot be decoded."""
    dataset, backend, rows = summary.config, open_backend(summary.config), summary.manifest.rows
    widths, heights = integers(rows, "width").tolist(), integers(rows, "height").tolist()
    images = list(zip(summary.manifest.ids, widths, heights, strict=True))
    damaged: dict[str, list[str]] = {}
    num_sheets = done = 0
    with ThreadPoolExecutor(NUM_DECODERS) as pool:
        for bucket in assign(summary.manifest):
            entries = bucket.entries if look.decode_all else bucket.entries[: look.images_per_sheet]
            jobs = [images[entry] for entry in entries]
            cells: list[Image.Image] = []
            for job, cell in zip(jobs, ahead(pool, lambda job: _cell(dataset, backend, *job), jobs, 16), strict=True):
                if isinstance(cell, str):
                    damaged.setdefault(cell, []).append(job[0])
                elif len(cells) < look.images_per_sheet:
                    cells.append(cell)
                done += 1
                if progress and look.decode_all:
                    progress(done, len(images), f"{dataset.id}: decoding")
            if cells:
                _write_sheet(folder, bucket, cells)
                num_sheets += 1
    return num_sheets, damaged


def _cell(dataset: DatasetConfig, backend: Backend, path: str, width: int, height: int) -> Image.Image | str:
    """Returns a labelled thumbnail of an image with its crop drawn in, or why it cannot be had."""
    try:
        with backend.open(path) as file:
            image = open_rgb(file)
    except (BadImage, Unusable) as error:
        return str(error)
    except OSError as error:
        return f"cannot be opened: {error.strerror}" if error.strerror else "cannot be opened"
    cut = geometry(dataset, path, width, height)
    cell = Image.new("RGB", (_CELL_PX, _CELL_PX + _LABEL_PX), "white")
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    thumbnail = _with_crop(image, cut)
    cell.paste(thumbnail, ((_CELL_PX - thumbnail.width) // 2, (_CELL_PX - thumbnail.height) // 2))
    done = f"{width}x{height} to {cut.resized[0]}x{cut.resized[1]}, cut at {cut.left},{cut.top}"
    for line, text in enumerate((path, done)):
        pen.text((0, _CELL_PX + 2 + 14 * line), fitting(text, _CELL_PX, font), fill="black", font=font)
    return cell


def _with_crop(image: Image.Image, cut: Geometry) -> Image.Image:
    """Returns the image scaled to fit a cell, what is cut off darkened, and a line around what is trained on."""
    scale = _CELL_PX / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    edges = cut.left, cut.top, cut.left + cut.target[0], cut.top + cut.target[1]
    left, top, right, bottom = (
        round(edge * small.size[axis % 2] / cut.resized[axis % 2]) for axis, edge in enumerate(edges)
    )
    shown = small.point(lambda value: value * 0.35)
    shown.paste(small.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(shown).rectangle((left, top, right - 1, bottom - 1), outline="red", width=2)
    return shown


def _write_sheet(folder: Path, bucket: Bucket, cells: Sequence[Image.Image]) -> None:
    """Writes the sheet of a bucket. Raises UserError when the folder cannot be written."""
    step, rows = _CELL_PX + _GAP_PX, -(-len(cells) // _COLUMNS)
    size = min(len(cells), _COLUMNS) * step + _GAP_PX, rows * (step + _LABEL_PX) + _LABEL_PX
    sheet = Image.new("RGB", size, "white")
    font = ImageFont.load_default(14)
    title = f"{bucket.dataset_id} {bucket.name}: {len(cells)} of {len(bucket)} images"
    ImageDraw.Draw(sheet).text((_GAP_PX, 8), fitting(title, size[0], font), fill="black", font=font)
    for number, cell in enumerate(cells):
        row, column = divmod(number, _COLUMNS)
        sheet.paste(cell, (_GAP_PX + column * step, _LABEL_PX + row * (step + _LABEL_PX)))
    try:
        with files_into(folder) as made:
            sheet.save(made / f"{bucket.name}.png")
    except OSError as error:
        raise UserError(f"cannot write the sheets into '{folder}': {error.strerror or error}") from error
