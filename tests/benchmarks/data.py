"""What the data code costs against a bare loop that does the same work, both measured in one run.

    python -m tests.benchmarks.data [--only scan start rows draw memory vae read] [--files 100000] [--rows 10000000]

Each sub-benchmark runs in a process of its own and prints one line of JSON: the two measurements and their ratio.
Files are made in a temporary folder (--folder says where), so they come from the page cache.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from diffusers.models import AutoencoderKL
from PIL import Image

from simpletuner.config.backends import DatasetConfig
from simpletuner.config.metadata import ImageTable
from simpletuner.data import manifest as manifests
from simpletuner.data.buckets import assign
from simpletuner.data.cache import Reader, Store, key_array
from simpletuner.data.captions import read_captions
from simpletuner.data.dataset import CachedDataset, stacked
from simpletuner.data.encode import cut_image, give_back_memory, posterior
from simpletuner.data.identity import Encoding, Ranks, identify, keyed_buckets, text_key
from simpletuner.data.manifest import Manifest, scan
from simpletuner.data.precompute import precompute, prepare
from simpletuner.data.sampler import SampledDataset, Sampler
from tests.unit.data.support import CountingFamily, add_image, dataset, picture, text_cache

_NUM_WORKERS = 16  # as many as a scan has


def seconds(work: Callable[[], object]) -> float:
    """Returns how long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident_bytes() -> int:
    """Returns the memory that is this process's own: pages of mapped files can be dropped at any time."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def make_files(root: Path, count: int) -> Path:
    """Writes ``count`` small JPEGs with captions, 1,000 to a folder; returns their folder."""
    contents: list[bytes] = []
    for number in range(64):
        file = io.BytesIO()
        picture(64 + 8 * (number % 8), 64 + 8 * (number // 8), number).save(file, "jpeg")
        contents.append(file.getvalue())
    for number in range(count):
        folder = root / "images" / f"{number // 1000:04d}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number:07d}.jpg").write_bytes(contents[number % 64])
        (folder / f"{number:07d}.txt").write_text(f"picture number {number}")
    return root / "images"


def bench_scan(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """The first scan of a folder against a loop that reads the headers of a known list of files."""
    images = make_files(root, options.files)
    paths = [str(path) for path in images.rglob("*.jpg")]

    def header(path: str) -> tuple[int, int]:
        with open(path, "rb") as file, Image.open(file) as image:
            return image.size

    def bare() -> None:
        with ThreadPoolExecutor(_NUM_WORKERS) as pool:
            assert sum(1 for _ in pool.map(header, paths)) == options.files

    configs = [dataset(root, cache_dir_vae=root / f"{turn}") for turn in range(options.rounds)]
    pairs = [(seconds(partial(scan, config)), seconds(bare)) for config in configs]
    ours, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "ours_files_per_second": options.files / ours,
        "bare_files_per_second": options.files / plain,
        "ours_over_bare": statistics.median(b / o for o, b in pairs),
    }


def bench_start(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """A start with nothing changed: listing, captions and buckets, against a loop that lists and stats the files."""
    images = make_files(root, options.files)

    def start() -> None:
        (manifest,) = prepare([dataset(root)])
        assert sum(len(bucket) for bucket in assign(manifest)) == options.files

    def bare() -> None:
        for folder, _, names in os.walk(images):
            for name in names:
                os.stat(f"{folder}/{name}")

    first = seconds(start)
    pairs = [(seconds(start), seconds(lambda: scan(dataset(root))), seconds(bare)) for _ in range(options.rounds)]
    ours, scanned, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "first_seconds": first,
        "ours_seconds": ours,
        "of_it_scan_seconds": scanned,
        "bare_seconds": plain,
        "ours_over_bare": ours / plain,
    }


def make_rows(path: Path, count: int) -> None:
    """Writes a synthetic table of ``count`` images with captions."""
    numbers = np.arange(count)
    names = pa.array(numbers).cast(pa.string())
    table = pa.table(
        {
            "file": pc.binary_join_element_wise("pictures/", names, ".jpg", ""),
            "text": pc.binary_join_element_wise("picture number ", names, ""),
            "w": pa.array((512 + numbers * 37 % 1024).astype(np.int32)),
            "h": pa.array((512 + numbers * 91 % 1024).astype(np.int32)),
        }
    )
    pq.write_table(table, path)


def bench_table(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """A start of many rows from a table: the first, and one with nothing changed."""
    make_rows(root / "table.parquet", options.rows)
    (root / "images").mkdir()
    columns = {"filename_column": "file", "width_column": "w", "height_column": "h", "caption_column": ("text",)}
    table = ImageTable(path=root / "table.parquet", **columns)  # type: ignore[arg-type]
    config = dataset(root, metadata_backend="parquet", caption_strategy="parquet", parquet=table, resolution=512)

    def start() -> None:
        (manifest,) = prepare([config])
        assert sum(len(bucket) for bucket in assign(manifest)) == options.rows

    first = seconds(start)
    return {"first_seconds": first, "ours_seconds": statistics.median(seconds(start) for _ in range(options.rounds))}


def bench_draw(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """One batch draw at many rows, against one at 1,000; the first draw of an epoch counts too."""

    def draw_ms(rows: int) -> tuple[float, float]:
        sampler = Sampler([SampledDataset("d", (rows // 2, rows // 3, rows // 6), 4)], 0)
        position = sampler.start()
        first = time.perf_counter()
        _, position = sampler.next(position)
        first = time.perf_counter() - first
        times: list[float] = []
        for _ in range(2000):
            started = time.perf_counter()
            _, position = sampler.next(position)
            times.append(time.perf_counter() - started)
        return first * 1e3, statistics.median(times) * 1e3

    draw_ms(1000)
    (_, few), (first, many) = draw_ms(1000), draw_ms(options.rows)
    before = resident_bytes()
    sampler = Sampler([SampledDataset("d", (options.rows,), 4)], 0)
    sampler.next(sampler.start())
    held = resident_bytes() - before
    return {"ours_ms": many, "first_ms": first, "at_1000_rows_ms": few, "ratio": many / few, "held_bytes": held}


def encoding() -> Encoding:
    """Returns an encoding that costs nothing."""
    return Encoding(CountingFamily(), None)  # type: ignore[arg-type]


def cached(root: Path, count: int) -> tuple[Manifest, Any]:
    """Returns a manifest of ``count`` images that do not exist, all of them cached, and its text cache."""
    names = [f"folder {n // 1000}/a picture of number {n}.jpg" for n in range(count)]
    rng = np.random.default_rng(0)
    sizes = rng.integers(512, 1536, (2, count)).astype(np.int32)
    digests = [f"{n:032x}" for n in range(count)]
    zeros = np.zeros(count, np.int64)
    nothing = pa.nulls(count, pa.string())
    columns = [pa.array(c) for c in (names, zeros, zeros, sizes[0], sizes[1], [""] * count, digests, zeros, nothing)]
    files = pa.table(columns, schema=manifests._SCHEMA)
    config = dataset(root, skip_file_discovery=True, caption_strategy="filename", resolution=512)
    manifests.write_manifest(config, files)
    del files, columns, names, digests
    (root / "images").mkdir()
    manifest = read_captions(scan(config))
    store, texts = encoding().latent_store(config), encoding().text_store(text_cache(root))
    for bucket in keyed_buckets(manifest):
        for start in range(0, len(bucket.keys), 4096):
            keys = [key.decode() for key in bucket.keys[start : start + 4096].tolist()]
            store.write(keys, {"mean": torch.zeros(len(keys), 1)}, keys, {})
    captions = [text_key(c) for own in manifest.captions for c in own]
    for start in range(0, count, 4096):
        keys = captions[start : start + 4096]
        texts.write(keys, {"tokens": torch.zeros(len(keys), 1)}, keys, {})
    return config, text_cache(root)


def bench_memory(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """What a start with full caches leaves resident for each image once the data set is ready to be trained on."""
    count = min(options.rows, 1_000_000)
    code = f"from tests.benchmarks import data; from pathlib import Path; data.cached(Path({str(root)!r}), {count})"
    subprocess.run([sys.executable, "-c", code], check=True)
    config = dataset(root, skip_file_discovery=True, caption_strategy="filename", resolution=512)
    family = CountingFamily()
    warm = root / "warm"  # what is loaded once, however many images there are
    warm.mkdir()
    add_image(warm / "images", "a.png", (64, 64))
    kept = [made(warm, dataset(warm), family)]
    give_back_memory()
    before = resident_bytes()
    samples, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            samples.append(resident_bytes())

    watch = threading.Thread(target=sample)
    watch.start()
    started = time.perf_counter()
    kept.append(made(root, config, family))
    took = time.perf_counter() - started
    done.set()
    watch.join()
    give_back_memory()
    after = resident_bytes()
    assert sum(kept[1].sampler.datasets[0].bucket_sizes) == count
    return {
        "images": count,
        "start_seconds": took,
        "bytes_per_image": (after - before) / count,
        "peak_bytes_per_image": (max(samples) - before) / count,
    }


def made(root: Path, config: DatasetConfig, family: CountingFamily) -> CachedDataset:
    """Returns a dataset made the way a run makes it: that is all of it that the run keeps."""
    encode = Encoding(family, None)  # type: ignore[arg-type]
    return CachedDataset(precompute(prepare([config]), text_cache(root), encode), family.uncond, 0)


def light_vae() -> AutoencoderKL:
    """Returns a VAE of SDXL's layout at a quarter of its width, a sixteenth of the arithmetic.

    So decoding and resizing weigh more beside it than beside SDXL's own on the same processor.
    """
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
    ).eval()


class VaeFamily(CountingFamily):
    """A family with a real VAE."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode_image(self, encoders: str, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std


