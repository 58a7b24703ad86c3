"""Which processes are started, from accelerate's config file, the environment and ACCELERATE_EXTRA_ARGS."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simpletuner.config.errors import UserError
from simpletuner.launch import plan_launch

TWO_BY_TWO = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
gpu_ids: 0,3
machine_rank: 1
main_process_ip: 10.0.0.1
main_process_port: 29555
mixed_precision: bf16
num_machines: 2
num_processes: 4
use_cpu: false
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "accelerate" / "default_config.yaml"
    path.parent.mkdir()
    path.write_text(TWO_BY_TWO)
    return path


def test_nothing_said_is_one_process_without_ranks(tmp_path: Path):
    environ = {"HF_HOME": str(tmp_path), "ENV": "foo"}
    launch = plan_launch(environ)
    assert (launch.num_processes, launch.environments) == (1, (environ,))


def test_two_processes_share_one_address(tmp_path: Path):
    launch = plan_launch({"HF_HOME": str(tmp_path), "TRAINING_NUM_PROCESSES": "2", "OMP_NUM_THREADS": "3"})
    first, second = launch.environments
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "0", "1", "1")
    assert {key for key in first if first[key] != second[key]} == {"RANK", "LOCAL_RANK"}
    assert (first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"], first["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
    assert int(first["MASTER_PORT"]) > 1023
    assert first["OMP_NUM_THREADS"] == "3"


def test_cores_are_shared_where_the_user_says_nothing(tmp_path: Path):
    launch = plan_launch({"HF_HOME": str(tmp_path), "TRAINING_NUM_PROCESSES": "2"})
    assert launch.environments[0]["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))


def test_the_second_of_two_machines_counts_on(config_file: Path):
    launch = plan_launch({"HF_HOME": str(config_file.parents[1])})
    assert launch.num_processes == 4
    assert [environment["RANK"] for environment in launch.environments] == ["2", "3"]
    assert [environment["LOCAL_RANK"] for environment in launch.environments] == ["0", "1"]
    first = launch.environments[0]
    assert (first["MASTER_ADDR"], first["MASTER_PORT"], first["WORLD_SIZE"]) == ("10.0.0.1", "29555", "4")
    assert (first["LOCAL_WORLD_SIZE"], first["CUDA_VISIBLE_DEVICES"]) == ("2", "0,3")


def test_the_environment_goes_before_the_file_and_extra_arguments_before_both(config_file: Path):
    named = {"ACCELERATE_CONFIG_PATH": str(config_file), "TRAINING_NUM_PROCESSES": "6"}
    assert plan_launch(named).num_processes == 6
    extra = "--num_processes=8 --machine-rank 0 --gpu_ids all --mixed_precision fp16 --multi_gpu"
    launch = plan_launch({**named, "ACCELERATE_EXTRA_ARGS": extra, "MIXED_PRECISION": "bf16"})
    assert launch.num_processes == 8
    assert [environment["RANK"] for environment in launch.environments] == ["0", "1", "2", "3"]
    assert launch.environments[0]["MIXED_PRECISION"] == "fp16"
    assert "CUDA_VISIBLE_DEVICES" not in launch.environments[0]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"TRAINING_NUM_PROCESSES": "0"}, "num_processes: '0' must be a whole number, 1 or more"),
        ({"TRAINING_NUM_PROCESSES": "3", "TRAINING_NUM_MACHINES": "2"}, "cannot be shared evenly"),
        ({"TRAINING_NUM_PROCESSES": "4", "TRAINING_NUM_MACHINES": "2"}, "--main_process_ip ADDRESS"),
        ({"ACCELERATE_EXTRA_ARGS": "--machine_rank 1"}, "machine_rank: 1 must be below num_machines: 1"),
        ({"ACCELERATE_EXTRA_ARGS": "--use_deepspeed --gpu_ids 0"}, "not supported: --use_deepspeed (known: --num_pro"),
        ({"ACCELERATE_EXTRA_ARGS": "--gpu_ids"}, "expected one argument"),
        ({"ACCELERATE_EXTRA_ARGS": "--gpu_ids '0"}, "No closing quotation"),
        ({"ACCELERATE_CONFIG_PATH": "/no/such/file.yaml"}, "/no/such/file.yaml"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, environ: dict[str, str], said: str):
    with pytest.raises(UserError) as raised:
        plan_launch({"HF_HOME": str(tmp_path), **environ})
    assert said in str(raised.value)
    assert len(raised.value.lines) == 1


def test_a_distribution_that_is_not_supported_is_refused(config_file: Path):
    config_file.write_text(TWO_BY_TWO.replace("MULTI_GPU", "FSDP"))
    with pytest.raises(UserError, match=r"distributed_type: FSDP is not supported \(known: NO, MULTI_GPU"):
        plan_launch({"ACCELERATE_CONFIG_PATH": str(config_file)})


def test_a_rank_that_does_not_stop_after_another_failed_is_killed():
    rank = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(1)\n"
        "sys.exit(9) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    run = (
        "import sys\n"
        "from simpletuner import launch\n"
        "launch.STOP_SECONDS = 0.5\n"
        f"sys.exit(launch.run([sys.executable, '-c', {rank!r}], [{{'RANK': '0'}}, {{'RANK': '1'}}]))\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (9, "process 1 failed (exit status 9): stopping the others\n")
    assert time.monotonic() - begin < 30
