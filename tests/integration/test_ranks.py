"""Two processes make the run that one process makes, and are told of mistakes once."""

import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.training import checkpoint
from tests.integration.conftest import Project

STEPS = 5


@pytest.fixture(scope="module")
def runs() -> dict[int, Project]:
    """Returns a place for the runs of one and of two processes."""
    return {}


@pytest.fixture
def both(
    runs: dict[int, Project], project: Project, uneven: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Project, Project]:
    """Returns the same run made by one process with batches of 4, and by two with 2 each.

    The buckets of 5, 2 and 1 make batches of 4, 1, 2 and 1: of two of them the second process has filler only.
    """
    if not runs:
        folder = tmp_path_factory.mktemp("ranks")
        project.use_pictures(uneven, folder / "cache")
        project.settings |= {
            "max_train_steps": STEPS,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "adam_epsilon": 1e-4,  # with 1e-8 rounding decides the sign of the smallest updates
            "validation_prompt": "a picture",
            "validation_resolution": "64x64,96x64,64x96",
            "disable_benchmark": True,
        }
        alone = project.at(folder / "one")
        alone.train(train_batch_size=4)
        pair = project.at(folder / "two")
        done = pair.launch(2, train_batch_size=2)
        assert done.returncode == 0, done.stderr
        assert "arning" not in done.stderr
        runs |= {1: alone, 2: pair}
    return runs[1], runs[2]


def test_two_processes_make_the_weights_of_one(both: tuple[Project, Project]):
    one, two = (load_file(project.output / "pytorch_lora_weights.safetensors") for project in both)
    assert one.keys() == two.keys()
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    assert moved > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4 * moved)


def test_two_processes_log_the_numbers_of_one(both: tuple[Project, Project]):
    one, two = (project.rows() for project in both)
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3)
    assert [row["learning_rate"] for row in two] == [row["learning_rate"] for row in one]
    rates = [0.5, 1, 1, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2]
    assert [row["learning_rate"] for row in two] == pytest.approx([1e-2 * rate for rate in rates])


def test_two_processes_are_where_one_is_in_the_data(both: tuple[Project, Project]):
    states = [checkpoint.load(project.output / f"checkpoint-{STEPS}").state for project in both]
    assert states[0]["position"] == states[1]["position"]
    assert states[0]["samples"] == states[1]["samples"] == 16 + 4 + 1  # two epochs and two batches


def test_two_processes_share_the_pictures(both: tuple[Project, Project]):
    one, two = ({path.name for path in (project.output / "validation").rglob("*.png")} for project in both)
    assert one == two
    assert len(two) == 4  # three sizes and the contact sheet


def test_a_mistake_is_said_once(project: Project):
    project.datasets[0]["instance_data_dir"] = str(project.folder)
    done = project.launch(2)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


KILLED = """
import os, signal
if os.environ.get("RANK") == "1":
    whole, left = os.fsync, [4]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(descriptor)

    os.fsync = fsync
"""


def test_a_process_killed_while_caching_leaves_a_cache_that_the_next_start_completes(
    project: Project, uneven: Path, tmp_path: Path
):
    def fill(name: str, **environ: str) -> subprocess.CompletedProcess[str]:
        mine = project.at(tmp_path / name).use_pictures(uneven, tmp_path / name / "cache")
        mine.datasets[0] |= {"write_batch_size": 1, "vae_batch_size": 1}
        command = [sys.executable, "-m", "simpletuner.launch", "cache", "--config", str(mine.write())]
        settings = os.environ | {"TRAINING_NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"} | environ
        return subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False)

    def shards(name: str) -> dict[str, bytes]:
        found = sorted((tmp_path / name / "cache").rglob("*.safetensors"))
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in found}

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLED)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = fill("straight")
    assert done.returncode == 0, done.stderr
    assert "latents of pictures: nothing missing of 8" in done.stdout.splitlines()[-2], done.stdout
    killed = fill("killed", PYTHONPATH=path)
    assert killed.returncode == 128 + signal.SIGKILL, killed.stderr
    assert "Traceback" not in killed.stderr
    whole, half = shards("straight"), shards("killed")
    assert 0 < len(half) < len(whole)
    assert half.items() <= whole.items()
    assert fill("killed").returncode == 0
    assert shards("killed") == whole


ALONE = """
import logging, sys
from simpletuner.config.errors import SaidElsewhere, UserError
from simpletuner.training.build import make_accelerator
from simpletuner.training.meeting import Meeting

logging.basicConfig(format="%(message)s")
accelerator = make_accelerator()
meeting = Meeting(accelerator)
try:
    with meeting.leaving_together():
        meeting.wait()
        if accelerator.process_index == 1:
            raise UserError("the second one's own mistake")
        meeting.wait()
except (SaidElsewhere, UserError) as error:
    print(f"{accelerator.process_index} {type(error).__name__}\\n", end="")
accelerator.end_training()
"""


def test_a_mistake_of_the_second_process_alone_ends_both_and_is_said(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=tmp_path,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for rank in "01"
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [out for out, _ in said] == ["0 SaidElsewhere\n", "1 UserError\n"], said
    assert "error:" not in said[0][1]
    assert "error: the second one's own mistake\n" in said[1][1]