def encode_all(batches: list[torch.Tensor], encode: Encoding) -> None:
    """Encodes batches of pixels, and drops what comes out."""
    for batch in batches:
        posterior(batch, encode, None)


def bench_vae(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Caching latents of pictures of 1200x900 at 256 px against encoding the same tensors, already cut."""
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(options.pictures):
        noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC).save(
            root / "images" / f"{number:03d}.jpg", quality=90
        )
    family = VaeFamily(light_vae())
    encode = Encoding(family, None)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"resolution": 256, "resolution_type": "pixel_area", "alignment": 64}
    settings |= {"vae_batch_size": 4, "write_batch_size": 128, "caption_strategy": "filename"}
    pairs: list[tuple[float, float]] = []
    for turn in range(options.rounds):
        config = dataset(root, **settings, cache_dir_vae=root / f"cache {turn}")
        (manifest,) = prepare([config])
        manifest = identify(manifest, Ranks())
        ours = seconds(partial(precompute, [manifest], text_cache(root), encode))
        rows = zip(manifest.ids, manifest.rows["width"].to_pylist(), manifest.rows["height"].to_pylist(), strict=True)
        pixels: list[torch.Tensor] = []
        for path, width, height in rows:
            with (root / "images" / path).open("rb") as file:
                pixels.append(cut_image(config, path, (width, height), file, False))
        batches = [torch.stack(pixels[start : start + 4]) for start in range(0, len(pixels), 4)]
        plain = seconds(partial(encode_all, batches, encode))
        pairs.append((ours, plain))
    ours, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "ours_pictures_per_second": options.pictures / ours,
        "bare_pictures_per_second": options.pictures / plain,
        "ours_over_bare": statistics.median(b / o for o, b in pairs),
    }


def bench_read(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Reading cached samples of SDXL's size against copying the same bytes out of a mapped file."""
    count = 256
    latents, texts = Store(root, "latents", "0" * 32), Store(root, "text", "0" * 32)
    for start in range(0, count, 64):
        keys = [str(number) for number in range(start, start + 64)]
        moments = torch.randn(64, 4, 128, 128)
        latents.write(keys, {"mean": moments, "std": moments.abs()}, keys, {})
        features = {"tokens": torch.randn(64, 77, 2048).bfloat16(), "pooled": torch.randn(64, 1280).bfloat16()}
        texts.write(keys, features, keys, {})
    places = np.random.default_rng(0).permutation(count).tolist()
    mean, tokens, pooled = 4 * 128 * 128 * 4, 77 * 2048 * 2, 1280 * 2
    flat = root / "flat"
    with flat.open("wb") as file:
        for _ in range(count):
            file.write(os.urandom(2 * mean + tokens + pooled))
    size = 2 * mean + tokens + pooled

    def ours(readers: tuple[Reader, Reader], rows: tuple[dict[str, int], ...]) -> None:
        for start in range(0, count, 4):
            keys = [str(number) for number in places[start : start + 4]]
            for reader, own in zip(readers, rows, strict=True):
                stacked([reader.row(own[key]) for key in keys])

    def bare(data: np.ndarray) -> None:
        for start in range(0, count, 4):
            rows = places[start : start + 4]
            for begin, end in ((0, mean), (mean, 2 * mean), (2 * mean, 2 * mean + tokens), (2 * mean + tokens, size)):
                torch.from_numpy(np.stack([data[row, begin:end] for row in rows]))

    indices = latents.index(), texts.index()
    readers = Reader(indices[0]), Reader(indices[1])
    names = [str(number) for number in range(count)]
    rows = tuple(dict(zip(names, index.places(key_array(names)).tolist(), strict=True)) for index in indices)
    data = np.memmap(flat, np.uint8, "r").reshape(count, size)
    ours(readers, rows)
    bare(data)
    pairs = [(seconds(lambda: ours(readers, rows)), seconds(lambda: bare(data))) for _ in range(4 * options.rounds)]
    mine, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "ours_ms_per_sample": mine / count * 1e3,
        "bare_ms_per_sample": plain / count * 1e3,
        "ours_over_bare": statistics.median(b / o for o, b in pairs),
    }


BENCHMARKS = {
    name.removeprefix("bench_"): function for name, function in globals().items() if name.startswith("bench_")
}


def lines(options: argparse.Namespace) -> Iterator[str]:
    """Yields the result of each chosen benchmark."""
    if len(options.only) == 1:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = BENCHMARKS[options.only[0]](Path(folder), options)
        yield json.dumps({"what": options.only[0], **{key: float(f"{value:.4g}") for key, value in found.items()}})
        return
    for name in options.only:
        command = [sys.executable, "-m", "tests.benchmarks.data", *sys.argv[1:], "--only", name]
        yield subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Runs what was chosen, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), default=tuple(BENCHMARKS))
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the files")
    for line in lines(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
