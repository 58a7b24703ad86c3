from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.dataset_view import Look, dataset_lines
from tests.unit.data.support import add_image, dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    for number in range(5):
        add_image(images, f"{number}.png", (64, 64), number, caption="one two three\nfour")
    add_image(images, "wide.png", (160, 64), 5)
    add_image(images, "no caption.png", (64, 64), 6, caption=None)
    (images / "empty.png").write_bytes(b"")
    broken = images / "4.png"
    broken.write_bytes(broken.read_bytes()[:-300])
    return tmp_path


def lines(root: Path, look: Look, **values: Any) -> list[str]:
    return list(dataset_lines([dataset(root, **values)], look))


def test_what_the_trainer_sees_is_said(root: Path):
    assert lines(root, Look(decode_all=True)) == [
        "dataset     pictures: 6 images in 2 buckets, 4 batches of 2 an epoch",
        "       64x64         5  ########################################",
        "      160x64         1  ########",
        "            1 of them smaller than a batch: trained as a short batch, nothing is dropped",
        "captions    11 of 1 to 3 words",
        "            0.png: one two three (and 1 more)",
        "            1.png: one two three (and 1 more)",
        "            3.png: one two three (and 1 more)",
        "            wide.png: caption of wide.png",
        "problems    1 left out: empty file: empty.png",
        "            1 left out: without caption: no caption.png",
        "            1 left out: truncated or corrupt: 4.png",
        f"sheets      2 in {root / 'cache' / 'vae' / 'sheets'}",
    ]


def test_only_the_images_of_the_sheets_are_decoded_unless_all_are_wanted(root: Path):
    assert not any("truncated" in line for line in lines(root, Look(images_per_sheet=2)))
    assert lines(root, Look(images_per_sheet=0))[-1] == "sheets      none"
    assert not (root / "cache" / "vae" / "sheets" / "none").exists()


def test_a_sheet_shows_the_crop_in_each_image(root: Path, tmp_path: Path):
    out = tmp_path / "out"
    lines(root, Look(images_per_sheet=2, output=out), crop=True, crop_style="corner", maximum_aspect_ratio=3.0)
    assert [path.name for path in (out / "pictures").iterdir()] == ["64x64.png"]
    lines(root, Look(output=out), crop=True, crop_style="corner")
    sheet = Image.open(out / "pictures" / "64x64.png").convert("RGB")
    # The wide image is the last of the five good ones: first in the second row of four. It is scaled to 240 x 96 in a
    # cell of 240, and the left 96 pixels of it are trained on.
    cell = sheet.crop((8, 32 + 280, 8 + 240, 32 + 280 + 240))
    rows, columns = np.nonzero((np.asarray(cell) == (255, 0, 0)).all(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (72, 72 + 95, 0, 95)
    bright, dark = cell.crop((4, 78, 90, 160)), cell.crop((110, 78, 236, 160))
    assert max(high for _, high in dark.getextrema()) <= 90 < max(high for _, high in bright.getextrema())
