"""Datasets that are not cached: the features of the cached ones, made when their batch is taken, and never written."""

import logging
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner.batch import Batch
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.columns import strings
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.identity import Encoding, Ranks
from simpletuner.data.precompute import outstanding, precompute, prepare
from simpletuner.data.sampler import Position
from tests.unit.backends.shards import scanned, shards, write_three_shards
from tests.unit.data.support import CountingFamily, add_image, dataset, picture, text_cache

LIVE = {"vae_cache_disable": True, "text_cache_disable": True}
NUM_SAMPLES = 13
BATCHES = 5 + 3  # of two: nine squares; four wide ones and a broken one


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_three_shards(tmp_path)


def build(
    root: Path,
    config: DatasetConfig,
    family: CountingFamily | None = None,
    dropout: float = 0.0,
    ranks: Ranks | None = None,
) -> CachedDataset:
    family = family or CountingFamily()
    encoding = Encoding(family, None)
    cache = precompute(prepare([config]), text_cache(root), encoding)
    return CachedDataset(cache, family.uncond, 1, dropout, ranks, encoding=encoding)


def take(data: CachedDataset, count: int, position: Position | None = None) -> list[tuple[Batch, Position]]:
    return list(islice(data.batches(position), count))


def seen(batches: list[tuple[Batch, Position]]) -> list[str]:
    return [name for batch, _ in batches for name, weight in zip(batch.ids, batch.weight, strict=True) if weight > 0]


