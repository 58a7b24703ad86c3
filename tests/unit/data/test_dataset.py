import itertools
from pathlib import Path

import pytest
import torch

from simpletuner.data.dataset import CachedDataset
from simpletuner.data.identity import Encoding, Ranks
from simpletuner.data.precompute import precompute, prepare
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(5):
        add_image(tmp_path / "images", f"square_{number}.png", (64, 64), number)
    for number in range(3):
        add_image(tmp_path / "images", f"wide/{number}.jpg", (160, 80), 10 + number, caption="one\ntwo\n\n three ")
    return tmp_path


def build(root: Path, ranks: Ranks | None = None, dropout: float = 0.0, **values: object) -> CachedDataset:
    family = CountingFamily()
    cache = precompute(prepare([dataset(root, **values)]), text_cache(root), Encoding(family, None))
    return CachedDataset(cache, family.uncond, seed=1, caption_dropout=dropout, ranks=ranks)


def test_batch_holds_the_features_and_the_cut_of_its_images(root: Path):
    data = build(root)
    assert data.batches_per_epoch == {"pictures": 3 + 2}
    seen: list[str] = []
    for batch, _ in itertools.islice(data.batches(), 5):
        seen += batch.ids
        wide = batch.ids[0].startswith("wide")
        assert batch.mean.shape[1:] == ((3, 8, 16) if wide else (3, 8, 8))
        torch.testing.assert_close(batch.std, batch.mean.abs() + 1)
        expected = [80, 160, 0, 0, 64, 128] if wide else [64, 64, 0, 0, 64, 64]
        assert batch.geometry.tolist() == [expected] * len(batch.ids)
        assert batch.weight.tolist() == [1.0] * len(batch.ids)
        assert batch.global_weight == len(batch.ids)
    assert sorted(seen) == sorted([f"square_{n}.png" for n in range(5)] + [f"wide/{n}.jpg" for n in range(3)])
