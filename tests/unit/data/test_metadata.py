from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from simpletuner.backends.local import Local
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.config.metadata import ImageTable
from simpletuner.data.captions import read_captions
from simpletuner.data.identity import Encoding, Ranks, identify
from simpletuner.data.manifest import scan
from simpletuner.data.metadata import NO_FILE, NO_SIZE, TWICE
from simpletuner.data.precompute import precompute, prepare
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache

ROWS: dict[str, list[Any]] = {
    "file": ["b/wide.png", "a.png", "c.png", "a.png", None, "d.png", "e.txt"],
    "w": [96, 32, 40, 32, 1, None, 32],
    "h": [64, 40, 40, 40, 1, 40, 32],
    "text": ["a wide one", "one\ntwo", None, "again", "", "", ""],
    "tags": [["x", "y"], [], ["tag"], None, None, None, None],
    "more": ["", "three", None, "", "", "", ""],
}
NAMES = {"filename_column": "file", "width_column": "w", "height_column": "h", "caption_column": ("text", "more")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, size in (("a.png", (32, 40)), ("b/wide.png", (96, 64)), ("c.png", (40, 40))):
        add_image(tmp_path / "images", name, size, caption=f"beside {name}")
    write(tmp_path / "table.parquet", ROWS)
    return tmp_path


def write(path: Path, rows: dict[str, list[Any]]) -> None:
    pyarrow.parquet.write_table(pa.table(rows), path)


def tabled(root: Path, name: str = "table.parquet", **values: Any) -> DatasetConfig:
    own = {key: values.pop(key) for key in list(values) if key in ImageTable.model_fields}
    table = ImageTable(path=root / name, **{**NAMES, "fallback_caption_column": "tags", **own})
    return dataset(root, **{"metadata_backend": "parquet", "caption_strategy": "parquet", "parquet": table, **values})


def no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was looked at")

    for method in ("list_images", "open", "caption"):
        monkeypatch.setattr(Local, method, refuse)


def test_rows_are_images_without_a_look_at_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_look(monkeypatch)
    manifest = read_captions(scan(tabled(root)))
    assert manifest.ids == ["a.png", "b/wide.png", "c.png"]
    assert manifest.rows.select(["width", "height"]).to_pydict() == {"width": [32, 96, 40], "height": [40, 64, 40]}
    assert manifest.captions == [["one", "two", "three"], ["a wide one"], ["tag"]]
    assert manifest.problems == {TWICE: ("a.png",), NO_SIZE: ("d.png",), NO_FILE: ("e.txt",)}


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_other_formats_say_the_same(root: Path, ending: str) -> None:
    rows = {name: column[:3] for name, column in ROWS.items() if name != "tags"}
    if ending == "csv":
        pyarrow.csv.write_csv(pa.table(rows), root / "table.csv")
    else:
        lines = pa.table(rows).to_pandas().to_json(orient="records", lines=True)
        (root / "table.jsonl").write_text(lines)
    manifest = read_captions(scan(tabled(root, f"table.{ending}", fallback_caption_column=None)))
    assert manifest.ids == ["a.png", "b/wide.png"]
    assert manifest.captions == [["one", "two", "three"], ["a wide one"]]


def test_captions_may_stay_beside_the_images(root: Path) -> None:
    manifest = read_captions(scan(tabled(root, caption_strategy="textfile")))
    assert manifest.captions == [["beside a.png"], ["beside b/wide.png"], ["beside c.png"]]


def test_names_without_ending_get_that_of_the_file(root: Path) -> None:
    write(root / "table.parquet", ROWS | {"file": ["b/wide", "a", "c", "x", None, "d", "e.v2"]})
    manifest = read_captions(scan(tabled(root)))
    assert manifest.ids == ["a.png", "b/wide.png", "c.png"]
    assert manifest.problems == {NO_FILE: ("d", "e.v2", "x")}
    with pytest.raises(UserError, match="every image is left out: 6 there is no image of that name"):
        scan(tabled(root, identifier_includes_extension=True))


def test_an_unchanged_table_is_not_read_again_and_a_changed_one_keeps_digests(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = prepare([tabled(root)])
    digests = identify(first, Ranks()).rows["digest"].to_pylist()
    assert all(digests)
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.read_table", lambda *_, **__: pytest.fail("it was read again"))
        assert scan(tabled(root)).rows["digest"].to_pylist() == digests
    write(root / "table.parquet", ROWS | {"w": [96, 33, 40, 32, 1, 40, 32], "text": ["new", *ROWS["text"][1:]]})
    again = read_captions(scan(tabled(root)))
    assert again.ids == ["a.png", "b/wide.png", "c.png", "d.png"][:3]
    assert again.captions[1] == ["new"]
    assert [bool(content) for content in again.rows["digest"].to_pylist()] == [False, True, True]


def test_a_size_that_is_not_the_image_s_is_named_when_it_is_encoded(root: Path) -> None:
    write(root / "table.parquet", ROWS | {"w": [96, 33, 40, 33, 1, 40, 32]})
    manifests = prepare([tabled(root, missing_caption="keep")])
    cache = precompute(manifests, text_cache(root), Encoding(CountingFamily(), None))  # type: ignore[arg-type]
    assert list(cache.latents[0].bad.values()) == ["it is of another size than its header or a table says"]


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({"width_column": "width"}, "width_column: there is no column 'width'"),
        ({"filename_column": "fil"}, "filename_column: there is no column 'fil' - did you mean 'file'?"),
        ({"caption_column": ("text", "texts")}, "caption_column: there is no column 'texts' - did you mean 'text'?"),
        ({"fallback_caption_column": "no"}, "fallback_caption_column: there is no column 'no'"),
    ],
)
def test_columns_that_are_not_there_are_one_line(root: Path, own: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        scan(tabled(root, **own))
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"dataset 'pictures': parquet.{line}")


def test_a_damaged_table_is_one_line(root: Path) -> None:
    (root / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"^dataset 'pictures': parquet.path: '.*table.parquet' cannot be read: "):
        scan(tabled(root))
