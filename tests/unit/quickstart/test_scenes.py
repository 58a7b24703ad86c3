import re
from collections import Counter
from dataclasses import replace
from itertools import combinations as pairs_of
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from simpletuner.data.geometry import target_size
from simpletuner.quickstart.drawing import render
from simpletuner.quickstart.palette import is_clear, tones
from simpletuner.quickstart.scenes import (
    PICTURE_SIZES,
    Background,
    Scene,
    Split,
    Thing,
    combinations,
    make_prompt,
    make_scene,
    place,
    relation,
)
from simpletuner.quickstart.vocabulary import COLORS, RELATIONS, SHAPES, SIZES, TEXTURES, WORDS
from tests.unit.data.support import dataset

_SPLITS: tuple[Split, ...] = ("train", "unseen")
_SCENES = [make_scene(0, index) for index in range(600)]
_ALL = [*_SCENES, *(make_prompt(1, index, split) for split in _SPLITS for index in range(200))]


def test_scenes_and_prompts_are_functions_of_seed_index_and_split():
    assert make_scene(3, 7) == make_scene(3, 7)
    makers = [make_scene, make_prompt]
    made = [make(seed, 7, split) for make in makers for seed in (3, 4) for split in _SPLITS]
    assert len({scene.caption for scene in made}) == len(made)


