from pathlib import Path
from typing import Any

import pytest

from simpletuner.backends._base import open_backend
from simpletuner.config.errors import UserError
from simpletuner.data.captions import captions, read_captions
from simpletuner.data.manifest import scan
from tests.unit.data.support import add_image, dataset


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ["a cat", "on a mat"]),
        ({"disable_multiline_split": True}, ["a cat\n\n  on a mat"]),
        ({"prepend_instance_prompt": True, "instance_prompt": "photo of"}, ["photo of a cat", "photo of on a mat"]),
        ({"only_instance_prompt": True, "instance_prompt": "sks dog"}, ["sks dog"]),
        ({"caption_strategy": "filename"}, ["a red cat"]),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "sks dog"}, ["sks dog"]),
    ],
)
def test_strategies(tmp_path: Path, values: dict[str, Any], expected: list[str]):
    add_image(tmp_path / "images", "deep/a_red_cat.png", (8, 8), caption="a cat\r\n\r\n  on a mat \n")
    settings = dataset(tmp_path, **values)
    assert captions(settings, open_backend(settings), "deep/a_red_cat.png") == expected


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add_image(tmp_path / "images", "a.png", (8, 8), caption="a cat")
    add_image(tmp_path / "images", "b.png", (8, 8), caption=None)
    add_image(tmp_path / "images", "c.png", (8, 8), caption=" \n ")
    add_image(tmp_path / "images", "d.png", (8, 8), caption=None)
    (tmp_path / "images" / "d.txt").write_bytes(b"caf\xe9")
    return tmp_path


def test_images_without_caption_are_left_out_and_counted(root: Path):
    manifest = read_captions(scan(dataset(root)))
    assert (manifest.ids, manifest.captions) == (["a.png"], [["a cat"]])
    assert manifest.problems == {"without caption": ("b.png", "c.png"), "caption file is not UTF-8": ("d.png",)}


def test_images_without_caption_are_kept_when_asked_for(root: Path):
    manifest = read_captions(scan(dataset(root, missing_caption="keep")))
    assert manifest.ids == ["a.png", "b.png", "c.png"]
    assert manifest.captions == [["a cat"], [""], [""]]


def test_mistakes_are_one_line(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (8, 8), caption=None)
    with pytest.raises(UserError, match=r"^dataset 'pictures': every image is left out: 1 without caption"):
        read_captions(scan(dataset(tmp_path)))
    for values in ({"caption_strategy": "instanceprompt"}, {"prepend_instance_prompt": True}):
        with pytest.raises(UserError, match=r"^dataset 'pictures': instance_prompt is missing"):
            read_captions(scan(dataset(tmp_path, **values)))


def test_a_deadline_keeps_the_first_images(tmp_path: Path):
    for number in range(1500):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number:04}.txt").write_text("x")
    add_image(tmp_path / "images", "0000.png", (8, 8))
    data = (tmp_path / "images" / "0000.png").read_bytes()
    for number in range(1, 1500):
        (tmp_path / "images" / f"{number:04}.png").write_bytes(data)
    manifest = read_captions(scan(dataset(tmp_path)), deadline_seconds=0.0)
    assert (manifest.rows.num_rows, manifest.complete) == (1024, False)
    assert read_captions(scan(dataset(tmp_path))).rows.num_rows == 1500
