"""Fixtures that several tests share; each is built once a session."""

from pathlib import Path

import pytest
import torch

from simpletuner.families._base import ModelFamily
from simpletuner.families._source import ModelSource
from simpletuner.plan import Plan
from tests.tiny import image_folder, tiny_sdxl, tiny_single_file


def base_of(plan: Plan) -> tuple[ModelFamily, ModelSource, torch.dtype]:
    """Returns what a plan's base model is loaded by."""
    return plan.family, plan.source, plan.weight_dtype


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tiny SDXL folder that predicts epsilon; read-only by agreement."""
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "epsilon")


@pytest.fixture(scope="session")
def tiny_model_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tiny SDXL folder that predicts v; read-only by agreement."""
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the weights of ``tiny_model`` as one file under the original SDXL names."""
    return tiny_single_file(tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of six captioned pictures in five aspect ratios; read-only by agreement."""
    return image_folder(tmp_path_factory.mktemp("pictures"))
