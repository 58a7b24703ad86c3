"""Wherever the pictures are, the same ones in the same order train the same weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import Project
from tests.unit.backends.shards import served


@contextmanager
def listed(pictures: Path, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Gives the entry of a CSV file of urls, which a server of this machine answers."""
    with served(pictures) as server:
        rows = [f'{server.url}/{path.name},"{path.with_suffix(".txt").read_text()}"' for path in pictures.glob("*.png")]
        (folder / "list.csv").write_text("\n".join(["url,caption", *rows]))
        yield [{"type": "csv", "csv_file": str(folder / "list.csv"), "caption_strategy": "csv"}]


@contextmanager
def in_rows(pictures: Path, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Gives the entry of a parquet file."""
    datasets = pytest.importorskip("datasets")
    paths = sorted(pictures.glob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    captions = [path.with_suffix(".txt").read_text() for path in paths]
    datasets.Dataset.from_dict({"image": images, "caption": captions}).to_parquet(folder / "rows.parquet")
    yield [{"type": "huggingface", "dataset_name": str(folder / "rows.parquet"), "metadata_backend": "discovery"}]


@contextmanager
def in_a_bucket(pictures: Path, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Gives the entries of a bucket, and of caches in it, on a server of this machine; keys from the environment."""
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        files = s3fs.S3FileSystem(key="a-key", secret="a-secret", endpoint_url=endpoint)
        files.mkdir("bucket")
        files.put([str(path) for path in pictures.iterdir()], "bucket/set/")
        own = {
            "type": "aws",
            "aws_bucket_name": "bucket",
            "aws_endpoint_url": endpoint,
            "aws_access_key_id": "{env:TEST_KEY}",
            "aws_secret_access_key": "{env:TEST_SECRET}",
        }
        text = own | {"id": "text", "dataset_type": "text_embeds", "cache_dir": "text"}
        latents = own | {"id": "latents", "dataset_type": "image_embeds", "default": True, "cache_dir": "vae"}
        yield [own | {"aws_data_prefix": "set"}, text, latents]
        kept = {path.split("/")[1] for path in files.find("bucket") if path.endswith(".safetensors")}
        assert kept == {"text", "vae"}
    finally:
        server.stop()


@pytest.mark.parametrize("place", [listed, in_rows, in_a_bucket])
def test_a_run_trains_the_weights_of_the_folder(
    project: Project, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
):
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TEST_KEY", "a-key")
    monkeypatch.setenv("TEST_SECRET", "a-secret")
    project.train()
    other = project.at(tmp_path / "other")
    with place(pictures, tmp_path) as (entry, *caches):
        other.datasets = [{"id": "pictures", "cache_dir_vae": str(tmp_path / "cache"), **entry}, *caches]
        other.train()
    mine, its = (load_file(one.output / "pytorch_lora_weights.safetensors") for one in (project, other))
    assert all(torch.equal(values, its[key]) for key, values in mine.items())
    assert project.rows() == other.rows()
    written = "".join(path.read_text() for path in other.output.rglob("*.json"))
    assert "a-secret" not in written