def test_the_set_is_varied():
    assert len({scene.caption for scene in _SCENES}) > 570
    assert Counter((scene.width, scene.height) for scene in _SCENES) == dict.fromkeys(PICTURE_SIZES, 120)
    things = [thing for scene in _SCENES for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == {scene.background.color for scene in _SCENES} == set(COLORS)
    assert {thing.size for thing in things} == set(SIZES)
    pairs = [scene for scene in _SCENES if len(scene.things) == 2]
    assert 170 <= len(pairs) <= 230
    assert min(Counter(scene.relation for scene in pairs)[name] for name in RELATIONS) >= 30
    textures = Counter(scene.background.texture for scene in _SCENES)
    assert 200 <= textures["plain"] <= 280
    assert min(textures[name] for name in TEXTURES) >= 90
    places = Counter(
        place(scene.things[0].x / scene.width, scene.things[0].y / scene.height)
        for scene in _SCENES
        if len(scene.things) == 1
    )
    assert len(places) == 9
    assert min(places.values()) >= 25


@pytest.mark.parametrize("alignment", [8, 16])
def test_sizes_are_five_buckets_and_are_not_cut(tmp_path: Path, alignment: int):
    settings = dataset(tmp_path, resolution=64, resolution_type="pixel", alignment=alignment)
    assert len(set(PICTURE_SIZES)) == len({width / height for width, height in PICTURE_SIZES}) == 5
    assert [target_size(settings, *size) for size in PICTURE_SIZES] == list(PICTURE_SIZES)
    assert all(64 <= edge <= 96 and edge % 8 == 0 for size in PICTURE_SIZES for edge in size)


def test_one_combination_in_seven_is_never_drawn_for_training():
    train, unseen = combinations("train"), combinations("unseen")
    assert not set(train) & set(unseen)
    assert len(train) + len(unseen) == len(COLORS) * len(SHAPES)
    assert 0.12 < len(unseen) / (len(train) + len(unseen)) < 0.18
    assert {color for color, _ in unseen} == set(COLORS)
    assert {shape for _, shape in unseen} == set(SHAPES)
    for split, kinds in zip(_SPLITS, (train, unseen), strict=True):
        scenes = [make(5, index, split) for make in (make_scene, make_prompt) for index in range(500)]
        assert {(thing.color, thing.shape) for scene in scenes for thing in scene.things} == set(kinds)


def test_captions_say_all_in_words_of_the_vocabulary():
    one = Scene(64, 64, Background("orange", "plain"), (Thing("small", "red", "star", 20, 20, 21),))
    assert one.caption == "a small red star at the top left on an orange background"
    middle = Scene(64, 64, Background("blue", "graded"), (Thing("large", "white", "heart", 32, 31, 36),))
    assert middle.caption == "a large white heart at the center on a graded blue background"
    two = (Thing("small", "red", "star", 20, 32, 21), Thing("large", "blue", "ring", 66, 40, 36))
    beside = Scene(96, 64, Background("yellow", "striped"), two)
    assert beside.caption == "a small red star left of a large blue ring on a striped yellow background"
    for scene in _ALL:
        assert set(re.findall(r"\w+", scene.caption)) <= set(WORDS)


def test_places_and_relations_are_never_in_doubt():
    assert [relation(dx, dy) for dx, dy in ((-9, 3), (9, 3), (3, -9), (3, 9))] == list(RELATIONS)
    for scene in _ALL:
        if len(scene.things) == 1:
            (thing,) = scene.things
            words = {
                place((thing.x + dx) / scene.width, (thing.y + dy) / scene.height)
                for dx in (-1.5, 1.5)
                for dy in (-1.5, 1.5)
            }
            assert len(words) == 1, scene.caption
        else:
            dx, dy = (getattr(scene.things[0], axis) - getattr(scene.things[1], axis) for axis in "xy")
            assert max(abs(dx), abs(dy)) > 2 * min(abs(dx), abs(dy)), scene.caption


def test_objects_have_their_colours_lie_apart_and_inside():
    for scene in _ALL:
        boxes = [_box(scene, thing) for thing in scene.things]
        for thing, (left, top, right, bottom) in zip(scene.things, boxes, strict=True):
            assert is_clear(thing.color, scene.background.color), scene.caption
            assert left >= 1
            assert top >= 1
            assert right <= scene.width - 1
            assert bottom <= scene.height - 1
            assert abs((left + right) / 2 - thing.x) <= 1.5
            assert abs((top + bottom) / 2 - thing.y) <= 1.5
        for one, two in pairs_of(boxes, 2):
            assert max(two[0] - one[2], one[0] - two[2], two[1] - one[3], one[1] - two[3]) >= 4, scene.caption


def _box(scene: Scene, thing: Thing) -> tuple[int, int, int, int]:
    """Returns the box of the pixels that a thing changes, most of which have its colour in the whole picture."""
    without, alone = (render(replace(scene, things=things)) for things in ((), (thing,)))
    assert alone.size == (scene.width, scene.height)
    difference = ImageChops.difference(without, alone)
    inside = np.asarray(difference).max(-1) > 20
    assert np.mean(np.asarray(render(scene))[inside] == COLORS[thing.color]) > 0.6, scene.caption
    return Image.fromarray(inside.astype(np.uint8) * 255).getbbox() or pytest.fail(scene.caption)


def test_a_ring_has_a_hole_and_a_circle_has_none():
    def center(shape: str) -> tuple[int, ...]:
        thing = Thing("large", "red", shape, 32, 32, SIZES["large"])
        return render(Scene(64, 64, Background("white", "plain"), (thing,))).getpixel((32, 32))

    assert center("circle") == COLORS["red"]
    assert center("ring") == COLORS["white"]


@pytest.mark.parametrize("direction", range(4))
def test_backgrounds_go_from_tone_to_tone(direction: int):
    def picture(texture: str) -> np.ndarray:
        return np.asarray(render(Scene(64, 64, Background("red", texture, direction), ())), np.int64)

    along = 1 - direction % 2
    start, end = (np.array(tone) for tone in (tones("red") if direction < 2 else tones("red")[::-1]))
    graded = picture("graded")
    assert np.abs(np.take(graded, 0, along) - start).max() <= 1
    assert np.abs(np.take(graded, -1, along) - end).max() <= 1
    striped = np.moveaxis(picture("striped"), along, 0)
    checked = picture("checked")
    for at in range(64):
        assert (striped[at] == (start, end)[at // 8 % 2]).all()
        assert (checked[at, 8] == (start, end)[(at // 8 + 1) % 2]).all()
    assert (picture("plain") == COLORS["red"]).all()
