import json
from typing import Any

import pytest

from simpletuner.config.captioning import filtered
from tests.unit.config.conftest import IMAGES, Run


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["arafed"], "a photo of a cat in a hat, a cat"),
        (["arafed a photo of "], "a cat in a hat, a cat"),
        (["^a"], "rafed a photo of a cat in a hat, a cat"),
        (["a .* in ", "arafed"], "a hat, a cat"),
        (["s/cat/dog/"], "arafed a photo of a dog in a hat, a cat"),
        (["s/cat/dog/g"], "arafed a photo of a dog in a hat, a dog"),
        (["s/CAT/dog/ig"], "arafed a photo of a dog in a hat, a dog"),
        ([r"s/a (\w+), a (\w+)/a \2, a \1/"], "arafed a photo of a cat in a cat, a hat"),
        ([r"s/photo of/his\/her/"], "arafed a his/her a cat in a hat, a cat"),
        (["CAT"], "arafed a photo of a cat in a hat, a cat"),
        ([".*"], ""),
    ],
)
def test_what_a_filter_does(lines: list[str], expected: str) -> None:
    assert filtered("arafed a photo of a cat in a hat, a cat", lines) == expected


def test_what_no_filter_matches_stays_to_the_letter() -> None:
    assert filtered("two  gaps\t, kept", ["absent"]) == "two  gaps\t, kept"


@pytest.mark.parametrize("on_the_cache", [False, True])
def test_a_list_is_a_list_or_a_file_on_a_dataset_or_on_the_text_cache(run: Run, on_the_cache: bool) -> None:
    (run.folder / "filters.txt").write_bytes("\ufeff# blip\r\narafed \r\n\r\ns/ a / an /g\r\n".encode())
    (run.folder / "filters.json").write_text(json.dumps(["arafed", "s/ a / an /g"]))
    for written in ("filters.txt", "filters.json", ["arafed", "# a comment", "s/ a / an /g"]):
        own = {"caption_filter_list": written}
        text = {"id": "text", "dataset_type": "text_embeds", "cache_dir": "t", **(own if on_the_cache else {})}
        (dataset,) = run.load({}, [IMAGES if on_the_cache else IMAGES | own, text]).datasets
        assert dataset.caption_filter_list == ("arafed", "s/ a / an /g")
    entries = [IMAGES | {"caption_filter_list": ["own"]}, text | {"caption_filter_list": ["shared"]}]
    assert run.load({}, entries).datasets[0].caption_filter_list == ("own",)


def test_what_a_text_cache_says_of_its_captions_holds_for_datasets_that_do_not_say_it(run: Run) -> None:
    text = {"id": "text", "dataset_type": "text_embeds", "text_cache_disable": True}
    more = {"id": "more", "instance_data_dir": "images", "text_cache_disable": False}
    assert [d.text_cache_disable for d in run.load({}, [IMAGES, more, text]).datasets] == [True, False]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"caption_filter_list": "f.txt"},
            "caption_filter_list: 'f.txt', line 2: '(' is no regular expression: missing",
        ),
        (
            {"caption_filter_list": ["s/a/b"]},
            "caption_filter_list: item 1: 's/a/b' is not of the form s/regex/rep",
        ),
        ({"caption_filter_list": [r"s/(a)/\2/"]}, "is no regular expression: invalid group reference 2"),
        ({"caption_filter_list": [r"s/a/\g<b>/"]}, "is no regular expression: unknown group name 'b'"),
        ({"caption_filter_list": "none.txt"}, "caption_filter_list: there is no file 'none.txt' (looked at: "),
        ({"caption_filter_list": ["a", 3]}, "caption_filter_list: an item of the list is no text"),
        ({"caption_filter_list": {"a": 1}}, 'caption_filter_list: {"a": 1} is no list of texts, and no path of a file'),
        ({"caption_filter_list": "latin.txt"}, "caption_filter_list: 'LATIN' is not a text file in UTF-8 (byte 3)"),
        ({"caption_shuffle": {"count": 0}}, "caption_shuffle.count: 0 is too small; at least 1"),
        ({"caption_shuffle": {"cont": 2}}, "caption_shuffle.cont: unknown key - did you mean 'count'?"),
        ({"caption_shuffle": {"split_on": "coma"}}, 'caption_shuffle.split_on: unknown value "coma" - did you mean'),
        ({"caption_shuffle": 3}, 'caption_shuffle: 3 is no object, such as {"count": 3'),
        (
            {"caption_strategy": "csv"},
            "caption_strategy: 'csv' goes with a dataset of that type, and this one is",
        ),
    ],
)
def test_mistakes_are_one_line(run: Run, keys: dict[str, Any], line: str) -> None:
    (run.folder / "f.txt").write_text("arafed\n(\n")
    (run.folder / "latin.txt").write_bytes(b"caf\xe9")
    (told,) = run.problems({}, [IMAGES | keys])
    assert told.startswith("multidatabackend.json: dataset 'images': ")
    assert line.replace("LATIN", str(run.folder / "latin.txt")) in told


def test_shuffling_is_an_object_or_a_switch(run: Run) -> None:
    for written, count in (({"count": 3, "enable": True}, 3), (True, 1), ({}, 1)):
        shuffle = run.load({}, [IMAGES | {"caption_shuffle": written}]).datasets[0].caption_shuffle
        assert shuffle is not None
        assert (shuffle.enable, shuffle.count) == (True, count)
    assert run.load({}, [IMAGES | {"caption_shuffle": False}]).datasets[0].caption_shuffle is None


def test_what_would_change_captions_that_are_not_used_is_told(run: Run) -> None:
    own = {"caption_strategy": "instanceprompt", "instance_prompt": "x", "caption_suffix": "y", "caption_shuffle": True}
    assert run.load({}, [IMAGES | own]).notices == (
        "multidatabackend.json: dataset 'images': caption_shuffle, caption_suffix: has no effect: the captions are "
        "instance_prompt",
    )
