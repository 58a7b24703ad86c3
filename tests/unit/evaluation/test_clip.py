"""CLIP as a judge: its numbers by hand, and a small model of random weights through the real loading code."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from simpletuner.config.errors import UserError
from simpletuner.evaluation.clip import Clip, clip_score, cmmd
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def test_embeddings_are_of_unit_length_whatever_the_size_of_the_picture(folder: Path):
    clip = Clip(str(folder))
    sizes = [(64, 48), (32, 32)] * 10
    pictures = clip.pictures([Image.new("RGB", size, (9 * i, 200, 10)) for i, size in enumerate(sizes)])
    texts = clip.texts(["a red circle", "a red circle " * 60])
    assert pictures.shape == (20, 12)
    assert texts.shape == (2, 12)
    for found in (pictures, texts):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    assert not torch.allclose(pictures[0], pictures[2])


def test_what_is_no_clip_model_is_said_in_a_line(tmp_path: Path):
    with pytest.raises(UserError, match="--clip: .* cannot be loaded as a CLIP model"):
        Clip(str(tmp_path))


def test_the_score_is_100_times_the_cosine_and_never_negative():
    pictures = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert clip_score(pictures, texts) == pytest.approx(100 * (1 + 0.6 + 0) / 3)


def test_cmmd_of_two_points_is_its_formula():
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert cmmd(one, two) == pytest.approx(1000 * 2 * (1 - math.exp(-2 / 200)))
    same = torch.nn.functional.normalize(torch.randn(30, 8), dim=1)
    assert cmmd(same, same) == pytest.approx(0, abs=1e-9)
