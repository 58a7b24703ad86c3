"""kill -TERM on the process of ``bash train.sh``: the run saves and leaves, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simpletuner.training.checkpoint import find

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, pictures: Path) -> Path:
    settings = {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": str(tiny_model),
        "output_dir": "output",
        "max_train_steps": 100_000,
        "train_batch_size": 2,
        "resolution": 64,
        "resolution_type": "pixel_area",
        "aspect_bucket_alignment": 16,
        "mixed_precision": "no",
        "lora_rank": 4,
        "optimizer": "adamw",
        "lr_scheduler": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "validation_disable": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    datasets = [{"id": "pictures", "instance_data_dir": str(pictures), "caption_strategy": "textfile"}]
    (tmp_path / "multidatabackend.json").write_text(json.dumps(datasets))
    return tmp_path / "config.json"


def start(config: Path, num_processes: int, *overrides: str) -> subprocess.Popen[str]:
    more = {"VENV_PATH": sys.prefix, "HF_HOME": str(config.parent / "hub"), "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        more["TRAINING_NUM_PROCESSES"] = str(num_processes)
    command = ["bash", str(ROOT / "train.sh"), "--config", str(config), *overrides]
    to = subprocess.STDOUT
    environ = {**os.environ, **more}
    return subprocess.Popen(command, cwd=config.parent, env=environ, stdout=subprocess.PIPE, stderr=to, text=True)


def steps(config: Path) -> list[int]:
    path = config.parent / "output" / "metrics.jsonl"
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_told_to_stop_saves_and_goes_on(config: Path, num_processes: int):
    run = start(config, num_processes)
    deadline = time.monotonic() + 120
    while len(steps(config)) < 3:
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "no third step in two minutes"
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert "the same command goes on from it" in said
    assert "failed" not in said
    saved = find(config.parent / "output", "latest")
    assert saved is not None, said
    last = int(saved.name.rpartition("-")[2])
    assert last >= 3
    assert steps(config) == list(range(1, last + 1))

    run = start(config, num_processes, "--max_train_steps", str(last + 2))
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert steps(config) == list(range(1, last + 3))
    assert (config.parent / "output" / "pytorch_lora_weights.safetensors").is_file()
