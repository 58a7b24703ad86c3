"""Epochs over shards: every sample once, no sample on two ranks, and the next sample after a stop inside a shard."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from simpletuner.batch import Batch
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.identity import Encoding, Ranks
from simpletuner.data.precompute import precompute, prepare
from simpletuner.data.sampler import Position
from tests.unit.backends.shards import shards, write_three_shards
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache

NUM_SAMPLES = 13
BATCHES = 5 + 2  # of two: nine squares and four wide ones; two more images are broken


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_three_shards(tmp_path, {"100.txt": "no image", "101.png": b"no image", "101.txt": "x"})


def build(root: Path, rank: int = 0, world: int = 1, batch: int = 2) -> CachedDataset:
    family = CountingFamily()
    manifests = prepare([shards(root, train_batch_size=batch)])
    cache = precompute(manifests, text_cache(root), Encoding(family, None))
    return CachedDataset(cache, family.uncond, seed=1, ranks=Ranks(rank, world))


def take(data: CachedDataset, count: int, position: Position | None = None) -> list[tuple[Batch, Position]]:
    return list(islice(data.batches(position), count))


def seen(batches: list[tuple[Batch, Position]]) -> list[str]:
    return [name for batch, _ in batches for name, weight in zip(batch.ids, batch.weight, strict=True) if weight > 0]


def test_an_epoch_shows_every_sample_once(root: Path):
    data = build(root)
    assert data.batches_per_epoch == {"pictures": BATCHES}
    epoch = take(data, BATCHES)
    expected = {f"{shard}.tar/{n:05}.png" for shard, own in zip("abc", ((0, 5), (5, 11), (11, 13)), strict=True)
                for n in range(*own)}  # fmt: skip
    assert Counter(seen(epoch)) == Counter(expected)
    assert len(expected) == NUM_SAMPLES
    assert epoch[-1][1]["samples"] == NUM_SAMPLES
    assert data.problems["pictures"] == {
        "not an image that can be read": ("c.tar/101.png",),
        "truncated or corrupt": ("c.tar/99.png",),
    }
    again = seen(take(data, 2 * BATCHES)[BATCHES:])
    assert sorted(again) == sorted(seen(epoch))
    assert again != seen(epoch)


def test_two_ranks_share_no_sample_and_together_show_all(root: Path):
    one = build(root, batch=4)
    ranks = [build(root, rank, 2) for rank in range(2)]
    count = one.batches_per_epoch["pictures"]
    assert all(data.batches_per_epoch["pictures"] == count for data in ranks)
    shown = [seen(take(data, count)) for data in ranks]
    assert not set(shown[0]) & set(shown[1])
    assert Counter(shown[0] + shown[1]) == Counter(seen(take(one, count)))
    assert len(shown[0] + shown[1]) == NUM_SAMPLES


@pytest.mark.parametrize("stop", range(1, 2 * BATCHES))
def test_a_stop_inside_a_shard_goes_on_with_the_next_sample(root: Path, stop: int):
    straight = take(build(root), 2 * BATCHES + 2)
    after = take(build(root), 2 * BATCHES + 2 - stop, straight[stop - 1][1])
    assert seen(straight[:stop]) + seen(after) == seen(straight)
    for (mine, _), (other, _) in zip(straight[stop:], after, strict=True):
        assert torch.equal(mine.mean, other.mean)
        assert torch.equal(mine.cond["pooled"], other.cond["pooled"])


def test_shards_give_the_features_of_the_same_files_in_a_folder(root: Path):
    for number in range(NUM_SAMPLES):
        size = (64, 64) if number < 9 else (128, 64)
        add_image(root / "images", f"{number:05}.png", size, number, caption=f"caption {number}")
    family = CountingFamily()
    cache = precompute(
        prepare([dataset(root, cache_dir_vae=root / "cache" / "folder", vae_batch_size=1)]),
        text_cache(root), Encoding(family, None),
    )  # fmt: skip
    folder = {}
    for batch, _ in take(CachedDataset(cache, family.uncond, seed=1), BATCHES):
        folder |= dict(zip(batch.ids, zip(batch.mean, batch.cond["pooled"], batch.geometry, strict=True), strict=True))
    tars = {}
    for batch, _ in take(build(root), BATCHES):
        names = [name.rpartition("/")[2] for name in batch.ids]
        tars |= dict(zip(names, zip(batch.mean, batch.cond["pooled"], batch.geometry, strict=True), strict=True))
    assert tars.keys() == folder.keys()
    for name, (mean, pooled, geometry) in folder.items():
        torch.testing.assert_close(tars[name][0], mean, rtol=0, atol=2e-6)  # the encoder's own 1e-6 a batch of images
        assert torch.equal(tars[name][1], pooled)
        assert torch.equal(tars[name][2], geometry)
