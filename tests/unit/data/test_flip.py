"""Mirrored images: encoded as such, drawn by the sample's position, and told to the network as they were cut."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.data.dataset import CachedDataset
from simpletuner.data.geometry import geometry
from simpletuner.data.identity import Encoding, Ranks
from simpletuner.data.precompute import outstanding, precompute, prepare
from simpletuner.data.transforms import open_rgb, to_pixels
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache

CUT = {"crop": True, "crop_style": "corner", "vae_batch_size": 1}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, size in enumerate([(160, 80), (64, 64), (100, 70)]):
        add_image(tmp_path / "images", f"{number}.png", size, number)
    return tmp_path


def build(root: Path, rank: int = 0, world: int = 1, **values: Any) -> tuple[CachedDataset, CountingFamily]:
    family = CountingFamily()
    cache = precompute(prepare([dataset(root, **values)]), text_cache(root), Encoding(family, None))
    return CachedDataset(cache, family.uncond, seed=1, ranks=Ranks(rank, world)), family


def test_a_mirrored_sample_is_the_encoded_mirrored_image_and_its_crop(root: Path):
    data, family = build(root, random_flip=True, train_batch_size=1, **CUT)
    assert len(family.images) == 6
    expected: dict[tuple[str, bool], tuple[torch.Tensor, list[int]]] = {}
    for name, (width, height) in {"0.png": (160, 80), "1.png": (64, 64), "2.png": (100, 70)}.items():
        cut = geometry(dataset(root, **CUT), name, width, height)
        assert (cut.left, cut.top, cut.target) == (0, 0, (64, 64))
        with (root / "images" / name).open("rb") as file:
            pixels = to_pixels(open_rgb(file), cut)
        right = cut.resized[0] - 64  # what was cut off on the right of the image is left of its mirror image
        for mirrored, left in ((False, 0), (True, right)):
            mean, _ = family.encode_image("", (pixels.flip(-1) if mirrored else pixels)[None])
            expected[name, mirrored] = mean[0], [height, width, 0, left, 64, 64]
    assert [expected[f"{n}.png", True][1][3] for n in range(3)] == [64, 0, 27]
    turns = {key: 0 for key in expected}
    for batch, _ in islice(data.batches(), 300):
        name = batch.ids[0]
        (mirrored,) = [way for way in (False, True) if torch.equal(batch.mean[0], expected[name, way][0])]
        assert batch.geometry[0].tolist() == expected[name, mirrored][1]
        turns[name, mirrored] += 1
    assert all(35 <= count <= 65 for count in turns.values())  # of 100 turns each, half; binomial, 3 deviations are 15


def test_turns_do_not_depend_on_ranks_and_go_on_after_a_resume(root: Path):
    straight = list(islice(build(root, random_flip=True, train_batch_size=2)[0].batches(), 12))
    ranks = [build(root, rank, 2, random_flip=True, train_batch_size=1)[0].batches() for rank in (0, 1)]
    for (one, _), *parts in zip(straight, *ranks, strict=False):
        rows = torch.cat([part.mean[part.weight > 0] for part, _ in parts])
        assert torch.equal(one.mean, rows)
    resumed = islice(build(root, random_flip=True, train_batch_size=2)[0].batches(straight[4][1]), 7)
    for (one, _), (two, _) in zip(straight[5:], resumed, strict=True):
        assert torch.equal(one.mean, two.mean)
        assert torch.equal(one.geometry, two.geometry)


def test_switching_it_on_encodes_the_mirrored_images_only(root: Path):
    build(root)
    manifests = prepare([dataset(root, random_flip=True)])
    latents, _ = outstanding(manifests, text_cache(root), Encoding(CountingFamily(), None), 12)
    assert (latents.total, latents.missing) == (6, 3)
    _, family = build(root, random_flip=True)
    assert len(family.images) == 3
    _, family = build(root, random_flip=True)
    assert family.loaded == []
    _, family = build(root)
    assert family.loaded == []


def test_an_empty_cache_lacks_both_ways(root: Path):
    manifests = prepare([dataset(root, random_flip=True)])
    latents, _ = outstanding(manifests, text_cache(root), Encoding(CountingFamily(), None), 12)
    assert (latents.total, latents.missing) == (6, 6)
