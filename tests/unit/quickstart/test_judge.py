import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from simpletuner.quickstart.drawing import render
from simpletuner.quickstart.judge import accuracy, read, score
from simpletuner.quickstart.scenes import Background, Scene, Thing, make_prompt
from simpletuner.quickstart.vocabulary import COLORS, SHAPES, SIZES, TEXTURES
from tests.unit.quickstart.damage import MILD, blurred, noise_only

_SCENES = [make_prompt(2024, index, split) for split in ("train", "unseen") for index in range(150)]
_STAR = Thing("small", "red", "star", 20, 32, SIZES["small"])
_RING = Thing("large", "blue", "ring", 66, 30, SIZES["large"])
_SCENE = Scene(96, 64, Background("yellow", "striped"), (_STAR, _RING))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [render(scene) for scene in _SCENES]


@pytest.mark.parametrize("damage", MILD)
def test_scenes_are_read_rightly_also_through_damage(pictures: list[Image.Image], damage: str):
    measured = accuracy([MILD[damage](picture) for picture in pictures], _SCENES)
    assert measured.num_pictures == 300
    assert measured.all_right >= (0.99 if damage == "none" else 0.95), measured


def test_noise_is_at_chance(pictures: list[Image.Image]):
    """Guessing alone is right in 1 of 8 backgrounds; a plain texture in 2 of 5. Three deviations of 300 are allowed."""
    measured = accuracy([noise_only(picture, seed) for seed, picture in enumerate(pictures)], _SCENES)
    assert measured.all_right == 0
    for name, chance in _guessing().items():
        assert measured.attributes[name] <= chance + 3 * (chance * (1 - chance) / 300) ** 0.5, (name, measured)


def test_heavily_blurred_pictures_show_no_objects(pictures: list[Image.Image]):
    """The background's colour survives, and so does a gradient; patterns, shapes and sizes do not."""
    soft = [blurred(picture, 10) for picture in pictures]
    measured = accuracy(soft, _SCENES)
    assert measured.all_right <= 0.01
    assert measured.attributes["size"] <= 1 / 3 + 3 * (2 / 9 / 300) ** 0.5
    assert measured.attributes["shape"] <= 1 / 7 + 3 * (6 / 49 / 300) ** 0.5
    patterned = [index for index, scene in enumerate(_SCENES) if scene.background.texture in ("striped", "checked")]
    assert sum(score(soft[index], _SCENES[index])["texture"] for index in patterned) <= 0.05 * len(patterned)


def _guessing() -> dict[str, float]:
    """Returns how often the most frequent answer is right."""
    texture = max(np.mean([scene.background.texture == name for scene in _SCENES]) for name in TEXTURES)
    number = max(np.mean([len(scene.things) == count for scene in _SCENES]) for count in (1, 2))
    return {
        "background": 1 / len(COLORS),
        "texture": float(texture),
        "number": float(number),
        "size": 1 / len(SIZES),
        "color": 1 / len(COLORS),
        "shape": 1 / len(SHAPES),
        "position": 1 / 9,
        "relation": 1 / 4,
    }


def test_everything_is_named():
    reading = read(render(_SCENE))
    assert (reading.background, reading.texture) == ("yellow", "striped")
    found = {(thing.size, thing.color, thing.shape, round(thing.x), round(thing.y)) for thing in reading.things}
    assert found == {("small", "red", "star", 20, 32), ("large", "blue", "ring", 66, 30)}


_MOVED = replace(_STAR, x=48, y=32)


@pytest.mark.parametrize(
    ("wrong", "scene"),
    [
        ({"size"}, replace(_SCENE, things=(replace(_STAR, size="medium"), _RING))),
        ({"color"}, replace(_SCENE, things=(replace(_STAR, color="green"), _RING))),
        ({"shape"}, replace(_SCENE, things=(replace(_STAR, shape="heart"), _RING))),
        ({"relation"}, replace(_SCENE, things=(replace(_STAR, x=66), replace(_RING, x=20)))),
        ({"background"}, replace(_SCENE, background=Background("white", "striped"))),
        ({"texture"}, replace(_SCENE, background=Background("yellow", "checked"))),
        ({"number", "position"}, replace(_SCENE, things=(_MOVED,))),
        (set[str](), replace(_SCENE, things=(_RING, _STAR))),
    ],
)
def test_only_what_differs_is_wrong(wrong: set[str], scene: Scene):
    assert {name for name, right in score(render(_SCENE), scene).items() if not right} == wrong


def test_an_object_that_is_missing_is_wrong_in_all_it_has():
    one = score(render(replace(_SCENE, things=(_STAR,))), _SCENE)
    assert {name for name, right in one.items() if right} == {"background", "texture"}
    none = score(Image.new("RGB", (96, 64), COLORS["yellow"]), _SCENE)
    assert {name for name, right in none.items() if right} == {"background"}


def test_a_smear_is_no_shape():
    smear = Scene(64, 64, Background("white", "plain"), (Thing("large", "red", "circle", 32, 32, SIZES["large"]),))
    stretched = render(smear).resize((160, 64)).crop((48, 0, 112, 64))
    (thing,) = read(stretched).things
    assert (thing.color, thing.shape, thing.size) == ("red", None, None)


def test_two_hundred_pictures_take_less_than_two_seconds_of_one_core(pictures: list[Image.Image]):
    read(pictures[0])
    start = time.process_time()
    for picture in pictures[:200]:
        read(picture)
    assert time.process_time() - start < 2  # 0.6 on an idle core; a shared one is slower
