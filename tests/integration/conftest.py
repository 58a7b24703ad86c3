"""A run in a temporary folder: two JSON files around the tiny model, written and trained in one call each."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.config.load import load
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.precompute import precompute, prepare
from simpletuner.data.summary import summarise
from simpletuner.plan import make_plan
from simpletuner.run import train
from simpletuner.training import metrics
from simpletuner.training.build import Run, build, make_accelerator
from simpletuner.training.state import TrainState
from tests.tiny import image_folder

TIMING = ("samples_per_second", "tflops_per_second", "data_wait", "peak_memory_gib")
"""The numbers of a row that no two runs share."""

SETTINGS: Mapping[str, Any] = {
    "model_family": "sdxl",
    "model_type": "lora",
    "distillation_method": "lcm",
    "distillation_config": {"lcm": {"w_min": 2.0, "w_max": 4.0}},
    "max_train_steps": 2,
    "train_batch_size": 2,
    "resolution": 64,
    "resolution_type": "pixel_area",
    "aspect_bucket_alignment": 16,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "lora_rank": 4,
    "optimizer": "adamw",
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "logging_steps": 1,
    "checkpoint_step_interval": 0,
    "validation_resolution": "64x64",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Pins the thread count: sums over another number of threads round in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Project:
    """A folder with config.json and multidatabackend.json, and what a run leaves in its ``output``."""

    folder: Path
    settings: dict[str, Any]
    datasets: list[dict[str, Any]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The output_dir."""
        return self.folder / "output"

    def write(self, **changes: Any) -> Path:
        """Writes both files, the changes lasting, and returns config.json; None removes a key."""
        self.settings = {k: v for k, v in (self.settings | changes).items() if v is not None}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "multidatabackend.json").write_text(json.dumps(self.datasets))
        path = self.folder / "config.json"
        path.write_text(json.dumps(self.settings))
        return path

    def train(self, **changes: Any) -> TrainState:
        """Runs the config with changes, in this process."""
        return train(load(self.write(**changes)))

    def build(self, **changes: Any) -> Run:
        """Returns the run of the config with changes, its caches filled, before any step."""
        config = load(self.write(**changes))
        manifests = prepare(config.datasets)
        plan = make_plan(config, [summarise(manifest) for manifest in manifests])
        accelerator = make_accelerator()
        cache = precompute(manifests, config.text_cache, plan.encoding(accelerator.device), plan.prompts)
        return build(plan, accelerator, CachedDataset(cache, plan.family.uncond, config.run.seed))

    def launch(self, num_processes: int = 1, **changes: Any) -> subprocess.CompletedProcess[str]:
        """Runs the config with changes in processes of its own, as train.sh starts them."""
        more = {"TRAINING_NUM_PROCESSES": str(num_processes), "OMP_NUM_THREADS": "1", "HF_HOME": str(self.folder)}
        command = [sys.executable, "-m", "simpletuner.launch", "train", "--config", str(self.write(**changes))]
        environ = os.environ | more
        return subprocess.run(command, env=environ, cwd=self.folder, capture_output=True, text=True, check=False)

    def rows(self) -> list[metrics.Row]:
        """Returns the rows of metrics.jsonl without what depends on the clock."""
        rows = metrics.read(self.output / metrics.FILE_NAME)
        return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]

    def at(self, folder: Path) -> "Project":
        """Returns the same project in another folder, where nothing is written yet."""
        return Project(folder, self.settings | {"output_dir": str(folder / "output")}, self.datasets)

    def use_pictures(self, pictures: Path, cache: Path) -> "Project":
        """Trains on a folder of pictures, cached in a folder of its own; returns self."""
        self.datasets = [{"id": "pictures", "instance_data_dir": str(pictures), "caption_strategy": "textfile"}]
        self.settings["cache_dir"] = str(cache)
        return self


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the cache of ``pictures``, which the first run fills; later ones find their features in it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, pictures: Path, shared_cache: Path) -> Project:
    """Returns a project on the tiny model and six pictures in five buckets; two steps of LCM-LoRA."""
    folder = tmp_path / "project"
    settings = {
        **SETTINGS,
        "pretrained_model_name_or_path": str(tiny_model),
        "output_dir": str(folder / "output"),
    }
    return Project(folder, settings).use_pictures(pictures, shared_cache)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns eight pictures in buckets of 5, 2 and 1: five batches of two an epoch; read-only by agreement."""
    square, wide, tall = (96, 96), (128, 80), (80, 128)
    return image_folder(tmp_path_factory.mktemp("uneven"), 8, [square] * 5 + [wide] * 2 + [tall])
