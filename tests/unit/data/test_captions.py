import os
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from simpletuner.backends.local import Local
from simpletuner.config.captioning import CaptionShuffle
from simpletuner.config.errors import UserError
from simpletuner.data.captions import NOT_UTF8, captions, read_captions, shuffled
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.identity import Encoding
from simpletuner.data.manifest import scan
from simpletuner.data.precompute import precompute, prepare
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ["a cat", "on a mat"]),
        ({"disable_multiline_split": True}, ["a cat\n\n  on a mat"]),
        ({"prepend_instance_prompt": True, "instance_prompt": "photo of"}, ["photo of a cat", "photo of on a mat"]),
        ({"only_instance_prompt": True, "instance_prompt": "sks dog"}, ["sks dog"]),
        ({"caption_strategy": "filename"}, ["a red cat"]),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "sks dog"}, ["sks dog"]),
        ({"caption_filter_list": ("on ", "s/cat/dog/")}, ["a dog", "a mat"]),
        ({"caption_filter_list": (".*",)}, []),
        ({"caption_suffix": "in oil"}, ["a cat in oil", "on a mat in oil"]),
        ({"caption_suffix": ", oil"}, ["a cat, oil", "on a mat, oil"]),
        (
            {"caption_filter_list": ("photo of ",), "prepend_instance_prompt": True, "instance_prompt": "photo of"},
            ["photo of a cat", "photo of on a mat"],
        ),
    ],
)
def test_strategies(tmp_path: Path, values: dict[str, Any], expected: list[str]):
    rows = pa.table({"path": ["deep/a_red_cat.png"], "caption": ["a cat\n\n  on a mat \n"]})
    assert captions(dataset(tmp_path, **values), rows).to_pylist() == [expected]


def test_lines_end_as_python_ends_them(tmp_path: Path):
    text = (
        "".join(f"line {ord(end[-1])}{end}" for end in ("\r\n", *"\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", "\t")) + "end"
    )
    rows = pa.table({"path": ["a.png"] * 3, "caption": [text, "", "one"]})
    expected = [[line.strip() for line in text.splitlines()], [], ["one"]]
    assert captions(dataset(tmp_path), rows).to_pylist() == expected


def test_texts_are_kept_and_only_changed_ones_are_read_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    original = Local.caption

    def counting(self: Local, path: str) -> str | None:
        read.append(path)
        return original(self, path)

    monkeypatch.setattr(Local, "caption", counting)
    first = read_captions(scan(dataset(root)), write=True)
    assert sorted(read) == ["a.png", "b.png", "c.png", "d.png"]
    read.clear()
    again = read_captions(scan(dataset(root)), write=True)
    assert (again.captions, again.problems) == (first.captions, first.problems)
    assert read == ["d.png"]  # what could not be read is tried again
    (root / "images" / "b.txt").write_text("a bird")
    (root / "images" / "a.txt").write_text("a dog")
    os.utime(root / "images" / "a.txt", (0, 0))  # ctime tells
    read.clear()
    assert read_captions(scan(dataset(root)), write=True).captions == [["a dog"], ["a bird"]]
    assert sorted(read) == ["a.png", "b.png", "d.png"]
    read.clear()
    (root / "images" / "a.txt").unlink()
    settings = dataset(root, caption_filter_list=("bird",), missing_caption="keep")
    assert read_captions(scan(settings)).captions == [[""], ["a"], [""]]
    assert sorted(read) == ["a.png", "d.png"]


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
    assert manifest.problems == {"without caption": ("b.png", "c.png"), NOT_UTF8: ("d.png",)}


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


TAGS = "dog, running, park , sunny day,, grass, ball, tree"


def test_shuffled_tags_are_the_tags_in_other_orders():
    variants = shuffled(TAGS, CaptionShuffle(count=4, position_start=1))
    assert variants[0] == TAGS
    assert len(variants) == 5
    for variant in variants[1:]:
        tags = variant.split(", ")
        assert tags[0] == "dog"
        assert sorted(tags[1:]) == ["ball", "grass", "park", "running", "sunny day", "tree"]
    assert shuffled(TAGS, CaptionShuffle(count=4, position_start=1)) == variants
    assert shuffled(TAGS, CaptionShuffle(count=2, position_start=1)) == variants[:3]  # more orders add captions only
    assert shuffled(TAGS, CaptionShuffle(count=4, position_start=1, seed=1))[1:] != variants[1:]
    assert shuffled(TAGS, CaptionShuffle(include_original=False, position_start=1)) == variants[1:2]


def test_every_order_comes_out_equally_often():
    texts = [f"a{number}, b, c" for number in range(600)]
    orders = [shuffled(text, CaptionShuffle(include_original=False))[0].replace(text[:-6], "a") for text in texts]
    counts = {order: orders.count(order) for order in set(orders)}
    assert len(counts) == 6
    assert max(abs(count - 100) for count in counts.values()) < 40  # 4.4 standard deviations


@pytest.mark.parametrize(
    ("caption", "values", "expected"),
    [
        ("a cat", {}, {"a cat"}),
        ("a, b", {"position_start": 1}, {"a, b"}),
        ("a, b", {"count": 9}, {"a, b", "b, a"}),
        ("a b", {"count": 9, "split_on": "space"}, {"a b", "b a"}),
        ("A dog. It runs.", {"count": 9, "split_on": "period"}, {"A dog. It runs.", "It runs. A dog."}),
        ("a cat", {"include_original": False}, {"a cat"}),
    ],
)
def test_captions_of_few_tags(caption: str, values: dict[str, Any], expected: set[str]):
    assert set(shuffled(caption, CaptionShuffle(**values))) == expected


def test_shuffles_are_captions_of_their_own_and_a_filter_costs_what_it_changes(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (64, 64), caption="a, b, c")
    add_image(tmp_path / "images", "b.png", (64, 64), caption="x, watermark, y")

    def encoded(**values: Any) -> tuple[list[str], set[tuple[float, ...]]]:
        """Returns what is encoded, and the features that are drawn in some epochs."""
        family = CountingFamily()
        made = prepare([dataset(tmp_path, train_batch_size=2, **values)])
        filled = precompute(made, text_cache(tmp_path), Encoding(family, None))
        data = CachedDataset(filled, family.uncond, 0)
        drawn = [tuple(row.tolist()) for batch, _ in islice(data.batches(), 40) for row in batch.cond["pooled"]]
        return [prompt for prompt in family.prompts if prompt], set(drawn)

    shuffle = CaptionShuffle(count=2)
    assert encoded() == (["a, b, c", "x, watermark, y"], encoded()[1])
    prompts, drawn = encoded(caption_shuffle=shuffle)
    assert {tuple(sorted(prompt.split(", "))) for prompt in prompts} == {("a", "b", "c"), ("watermark", "x", "y")}
    assert len(prompts) + 2 == len(drawn) == 6
    assert encoded(caption_shuffle=shuffle)[0] == []
    assert encoded(caption_filter_list=("watermark, ",))[0] == ["x, y"]


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
