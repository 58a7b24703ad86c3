"""Caches that are kept in a bucket too, on a real S3 server of this machine: moto's."""

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.batch import Batch
from simpletuner.config.backends import RemoteFolder
from simpletuner.config.errors import UserError
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.identity import Encoding
from simpletuner.data.precompute import outstanding, precompute, prepare
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

NUM_IMAGES = 10
SHARDS = 3 + 4  # of at most four: ten images; the empty caption by itself, and ten captions


@pytest.fixture
def bucket(endpoint: str) -> Any:
    files = s3fs.S3FileSystem(key="k", secret="s", endpoint_url=endpoint, use_listings_cache=False)
    if files.exists("caches"):
        files.rm("caches", recursive=True)
    files.mkdir("caches")
    return files


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(NUM_IMAGES):
        add_image(tmp_path / "images", f"{number}.png", (64, 64), number)
    return tmp_path / "images"


class Machine:
    """A machine with a disk of its own."""

    def __init__(self, root: Path, images: Path, endpoint: str, **options: Any) -> None:
        own = {"aws_bucket_name": "caches", "aws_data_prefix": "run", "aws_endpoint_url": endpoint, "aws_attempts": 1}
        own |= {"aws_access_key_id": "k", "aws_secret_access_key": "s", **options}
        latents, texts = (RemoteFolder(id=name, type="aws", folder=name, options=own) for name in ("vae", "text"))
        self.root, self.family = root, CountingFamily()
        self.dataset = dataset(root, instance_data_dir=images, latents_remote=latents)
        self.text_cache = text_cache(root, remote=texts)

    def run(self) -> list[Batch]:
        """Fills the caches, and returns two epochs."""
        cache = precompute(prepare([self.dataset]), self.text_cache, Encoding(self.family, None))
        data = CachedDataset(cache, self.family.uncond, 0)
        return [batch for batch, _ in islice(data.batches(), NUM_IMAGES)]

    def shards(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.root / "cache").rglob("*.safetensors")}


def in_bucket(files: Any) -> dict[str, bytes]:
    return {name.rpartition("/")[2]: files.cat_file(name) for name in files.find("caches")}


def same(one: list[Batch], two: list[Batch]) -> bool:
    return all(torch.equal(a.mean, b.mean) and torch.equal(a.cond["pooled"], b.cond["pooled"])
               for a, b in zip(one, two, strict=True))  # fmt: skip


def test_a_new_machine_finds_what_another_has_encoded(tmp_path: Path, images: Path, endpoint: str, bucket: Any):
    first = Machine(tmp_path / "1", images, endpoint)
    batches = first.run()
    assert first.shards() == in_bucket(bucket)
    assert len(in_bucket(bucket)) == SHARDS
    folders = {name.split("/")[2] for name in bucket.find("caches/run")}
    assert folders == {"vae", "text"}
    second = Machine(tmp_path / "2", images, endpoint)
    assert same(second.run(), batches)
    assert second.family.loaded == []
    assert second.shards() == first.shards()
    (lacks, *_) = outstanding(prepare([second.dataset]), second.text_cache, Encoding(second.family, None), 12)
    assert lacks.missing == 0


