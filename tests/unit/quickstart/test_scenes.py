import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from simpletuner.config.errors import UserError
from simpletuner.quickstart.scenes import PICTURE_SIZES, Scene, Thing, draw, make_scene, render
from simpletuner.quickstart.vocabulary import COLORS, SHAPES, SIZES, WORDS


def test_pictures_are_a_function_of_the_seed(tmp_path: Path):
    one, two, other = (draw(tmp_path / name, 20, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 41  # pictures, captions, and the mark of what was drawn
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert any((one / name).read_bytes() != (other / name).read_bytes() for name in names)
    longer = draw(tmp_path / "d", 25, 0)
    assert (longer / "019.png").read_bytes() == (one / "019.png").read_bytes()


def test_a_finished_folder_is_not_drawn_again(tmp_path: Path):
    folder = draw(tmp_path / "pictures", 3)
    (folder / "000.png").unlink()
    draw(folder, 3)
    assert not (folder / "000.png").exists()
    with pytest.raises(UserError, match="holds other files"):
        draw(folder, 4)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds other files"):
        draw(tmp_path / "own", 3)
    (tmp_path / "empty").mkdir()
    assert (draw(tmp_path / "empty", 1) / "000.txt").is_file()


def test_the_set_is_varied():
    scenes = [make_scene(0, index) for index in range(300)]
    assert len({scene.caption for scene in scenes}) > 290
    assert len({scene.width / scene.height for scene in scenes}) == len(PICTURE_SIZES) >= 5
    assert all(64 <= side <= 104 for scene in scenes for side in (scene.width, scene.height))
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == {scene.background for scene in scenes} == set(COLORS)
    assert {thing.size for thing in things} == set(SIZES)
    assert 80 <= sum(len(scene.things) == 2 for scene in scenes) <= 120


def test_captions_are_made_of_the_vocabulary():
    for index in range(300):
        assert set(re.findall(r"\w+", make_scene(0, index).caption)) <= set(WORDS)


def test_a_picture_shows_what_its_caption_says():
    """The object has its colour, lies in its third of the picture, and is wholly inside."""
    for index in range(120):
        scene = make_scene(3, index)
        picture = render(scene)
        assert picture.size == (scene.width, scene.height)
        assert scene.things[0].color != scene.background
        for thing in scene.things:
            mask = _where(picture, COLORS[thing.color])
            left, top, right, bottom = mask.getbbox() or pytest.fail(scene.caption)
            expected = SIZES[thing.size] * min(picture.size)
            assert 0.6 * expected - 2 <= max(right - left, bottom - top) <= expected + 2, scene.caption
            middle = (left + right) / 2 / scene.width, (top + bottom) / 2 / scene.height
            for at, word, words in zip(
                middle,
                (thing.column, thing.row),
                (("left", "center", "right"), ("top", "middle", "bottom")),
                strict=True,
            ):
                assert {words[0]: at < 0.5, words[1]: 0.4 < at < 0.6, words[2]: at > 0.5}[word], scene.caption


def test_a_ring_has_a_hole_and_a_circle_has_none():
    def center(shape: str) -> tuple[int, ...]:
        thing = Thing("large", "red", shape, "middle", "center")
        return render(Scene(80, 80, "white", (thing,))).getpixel((40, 40))

    assert center("circle") == COLORS["red"]
    assert center("ring") == COLORS["white"]


def _where(picture: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Returns where a picture is within 12 of a colour."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, color))
    bands = [band.point([255] * 13 + [0] * 243) for band in difference.split()]
    return ImageChops.darker(ImageChops.darker(bands[0], bands[1]), bands[2])
