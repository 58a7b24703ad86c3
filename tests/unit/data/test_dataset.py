import json
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.batch import Batch
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.identity import Encoding, Ranks
from simpletuner.data.precompute import precompute, prepare
from simpletuner.data.sampler import Position
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache

WIDE_CAPTIONS = ["one", "two", "three"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(5):
        add_image(tmp_path / "images", f"square_{number}.png", (64, 64), number)
    for number in range(3):
        add_image(tmp_path / "images", f"wide/{number}.jpg", (160, 80), 10 + number, caption="one\ntwo\n\n three ")
    return tmp_path


def build(root: Path, rank: int = 0, world: int = 1, dropout: float = 0.0, **values: Any) -> CachedDataset:
    family = CountingFamily()
    cache = precompute(prepare([dataset(root, **values)]), text_cache(root), Encoding(family, None))
    return CachedDataset(cache, family.uncond, seed=1, caption_dropout=dropout, ranks=Ranks(rank, world))


def take(data: CachedDataset, count: int, position: Position | None = None) -> list[tuple[Batch, Position]]:
    return list(islice(data.batches(position), count))


def features(caption: str) -> torch.Tensor:
    return CountingFamily().encode_prompt("", [caption])["pooled"][0]


def test_a_batch_holds_the_features_and_the_cut_of_its_images(root: Path):
    data = build(root)
    assert data.batches_per_epoch == {"pictures": 3 + 2}
    seen: list[str] = []
    for batch, _ in take(data, 5):
        assert batch.std is not None
        seen += batch.ids
        wide = batch.ids[0].startswith("wide")
        assert batch.mean.shape[1:] == ((3, 8, 16) if wide else (3, 8, 8))
        torch.testing.assert_close(batch.std, batch.mean.abs() + 1)
        expected = [80, 160, 0, 0, 64, 128] if wide else [64, 64, 0, 0, 64, 64]
        assert batch.geometry.tolist() == [expected] * len(batch.ids)
        assert batch.weight.tolist() == [1.0] * len(batch.ids)
        assert batch.global_weight == len(batch.ids)
        for name, pooled in zip(batch.ids, batch.cond["pooled"], strict=True):
            captions = WIDE_CAPTIONS if wide else [f"caption of {name}"]
            assert pooled.tolist() in [features(caption).tolist() for caption in captions]
    assert sorted(seen) == sorted([f"square_{n}.png" for n in range(5)] + [f"wide/{n}.jpg" for n in range(3)])


@pytest.mark.parametrize("style", ["random", "center", "corner"])
def test_the_geometry_is_what_was_really_cut(tmp_path: Path, style: str):
    for number, size in enumerate([(160, 80), (80, 160), (200, 64), (64, 200), (100, 100)]):
        add_image(tmp_path / "images", f"{number}.png", size, number)
    values = {"crop": True, "crop_aspect": "square", "crop_style": style, "vae_batch_size": 1}
    for batch, _ in take(build(tmp_path, **values), 3):
        for name, geometry, mean in zip(batch.ids, batch.geometry.int().tolist(), batch.mean, strict=True):
            image = Image.open(tmp_path / "images" / name)
            height, width, top, left, target_height, target_width = geometry
            assert (image.size, target_height, target_width) == ((width, height), 64, 64)
            scale = 64 / min(width, height)
            scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
            cut = np.asarray(scaled.crop((left, top, left + 64, top + 64)))
            pixels = torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 127.5 - 1
            assert torch.equal(mean, CountingFamily().encode_image("", pixels[None])[0][0])
    shown = {
        name: g.tolist()
        for b, _ in take(build(tmp_path, **values), 3)
        for name, g in zip(b.ids, b.geometry, strict=True)
    }
    assert (shown["0.png"][2] == 0, shown["1.png"][3] == 0) == (True, True)
    if style != "corner":
        assert min(shown["0.png"][3], shown["1.png"][2]) > 0


def test_positions_count_the_samples(root: Path):
    found = take(build(root), 12)
    positions = [int(p) for batch, _ in found for p in batch.position]
    assert positions == list(range(len(positions)))
    assert found[-1][1]["samples"] == len(positions)


def same(a: Batch, b: Batch, rows: slice = slice(None)) -> bool:
    return (
        a.ids[rows] == b.ids
        and torch.equal(a.mean[rows], b.mean)
        and torch.equal(a.position[rows], b.position)
        and torch.equal(a.dropped[rows], b.dropped)
        and all(torch.equal(a.cond[name][rows], b.cond[name]) for name in a.cond)
    )


def test_two_ranks_of_two_show_the_batches_of_one_rank_of_four(root: Path):
    one = take(build(root, dropout=0.4, train_batch_size=4), 9)
    ranks = [take(build(root, rank, 2, dropout=0.4, train_batch_size=2), 9) for rank in (0, 1)]
    for (whole, after), (first, a), (second, b) in zip(one, *ranks, strict=True):
        count = len(whole.ids)
        assert after == a == b
        assert whole.global_weight == first.global_weight == second.global_weight == count
        assert same(whole, first, slice(0, (count + 1) // 2))
        if count > 1:
            assert same(whole, second, slice((count + 1) // 2, None))
        assert float(first.weight.sum() + second.weight.sum()) == count


def test_a_rank_with_nothing_gets_one_filler_of_no_weight(root: Path):
    found = take(build(root, rank=1, world=2, train_batch_size=2), 3)
    fillers = [batch for batch, _ in found if batch.weight.tolist() == [0.0]]
    assert len(fillers) == 1  # five squares make a batch of 4 and one of 1
    assert (fillers[0].global_weight, len(fillers[0].ids)) == (1.0, 1)
    assert bool(fillers[0].mean.isfinite().all())


@pytest.mark.parametrize("cut", [1, 3, 5, 7])
def test_resumes_in_the_middle_of_an_epoch(root: Path, cut: int):
    straight = take(build(root, dropout=0.3), 11)
    position = json.loads(json.dumps(straight[cut - 1][1]))
    for (a, after_a), (b, after_b) in zip(
        straight[cut:], take(build(root, dropout=0.3), 11 - cut, position), strict=True
    ):
        assert same(a, b)
        assert after_a == after_b


def test_the_position_counts_what_was_taken_not_what_was_prefetched(root: Path):
    batches = build(root).batches()
    _, first = next(batches)
    time.sleep(0.3)
    _, second = next(batches)
    assert (first["datasets"]["pictures"]["batch"], second["datasets"]["pictures"]["batch"]) == (1, 2)
    batches.close()


def test_the_thread_ends_with_its_consumer(root: Path):
    before = threading.active_count()
    batches = build(root).batches()
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_consumer(root: Path):
    data = build(root)
    for path in (root / "cache" / "vae").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        next(data.batches())


def test_each_line_of_a_caption_is_drawn_alike(root: Path):
    drawn: Counter[str] = Counter()
    names = {tuple(features(caption).tolist()): caption for caption in WIDE_CAPTIONS}
    for batch, _ in take(build(root), 500):
        if batch.ids[0].startswith("wide"):
            drawn.update(names[tuple(pooled.tolist())] for pooled in batch.cond["pooled"])
    assert sum(drawn.values()) == 300
    assert all(70 <= drawn[caption] <= 130 for caption in WIDE_CAPTIONS)


def test_dropped_captions_are_the_unconditional_features(root: Path):
    dropped = kept = 0
    for batch, _ in take(build(root, dropout=0.25), 500):
        for index, drop in enumerate(batch.dropped.tolist()):
            assert bool((batch.cond["tokens"][index] == 0).all()) is drop
            assert batch.geometry[index, 0] > 0
            dropped, kept = dropped + drop, kept + (not drop)
    assert dropped + kept == 800
    assert 160 < dropped < 240
    assert not any(bool(batch.dropped.any()) for batch, _ in take(build(root), 5))


def test_two_datasets_take_turns(root: Path):
    add_image(root / "more", "x.png", (64, 64), 50)
    family = CountingFamily()
    datasets = [dataset(root), dataset(root, id="more", instance_data_dir=root / "more", probability=0.5, repeats=1)]
    cache = precompute(prepare(datasets), text_cache(root), Encoding(family, None))
    data = CachedDataset(cache, family.uncond, 0)
    assert data.batches_per_epoch == {"pictures": 5, "more": 1}
    found = take(data, 30)
    assert sum(batch.ids[0] == "x.png" for batch, _ in found) == 10
    assert found[-1][1]["datasets"]["more"] == {"epoch": 9, "batch": 1, "turns": 10}