@pytest.mark.parametrize("fails_at", [0, 1, 3, SHARDS - 1])
def test_what_a_stopped_run_has_encoded_is_kept_and_sent_by_the_next(
    tmp_path: Path, images: Path, endpoint: str, bucket: Any, monkeypatch: pytest.MonkeyPatch, fails_at: int
):
    from botocore.exceptions import EndpointConnectionError

    whole = Machine(tmp_path / "whole", images, endpoint, aws_data_prefix="other")
    batches, sent = whole.run(), []
    original = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *args: Any, **keys: Any) -> Any:
        if method == "put_object" and len(sent) == fails_at:
            raise EndpointConnectionError(endpoint_url=endpoint)
        sent.extend([method] * (method == "put_object"))
        return await original(self, method, *args, **keys)

    machine = Machine(tmp_path / "1", images, endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", call)
        with pytest.raises(UserError) as caught:
            machine.run()
    (line,) = caught.value.lines
    assert line.startswith(f"dataset '{'vae' if fails_at < 3 else 'text'}': aws_bucket_name: 'caches': '")
    assert "cannot be written: Could not connect to the endpoint" in line
    assert len(machine.shards()) == fails_at + 1
    assert same(machine.run(), batches)
    assert len(machine.family.images) == NUM_IMAGES  # none of them twice
    assert machine.shards() == whole.shards()
    assert {name.rpartition("/")[2] for name in bucket.find("caches/run")} == set(machine.shards())


def test_two_machines_at_once_do_no_harm(tmp_path: Path, images: Path, endpoint: str, bucket: Any):
    machines = [Machine(tmp_path / str(number), images, endpoint) for number in range(2)]
    found: dict[int, list[Batch]] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: machines[n].run()})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(found[0], found[1])
    assert machines[0].shards() == machines[1].shards() == in_bucket(bucket)


def test_damage_on_either_side_is_mended_from_the_other(tmp_path: Path, images: Path, endpoint: str, bucket: Any):
    machine = Machine(tmp_path / "1", images, endpoint)
    machine.run()
    whole = in_bucket(bucket)
    here, there = sorted((machine.root / "cache").rglob("*.safetensors"))[:2]
    here.write_bytes(here.read_bytes()[:-7])
    (name,) = [name for name in bucket.find("caches") if name.endswith(there.name)]
    bucket.pipe_file(name, b"cut")
    bucket.pipe_file(name.replace(there.name, "notes.txt"), b"of the user")
    again = Machine(tmp_path / "1", images, endpoint)
    again.run()
    assert again.family.loaded == []
    assert in_bucket(bucket) == whole | {"notes.txt": b"of the user"}
    assert machine.shards() == whole
    # On both sides at once it is encoded again, to the same bytes.
    bucket.pipe_file(name, b"cut")
    there.unlink()
    again.run()
    assert in_bucket(bucket) == whole | {"notes.txt": b"of the user"}


def test_other_models_have_other_folders(tmp_path: Path, images: Path, endpoint: str, bucket: Any):
    first, other = (Machine(tmp_path / name, images, endpoint) for name in "12")
    other.family.names["vae"] = "another"
    first.run()
    other.run()
    assert len(other.family.images) == NUM_IMAGES
    assert "text" not in other.family.loaded
    assert len({name.split("/")[3] for name in bucket.find("caches/run")}) == 3


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"aws_bucket_name": "nowhere"}, "aws_bucket_name: 'nowhere' cannot be listed: An error occurred (NoSuchBuck"),
        (
            {"aws_endpoint_url": "http://127.0.0.1:9"},
            "aws_bucket_name: 'caches' cannot be listed: Could not connect",
        ),
        ({"aws_bucket": "x"}, "aws_bucket: unknown key - did you mean 'aws_bucket_name'?"),
        ({"aws_secret_access_key": None}, "aws_access_key_id, aws_secret_access_key: give both or none"),
    ],
)
def test_a_bucket_that_will_not_do_is_one_line_before_anything_is_encoded(
    tmp_path: Path, images: Path, endpoint: str, bucket: Any, options: dict[str, Any], line: str
):
    machine = Machine(tmp_path / "1", images, endpoint, **options)
    with pytest.raises(UserError) as caught:
        machine.run()
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"dataset 'vae': {line}")
    assert machine.family.loaded == []
    assert not machine.shards()


def test_keys_are_written_into_no_result(tmp_path: Path, images: Path):
    machine = Machine(tmp_path / "1", images, "http://here")
    for written in (machine.dataset.model_dump_json(), machine.text_cache.model_dump_json()):
        assert '"aws_bucket_name":"caches"' in written
        assert "access_key" not in written
