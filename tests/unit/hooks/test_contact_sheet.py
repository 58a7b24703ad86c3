from pathlib import Path

import pytest
from PIL import Image

from simpletuner.hooks.contact_sheet import write_contact_sheet

CELL, GAP, LABEL = 96, 6, 18


def columns(folder: Path, count: int) -> list[tuple[str, Path]]:
    """Writes one grey picture into each of ``count`` folders, each brighter than the one before."""
    made: list[tuple[str, Path]] = []
    for number in range(count):
        place = folder / f"column-{number}"
        place.mkdir()
        Image.new("RGB", (96, 48), (number, number, number)).save(place / "picture.png")
        made.append((f"column {number}", place))
    return made


def shown(sheet: Path, count: int) -> list[int]:
    """Returns the brightness at the middle of each cell of the first row."""
    with Image.open(sheet) as picture:
        assert picture.width == count * (CELL + GAP) + GAP
        top = 2 * LABEL + CELL // 2
        return [picture.getpixel((GAP + number * (CELL + GAP) + CELL // 2, top))[0] for number in range(count)]


def test_the_first_two_columns_and_the_last_are_always_there(tmp_path: Path):
    sheet = tmp_path / "sheet.png"
    write_contact_sheet(sheet, columns(tmp_path, 40), [("row", "picture.png")])
    found = shown(sheet, 12)
    assert found[:3] == [0, 1, 2]
    assert found[-1] == 39
    assert found == sorted(set(found))


def test_few_columns_are_all_there(tmp_path: Path):
    sheet = tmp_path / "sheet.png"
    write_contact_sheet(sheet, columns(tmp_path, 3), [("row", "picture.png")])
    assert shown(sheet, 3) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["sheet.png"]


def test_a_picture_that_is_not_there_leaves_its_cell_white(tmp_path: Path):
    made, sheet = columns(tmp_path, 2), tmp_path / "sheet.png"
    (made[1][1] / "picture.png").unlink()
    write_contact_sheet(sheet, made, [("row", "picture.png")])
    assert shown(sheet, 2) == [0, 255]


@pytest.mark.parametrize(("size", "cell"), [((64, 64), 64), ((32, 32), 96), ((1024, 768), 320)])
def test_small_pictures_are_enlarged_by_whole_factors_and_large_ones_reduced(
    tmp_path: Path, size: tuple[int, int], cell: int
):
    Image.new("RGB", size).save(tmp_path / "picture.png")
    sheet = tmp_path / "sheet.png"
    write_contact_sheet(sheet, [("column", tmp_path)], [("row", "picture.png")])
    with Image.open(sheet) as picture:
        assert picture.size == (cell + 2 * GAP, LABEL + GAP + cell + LABEL + GAP)
