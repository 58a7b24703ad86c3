from pathlib import Path
from typing import Any

import pytest

from simpletuner.backends._base import open_backend
from simpletuner.backends._parquet_rows import ParquetRows
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.manifest import scan
from tests.unit.backends.shards import by_id, image_bytes, scanned
from tests.unit.data.support import dataset

datasets = pytest.importorskip("datasets")


def rows() -> Any:
    images = [{"bytes": image_bytes((16 + number, 16), number), "path": None} for number in range(4)]
    images[3] = {"bytes": b"<html>", "path": None}
    captions = ["a cat\na pet", "", "a dog", "a fox"]
    made = datasets.Dataset.from_dict({"image": images, "text": captions, "texts": [["one", None, "two"]] * 4})
    return made.cast_column("image", datasets.Image(decode=False))


def of(root: Path, name: str, **options: Any) -> DatasetConfig:
    own = {"dataset_name": name, "caption_column": "text", **options}
    return dataset(root, type="huggingface", instance_data_dir=root, options=own)


@pytest.fixture(params=["folder of parquet", "parquet", "arrow", "saved", "saved with splits"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Writes the rows in one of the ways that people have them; returns where."""
    made, kind = rows(), request.param
    if kind == "folder of parquet":
        (tmp_path / "set" / "data").mkdir(parents=True)
        made.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
        made.select([2]).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
        return "set"
    if kind == "parquet":
        made.to_parquet(tmp_path / "set.parquet")
        return "set.parquet"
    if kind == "saved with splits":
        made = datasets.DatasetDict({"train": made, "test": made.select([2])})
    made.save_to_disk(tmp_path / "set")
    return "set/data-00000-of-00001.arrow" if kind == "arrow" else "set"


def test_rows_are_images_with_captions(tmp_path: Path, name: str):
    manifest = scanned(of(tmp_path, name))
    assert by_id(manifest) == {"train/00000000": ["a cat", "a pet"], "train/00000002": ["a dog"]}
    assert manifest.rows["width"].to_pylist() == [16, 18]
    assert manifest.problems == {
        "not an image that can be read": ("train/00000003",),
        "without caption": ("train/00000001",),
    }
    with open_backend(of(tmp_path, name)).open("train/00000002") as file:
        assert file.read() == image_bytes((18, 16), 2)
    assert scanned(of(tmp_path, name)).files["mtime_ns"].to_pylist() == manifest.files["mtime_ns"].to_pylist()
    assert scan(of(tmp_path, name), 5.0, write=False).ids == [*manifest.ids[:1], "train/00000001", *manifest.ids[1:]]


@pytest.mark.parametrize("name", ["folder of parquet", "parquet"], indirect=True)
def test_streamed_rows_are_the_same_and_nothing_is_kept_of_them(tmp_path: Path, name: str):
    streamed = scanned(of(tmp_path, name, streaming=True))
    assert all(path.name.startswith("manifest-") for path in tmp_path.rglob("*.arrow"))
    again = scanned(of(tmp_path, name, streaming=True))
    assert again.files["mtime_ns"].to_pylist() == streamed.files["mtime_ns"].to_pylist()
    kept = scanned(of(tmp_path, name))
    assert by_id(streamed) == by_id(kept)
    assert streamed.rows["width"].to_pylist() == kept.rows["width"].to_pylist()
    assert streamed.problems == kept.problems


def test_a_stream_reads_groups_of_rows_when_they_are_asked_for(tmp_path: Path):
    rows().to_parquet(tmp_path / "a.parquet", batch_size=1)
    rows().select([2, 0]).to_parquet(tmp_path / "b.parquet", batch_size=2)
    made = ParquetRows([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")], "")
    assert len(made) == 6
    texts = made.select_columns(["text"])
    assert [texts[row] for row in (5, 0, 4)] == [{"text": "a cat\na pet"}, {"text": "a cat\na pet"}, {"text": "a dog"}]
    (tmp_path / "a.parquet").write_bytes(b"")
    assert texts[5] == {"text": "a cat\na pet"}  # held
    with pytest.raises(OSError, match="corrupt|Parquet"):
        texts[3]


def test_a_stream_that_cannot_be_is_one_line(tmp_path: Path):
    (tmp_path / "set").mkdir()
    rows().to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=r"split: there is no 'test' \(there are train\)"):
        scan(of(tmp_path, "set", streaming=True, split="test"))
    (tmp_path / "set.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"streaming reads parquet files, and these are none; set streaming to false"):
        scan(of(tmp_path, "set.jsonl", streaming=True))


def test_captions_of_several_columns_and_of_columns_in_columns(tmp_path: Path):
    made = rows().add_column("told", [{"long": "a long text"}, {"long": None}, {"long": ""}, {"long": "x"}])
    made.to_parquet(tmp_path / "set.parquet")
    options = {"caption_column": ["text", "told.long"], "fallback_caption_column": "texts"}
    assert by_id(scanned(of(tmp_path, "set.parquet", **options))) == {
        "train/00000000": ["a cat", "a pet", "a long text"],
        "train/00000001": ["one", "two"],
        "train/00000002": ["a dog"],
    }


def test_images_are_bytes_or_paths_too(tmp_path: Path):
    (tmp_path / "there.png").write_bytes(image_bytes((16, 16), 0))
    columns = {"image": [image_bytes((16, 16), 1)], "text": ["a"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "bytes.parquet")
    datasets.Dataset.from_dict({"image": [str(tmp_path / "there.png")], "text": ["a"]}).to_parquet(
        tmp_path / "p.parquet"
    )
    for name, content in (("bytes.parquet", image_bytes((16, 16), 1)), ("p.parquet", image_bytes((16, 16), 0))):
        with open_backend(of(tmp_path, name, streaming=True)).open("train/00000000") as file:
            assert file.read() == content


def test_a_look_ahead_unpacks_nothing(tmp_path: Path):
    rows().to_parquet(tmp_path / "set.parquet")
    manifest = scan(of(tmp_path, "set.parquet"), 5.0, write=False)
    assert (manifest.ids, manifest.complete) == ([], False)
    assert [path.name for path in tmp_path.iterdir()] == ["set.parquet"]


def test_lists_of_captions_and_one_prompt_for_all(tmp_path: Path):
    rows().save_to_disk(tmp_path / "set")
    assert by_id(scanned(of(tmp_path, "set", caption_column="texts")))["train/00000001"] == ["one", "two"]
    settings = of(tmp_path, "set", caption_column="none")
    settings = settings.model_copy(update={"caption_strategy": "instanceprompt", "instance_prompt": "a thing"})
    assert set(map(tuple, scanned(settings).captions)) == {("a thing",)}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"image_column": "imag"}, "image_column: there is no column 'imag' - did you mean 'image'?"),
        ({"caption_column": "txt"}, "caption_column: there is no column 'txt' - did you mean 'text'?"),
        ({"dataset_name": "./nowhere"}, "dataset_name: './nowhere' cannot be read: "),
        ({"streamed": True}, "streamed: unknown key - did you mean 'streaming'?"),
    ],
)
def test_a_dataset_that_will_not_do_is_one_line(tmp_path: Path, options: dict[str, Any], line: str):
    rows().save_to_disk(tmp_path / "set")
    with pytest.raises(UserError) as caught:
        scan(of(tmp_path, "set", **options))
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"dataset 'pictures': {line}")
