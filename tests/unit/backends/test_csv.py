from pathlib import Path
from typing import Any

import pytest

from simpletuner.backends._base import NotFetched, open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.manifest import scan
from tests.unit.backends.shards import Server, by_id, image_bytes, scanned
from tests.unit.data.support import dataset


@pytest.fixture
def server(server: Server) -> Server:
    for number in range(4):
        (server.folder / f"{number}.png").write_bytes(image_bytes(seed=number))
    return server


def listed(root: Path, *rows: str, header: str = "url,caption", **options: Any) -> DatasetConfig:
    """Returns a dataset of a CSV file with these rows."""
    (root / "list.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf8")
    return dataset(root, type="csv", instance_data_dir=root, options={"csv_file": "list.csv", **options})


def test_images_are_fetched_once_and_have_their_captions(tmp_path: Path, server: Server):
    rows = [
        f"{server.url}/0.png,a cat",
        f'{server.url}/1.png?sig=1,"a ""dog"", and\na bone"',
        f"{server.url}/0.png,a pet",
    ]
    settings, host = listed(tmp_path, *rows), server.url.removeprefix("http://")
    expected = {f"{host}/0.png": ["a cat", "a pet"], f"{host}/1.png": ['a "dog", and', "a bone"]}
    assert by_id(scanned(settings)) == expected
    assert sorted(server.requests) == ["/0.png", "/1.png?sig=1"]
    with open_backend(settings).open(f"{host}/1.png") as file:
        assert file.read() == image_bytes(seed=1)
    assert by_id(scanned(settings)) == expected
    assert len(server.requests) == 2
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_several_resolutions_of_an_entry_download_once(tmp_path: Path, server: Server):
    settings = listed(tmp_path, f"{server.url}/0.png,a", f"{server.url}/1.png,b")
    for size in ("256", "512"):
        own = {"cache_dir_vae": tmp_path / "cache" / size, "files_dir": tmp_path / "cache"}
        assert len(scanned(settings.model_copy(update=own)).ids) == 2
    assert sorted(server.requests) == ["/0.png", "/1.png"]


def test_columns_may_have_other_names_and_files_may_be_here(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "a.jpg"):
        (tmp_path / "pictures" / name).write_bytes(image_bytes(seed=len(name)))
    rows = ["x,pictures/a.png,one", f"y,{tmp_path}/pictures/a.jpg,two", "z,./pictures/a.png,three"]
    names = {"csv_url_column": "file", "csv_caption_column": "text"}
    found = by_id(scanned(listed(tmp_path, *rows, header="id,file,text", **names)))
    assert found == {"pictures/a.png": ["one", "three"], "pictures/a.jpg": ["two"]}


def test_what_is_wrong_with_a_row_costs_its_image_only(tmp_path: Path, server: Server):
    touched = tmp_path / "touched"
    (server.folder / "page.png").write_text("<html>")
    (server.folder / "large.png").write_bytes(bytes(3000))
    rows = ["0.png,good", "1.png,", "gone.png,x", "page.png,x", "large.png,x"]
    others = [",no url", "file:///etc/passwd,x", f"pipe:touch {touched},x", "ftp://localhost/x.png,x"]
    settings = listed(tmp_path, *(f"{server.url}/{row}" for row in rows), *others, max_image_megabytes=0.002)
    manifest, host = scanned(settings), server.url.removeprefix("http://")
    assert manifest.ids == [f"{host}/0.png"]
    assert manifest.problems == {
        "row without url": ("list.csv, row 7",),
        "cannot be opened: HTTP Error 404: Not Found": (f"{host}/gone.png",),
        "cannot be opened: larger than 0.002 MB": (f"{host}/large.png",),
        "cannot be opened: No such file or directory": (
            "file:/etc/passwd",
            "ftp:/localhost/x.png",
            f"pipe:touch {touched}",
        ),
        "not an image that can be read": (f"{host}/page.png",),
        "without caption": (f"{host}/1.png",),
    }
    assert not touched.exists()
    assert server.requests.count("/large.png") == 1  # it would be as large the next time


def test_a_failing_server_is_asked_again_and_a_missing_image_by_the_next_scan(tmp_path: Path, server: Server):
    server.failures += [503, 0]
    settings = listed(tmp_path, f"{server.url}/0.png,x")
    assert len(scan(settings).ids) == 1
    assert len(server.requests) == 3
    settings = listed(tmp_path, f"{server.url}/0.png,x", f"{server.url}/new.png,y")
    assert len(scan(settings).ids) == 1
    (server.folder / "new.png").write_bytes(image_bytes(seed=9))
    assert len(scan(settings).ids) == 2


def test_downloads_stop_at_the_limit(tmp_path: Path, server: Server):
    rows = [f"{server.url}/{number}.png,x" for number in range(4)]
    size = len(image_bytes(seed=0))
    settings = listed(tmp_path, *rows, max_download_gigabytes=2.5 * size / 1e9)
    with pytest.raises(UserError, match=r"^images: '.*png' does not fit into the .* GB of max_download_gigabytes"):
        scan(settings)
    kept = list((tmp_path / "cache" / "vae" / "images").iterdir())
    assert 0 < sum(path.stat().st_size for path in kept) <= 2.5 * size
    assert all(path.suffix == ".image" for path in kept)
    assert len(scan(listed(tmp_path, *rows)).ids) == 4


def test_a_look_ahead_fetches_nothing(tmp_path: Path, server: Server):
    (tmp_path / "here.png").write_bytes(image_bytes())
    settings = listed(tmp_path, f"{server.url}/0.png,x", "here.png,y")
    manifest = scan(settings, 5.0, write=False)
    assert (manifest.ids, manifest.complete, server.requests) == (["here.png"], False, [])
    with pytest.raises(NotFetched):
        list(open_backend(settings).list_images(fetch=False))


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        (b"url,captoin\nx,y\n", {}, "csv_caption_column: 'list.csv' has no column 'caption' - did you mean 'captoin'?"),
        (b"url,caption\n", {"csv_file": "lst.csv"}, "csv_file: there is no file '"),
        (b"url,caption\nx,caf\xe9\n", {}, "csv_file: '"),
        (b"url,caption\nx,y,z\n", {}, "csv_file: '"),
        (b"", {}, "csv_file: '"),
        (b"url,caption\nx,y\n", {"csv_fil": 1}, "csv_fil: unknown key - did you mean 'csv_file'?"),
    ],
)
def test_a_file_that_will_not_do_is_one_line(tmp_path: Path, content: bytes, options: dict[str, Any], line: str):
    settings = listed(tmp_path, **options)
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_backend(settings)
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"dataset 'pictures': {line}")
