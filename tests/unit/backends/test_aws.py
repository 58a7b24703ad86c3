"""A bucket on a real S3 server of this machine: moto's."""

from pathlib import Path
from typing import Any

import pytest

from simpletuner.backends._base import open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.captions import NOT_UTF8
from simpletuner.data.manifest import scan
from tests.unit.backends.shards import by_id, image_bytes, scanned
from tests.unit.data.support import dataset

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture
def bucket(endpoint: str) -> Any:
    files = s3fs.S3FileSystem(key="k", secret="s", endpoint_url=endpoint, use_listings_cache=False)
    if files.exists("pictures"):
        files.rm("pictures", recursive=True)
    files.mkdir("pictures")
    for number, name in enumerate(("a/0.png", "a/deep/1 é.png", "b/2.png")):
        files.pipe_file(f"pictures/{name}", image_bytes((16 + number, 16), number))
        files.pipe_file(f"pictures/{name[:-4]}.txt", f"caption {number}".encode())
    files.pipe_file("pictures/a/.hidden/3.png", b"x")
    return files


def at(root: Path, endpoint: str, **options: Any) -> DatasetConfig:
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "aws_endpoint_url": endpoint}
    own = {"aws_bucket_name": "pictures", "aws_attempts": 1, **keys, **options}
    return dataset(root, type="aws", instance_data_dir=root, options={k: v for k, v in own.items() if v is not None})


@pytest.mark.parametrize("page", [1000, 2])
def test_images_and_captions_of_a_bucket_and_of_a_folder_in_it(
    tmp_path: Path, endpoint: str, bucket: Any, monkeypatch: pytest.MonkeyPatch, page: int
):
    monkeypatch.setattr("simpletuner.backends.aws._PAGE", page)
    everything = {"a/0.png": ["caption 0"], "a/deep/1 é.png": ["caption 1"], "b/2.png": ["caption 2"]}
    manifest = scanned(at(tmp_path, endpoint))
    assert by_id(manifest) == everything
    assert (manifest.rows["width"].to_pylist(), manifest.problems) == ([16, 17, 18], {})
    assert list(by_id(scanned(at(tmp_path, endpoint, aws_data_prefix="/a/")))) == ["0.png", "deep/1 é.png"]
    with open_backend(at(tmp_path, endpoint)).open("b/2.png") as file:
        assert file.read() == image_bytes((18, 16), 2)
    assert sorted(bucket.find("pictures"))[0] == "pictures/a/.hidden/3.png"


def test_only_what_changed_is_opened_again(tmp_path: Path, endpoint: str, bucket: Any, monkeypatch: pytest.MonkeyPatch):
    from simpletuner.backends.aws import Aws

    opened: list[str] = []
    original = Aws.open
    monkeypatch.setattr(Aws, "open", lambda self, path: (opened.append(path), original(self, path))[1])
    scan(at(tmp_path, endpoint))
    assert len(opened) == 3
    bucket.pipe_file("pictures/b/2.png", image_bytes((18, 16), 77))
    bucket.pipe_file("pictures/b/2.png", bucket.cat_file("pictures/b/2.png")[::-1])  # as large as before, and as old
    opened.clear()
    assert scan(at(tmp_path, endpoint)).problems == {"not an image that can be read": ("b/2.png",)}
    assert opened == ["b/2.png"]


def test_what_is_wrong_with_an_object_costs_its_image_only(tmp_path: Path, endpoint: str, bucket: Any):
    bucket.pipe_file("pictures/b/empty.png", b"")
    bucket.pipe_file("pictures/b/2.txt", b"caf\xe9")
    bucket.rm_file("pictures/a/0.txt")
    manifest = scanned(at(tmp_path, endpoint))
    assert manifest.ids == ["a/deep/1 é.png"]
    assert manifest.problems == {
        "empty file": ("b/empty.png",),
        "without caption": ("a/0.png",),
        NOT_UTF8: ("b/2.png",),
    }


def test_a_server_that_goes_away_costs_what_was_not_read(
    tmp_path: Path, endpoint: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
):
    from botocore.exceptions import EndpointConnectionError

    original = s3fs.core.S3File.read

    def read(self: Any, length: int = -1) -> bytes:
        if "/b/" in self.path:
            raise EndpointConnectionError(endpoint_url=self.path)
        return original(self, length)

    monkeypatch.setattr(s3fs.core.S3File, "read", read)
    manifest = scan(at(tmp_path, endpoint))
    assert manifest.problems == {"cannot be opened: EndpointConnectionError": ("b/2.png",)}
    monkeypatch.setattr(s3fs.core.S3File, "read", original)
    assert len(scan(at(tmp_path, endpoint)).ids) == 3


def test_of_a_header_the_first_part_alone_is_transferred(
    tmp_path: Path, endpoint: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
):
    bucket.rm([name for name in bucket.find("pictures") if name.endswith(".png")])
    bucket.pipe_file("pictures/large.png", image_bytes((700, 700), kind="BMP"))
    sizes: list[int] = []
    original = s3fs.core.S3File.read

    def read(self: Any, length: int = -1) -> bytes:
        data = original(self, length)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(s3fs.core.S3File, "read", read)
    assert len(scan(at(tmp_path, endpoint)).ids) == 1
    assert sizes == [1 << 16]
    sizes.clear()
    with open_backend(at(tmp_path, endpoint)).open("large.png") as file:
        assert len(file.read()) == sum(sizes) == 700 * 700 * 3 + 54
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"aws_bucket_name": "nowhere"},
            "aws_bucket_name: 'nowhere' cannot be listed: An error occurred (NoSuchBucket)",
        ),
        (
            {"aws_endpoint_url": "http://127.0.0.1:9"},
            "aws_bucket_name: 'pictures' cannot be listed: Could not connect to the endpoint URL: \"http://127",
        ),
        ({"aws_data_prefix": "c"}, "no image in its aws data (.jpg"),
        ({"aws_bucket_name": None}, "aws_bucket_name: required"),
        ({"aws_secret_access_key": None}, "aws_access_key_id, aws_secret_access_key: give both or none"),
        ({"aws_bucket": "x"}, "aws_bucket: unknown key - did you mean 'aws_bucket_name'?"),
    ],
)
def test_a_bucket_that_will_not_do_is_one_line(
    tmp_path: Path, endpoint: str, bucket: Any, options: dict[str, Any], line: str
):
    with pytest.raises(UserError) as caught:
        scan(at(tmp_path, endpoint, **options))
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"dataset 'pictures': {line}")
    assert "'s'" not in caught.value.lines[0]


def test_keys_are_written_into_no_result(tmp_path: Path, endpoint: str):
    written = at(tmp_path, endpoint).model_dump_json()
    assert '"aws_bucket_name":"pictures"' in written
    assert "access_key" not in written
