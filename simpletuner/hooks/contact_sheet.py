"""One picture that shows a run: a row for each prompt and size, a column for each moment."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from simpletuner.atomic import files_into

_GAP_PX = 6
_LABEL_PX = 18
_CELL_PX = (96, 320)
"""Smallest and largest edge of a cell: tiny pictures are enlarged, large ones reduced."""
_MAX_COLUMNS = 12


def write_contact_sheet(path: Path, columns: Sequence[tuple[str, Path]], rows: Sequence[tuple[str, str]]) -> None:
    """Writes the sheet; the first two columns and the last are always kept, and at most 12 in all.

    Args:
        path: The PNG file to write.
        columns: A label and a folder of pictures each.
        rows: A label and the file name that the row's picture has in every folder.
    """
    columns = _thinned(columns)
    cell = _cell_size([folder / name for _, folder in columns for _, name in rows])
    width = len(columns) * (cell + _GAP_PX) + _GAP_PX
    row_px = cell + _LABEL_PX + _GAP_PX
    sheet = Image.new("RGB", (width, _LABEL_PX + _GAP_PX + len(rows) * row_px), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, (label, folder) in enumerate(columns):
        left = _GAP_PX + column * (cell + _GAP_PX)
        pen.text((left, 3), fitting(label, cell, font), fill="black", font=font)
        for row, (_, name) in enumerate(rows):
            if (folder / name).exists():
                sheet.paste(_cell(folder / name, cell), (left, _LABEL_PX + row * row_px + _LABEL_PX))
    for row, (label, _) in enumerate(rows):
        pen.text((_GAP_PX, _LABEL_PX + row * row_px), fitting(label, width - _GAP_PX, font), fill="#404040", font=font)
    with files_into(path.parent) as made:
        sheet.save(made / path.name, format="PNG")


def _thinned(columns: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    if len(columns) <= _MAX_COLUMNS:
        return list(columns)
    fixed, rest = list(columns[:2]), columns[2:]
    kept = _MAX_COLUMNS - len(fixed)
    return fixed + [rest[round(i * (len(rest) - 1) / (kept - 1))] for i in range(kept)]


def _cell_size(paths: Sequence[Path]) -> int:
    """Returns the edge of a cell: that of the largest picture, within bounds."""
    largest = 1
    for path in paths:
        if path.exists():
            with Image.open(path) as picture:
                largest = max(largest, *picture.size)
    smallest_cell, largest_cell = _CELL_PX
    enlarged = largest * max(1, smallest_cell // largest)
    return min(enlarged, largest_cell)


def _cell(path: Path, edge: int) -> Image.Image:
    """Returns a picture scaled to fit a square cell, centred on grey; small ones by whole factors, so pixels show."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = edge / max(picture.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), resample)
    cell = Image.new("RGB", (edge, edge), "#e0e0e0")
    cell.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return cell


def fitting(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Returns the text, cut so that it is no wider than the given pixels."""
    ascii_text = text.encode("ascii", "replace").decode()
    while ascii_text and font.getlength(ascii_text) > width_px:
        ascii_text = ascii_text[:-1]
    return ascii_text