def require_same(one: Batch, two: Batch) -> None:
    assert (one.ids, one.global_weight) == (two.ids, two.global_weight)
    for name in ("mean", "std", "dropped", "geometry", "position", "weight"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.cond.keys() == two.cond.keys()
    assert all(torch.equal(values, two.cond[name]) for name, values in one.cond.items())


@pytest.mark.parametrize("switches", [LIVE, {"vae_cache_disable": True}, {"text_cache_disable": True}])
@pytest.mark.parametrize("crop", [{}, {"crop": True, "crop_style": "random", "random_flip": True}])
def test_the_batches_are_those_of_the_cached_dataset(tmp_path: Path, switches: dict[str, bool], crop: dict[str, Any]):
    """Mirrored images, crops, drawn lines of captions and dropped captions included."""
    for number, size in enumerate([(64, 64), (160, 80), (80, 160), (100, 70), (64, 64), (160, 80)]):
        add_image(tmp_path / "images", f"{number}.png", size, number, caption="one\ntwo\nthree")
    settings = {"vae_batch_size": 1, **crop}  # CountingFamily's numbers depend on the size of the batch
    cached = build(tmp_path, dataset(tmp_path, **settings), dropout=0.3)
    live = build(tmp_path, dataset(tmp_path, cache_dir_vae=tmp_path / "other", **settings, **switches), dropout=0.3)
    for (one, after), (two, then) in zip(take(cached, 20), take(live, 20), strict=True):
        require_same(one, two)
        assert after == then


def test_images_are_cut_anew_each_time_they_are_shown(tmp_path: Path):
    """The crop that the network is told is the one that was cut; ranks and resumed runs cut the same."""
    for number, size in enumerate([(96, 64), (64, 160)]):
        add_image(tmp_path / "images", f"{number}.png", size, number)
    own = {"crop": True, "crop_style": "random", "random_flip": True, "vae_batch_size": 1, "vae_cache_disable": True}
    config = dataset(tmp_path, vae_cache_clear_each_epoch=True, **own)
    found = take(build(tmp_path, config), 40)
    tops: dict[str, Counter[tuple[float, float]]] = {"0.png": Counter(), "1.png": Counter()}
    for batch, _ in found:
        for image_id, mean, told, position in zip(batch.ids, batch.mean, batch.geometry, batch.position, strict=True):
            tops[image_id][tuple(told[2:4].tolist())] += 1
            image = torch.from_numpy(np.array(picture(*told[[1, 0]].int().tolist(), int(image_id[0])))).permute(2, 0, 1)
            top, left = told[2:4].int().tolist()
            mirrored = [image, image.flip(-1)]
            cuts = [way[:, top : top + 64, left : left + 64].float() / 127.5 - 1 for way in mirrored]
            means = [torch.nn.functional.avg_pool2d(cut, 8) + 1e-6 for cut in cuts]
            assert any(torch.allclose(mean, expected, atol=1e-5) for expected in means), (image_id, int(position))
    assert len(tops["0.png"]) > 20  # of 33 places
    assert len(tops["1.png"]) > 25  # of 97
    assert [b.geometry.tolist() for b, _ in take(build(tmp_path, config), 9, found[29][1])] == [
        b.geometry.tolist() for b, _ in found[30:39]
    ]
    ranks = [build(tmp_path, config.model_copy(update={"train_batch_size": 1}), ranks=Ranks(r, 2)) for r in range(2)]
    for (whole, _), *parts in zip(found, *(take(rank, 40) for rank in ranks), strict=False):
        assert torch.equal(whole.geometry, torch.cat([part.geometry for part, _ in parts]))


def test_only_the_prompts_are_encoded_before_and_nothing_else_is_written(root: Path):
    family = CountingFamily()
    data = build(root, shards(root, **LIVE), family)
    assert (family.images, family.prompts) == ([], [""])
    assert not list((root / "cache" / "vae").glob("latents-*"))
    assert set(strings(scanned(shards(root)).rows, "digest")) == {""}  # nor is any file read whole
    assert sorted(family.loaded) == ["text", "text", "vae"]  # the first for the empty prompt
    take(data, 1)
    assert len(family.images) == len(family.prompts) - 1 == 2


def test_latents_are_encoded_in_parts_of_vae_batch_size(root: Path):
    family = CountingFamily()
    take(build(root, shards(root, train_batch_size=8, vae_batch_size=3, **LIVE), family), 3)
    assert sorted(family.batch_sizes) == sorted([3, 3, 2] + [1] + [3, 2])  # nine squares and five wide ones


def test_an_epoch_shows_every_sample_once_and_a_broken_one_never(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("simpletuner.data.streaming._MOST_IN_A_ROW", 2)  # it is met twice, but not in a row
    data = build(root, shards(root, **LIVE))
    assert data.batches_per_epoch == {"pictures": BATCHES}
    with caplog.at_level(logging.WARNING):
        epochs = take(data, 2 * BATCHES)
    expected = {f"{shard}.tar/{n:05}.png" for shard, own in zip("abc", ((0, 5), (5, 11), (11, 13)), strict=True)
                for n in range(*own)}  # fmt: skip
    assert len(expected) == NUM_SAMPLES
    assert Counter(seen(epochs[:BATCHES])) == Counter(seen(epochs[BATCHES:])) == Counter(expected)
    assert seen(epochs[:BATCHES]) != seen(epochs[BATCHES:])
    assert sum(batch.global_weight for batch, _ in epochs) == 2 * (NUM_SAMPLES + 1)
    assert all(bool(batch.mean.isfinite().all()) for batch, _ in epochs)
    said = "dataset 'pictures': 'c.tar/99.png' cannot be used: truncated or corrupt; it is left out"
    assert [record.message for record in caplog.records] == [said]


def test_two_ranks_share_no_sample_and_together_show_all(root: Path):
    one = build(root, shards(root, train_batch_size=4, **LIVE))
    ranks = [build(root, shards(root, **LIVE), ranks=Ranks(rank, 2)) for rank in range(2)]
    count = one.batches_per_epoch["pictures"]
    shown = [seen(take(data, count)) for data in ranks]
    assert not set(shown[0]) & set(shown[1])
    assert Counter(shown[0] + shown[1]) == Counter(seen(take(one, count)))
    assert len(shown[0] + shown[1]) == NUM_SAMPLES


@pytest.mark.parametrize("stop", range(1, BATCHES + 2))
def test_a_stop_inside_a_shard_goes_on_with_the_next_sample(root: Path, stop: int):
    straight = take(build(root, shards(root, random_flip=True, **LIVE), dropout=0.3), BATCHES + 3)
    resumed = build(root, shards(root, random_flip=True, **LIVE), dropout=0.3)
    for (one, after), (two, then) in zip(
        straight[stop:], take(resumed, BATCHES + 3 - stop, straight[stop - 1][1]), strict=True
    ):
        require_same(one, two)
        assert after == then


def test_images_are_decoded_by_threads_and_encoded_by_the_one_that_trains(root: Path, monkeypatch: pytest.MonkeyPatch):
    from simpletuner.data import streaming

    decoded, encoded = set[str](), set[threading.Thread]()
    original = streaming.cut_image

    def cut(*arguments: Any) -> torch.Tensor:
        decoded.add(threading.current_thread().name.partition("_")[0])
        return original(*arguments)

    class Watched(CountingFamily):
        def encode_image(self, encoders: str, pixels: torch.Tensor):
            encoded.add(threading.current_thread())
            return super().encode_image(encoders, pixels)

        def encode_prompt(self, encoders: str, prompts: list[str]):
            encoded.add(threading.current_thread())
            return super().encode_prompt(encoders, prompts)

    monkeypatch.setattr(streaming, "cut_image", cut)
    before = threading.active_count()
    take(build(root, shards(root, **LIVE), Watched()), 4)
    assert decoded == {"pictures"}
    assert encoded == {threading.main_thread()}
    assert threading.active_count() == before


def test_a_dataset_that_is_gone_ends_the_run(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simpletuner.data.streaming._MOST_IN_A_ROW", 20)
    data = build(root, shards(root, **LIVE))
    for path in (root / "shards").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"dataset 'pictures': '.*png' cannot be used: .*; nor can the 19 images"):
        take(data, 2 * BATCHES)


def test_the_plan_of_the_caches_leaves_out_what_is_not_cached(root: Path):
    encoding = Encoding(CountingFamily(), None)
    for switches, expected in [
        (LIVE, [("captions", 1)]),
        ({"vae_cache_disable": True}, [("captions", NUM_SAMPLES + 2)]),
        ({"text_cache_disable": True}, [("latents", NUM_SAMPLES + 1), ("captions", 1)]),
    ]:
        found = outstanding(prepare([shards(root, **switches)]), text_cache(root), encoding, 12)
        assert [(cache.what, cache.total) for cache in found] == expected
