"""bash train.sh: signals, exit status, arguments, and what it says when Python is not as it should be.

What train.sh starts is a stand-in here: a package ``simpletuner`` in the working directory, which ``python -m`` finds
first, with a ``__main__`` that behaves like a run and all else from the real package.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import simpletuner

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = [1, 2]

RUN = """
import os, signal, sys, time
from pathlib import Path

rank = os.environ.get("RANK", "0")
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
how, *numbers = sys.argv[-1].split(",")
Path(f"started-{rank}").write_text(repr(sys.argv[1:]) + os.environ.get("ENV", ""))
if how == "leave" and rank == numbers.pop(0):
    sys.exit(int(numbers[0]))
slow = how == "rank-0-saves-slowly" and rank == "0"
deadline = time.monotonic() + 60
while not got and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(3 if slow else 0.5)  # saves, while further signals may come
Path(f"saved-{rank}").write_text(",".join(got))
sys.exit(0 if how == "leave" else int(numbers[0]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    package = tmp_path / "simpletuner"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(Path(simpletuner.__file__).parent)!r})\n")
    (package / "__main__.py").write_text(RUN)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    mine = ("TRAINING_NUM_PROCESSES", "TRAINING_NUM_MACHINES", "ACCELERATE_EXTRA_ARGS", "ACCELERATE_CONFIG_PATH", "ENV")
    outside = {key: value for key, value in os.environ.items() if key not in mine}
    return outside | {"VENV_PATH": sys.prefix, "HF_HOME": str(folder / "no-accelerate-config")} | more


def start(folder: Path, *arguments: str, num_processes: int = 1, **more: str) -> subprocess.Popen[str]:
    more |= {"TRAINING_NUM_PROCESSES": str(num_processes)} if num_processes > 1 else {}
    command = ["bash", str(ROOT / "train.sh"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment(folder, **more), stdout=pipe, stderr=pipe, text=True)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {[path.name for path in paths if not path.exists()]} in time"
        time.sleep(0.02)


@pytest.mark.parametrize("num_processes", NUM_PROCESSES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_reaches_every_rank_once(folder: Path, number: signal.Signals, num_processes: int):
    script = start(folder, "save,0", num_processes=num_processes)
    wait_for(*(folder / f"started-{rank}" for rank in range(num_processes)))
    script.send_signal(number)
    _, said = script.communicate(timeout=60)
    assert script.returncode == 0, said
    for rank in range(num_processes):
        assert (folder / f"saved-{rank}").read_text() == number.name
    assert "Traceback" not in said


def test_ctrl_c_in_a_terminal_reaches_every_rank_once(folder: Path):
    """A terminal sends SIGINT to the whole foreground group, so a rank in it would get a second one, forwarded."""
    pipe = subprocess.PIPE
    script = subprocess.Popen(
        ["bash", str(ROOT / "train.sh"), "save,0"],
        cwd=folder,
        env=environment(folder, TRAINING_NUM_PROCESSES="2"),
        stdout=pipe,
        stderr=pipe,
        text=True,
        process_group=0,
    )
    wait_for(folder / "started-0", folder / "started-1")
    os.killpg(script.pid, signal.SIGINT)
    _, said = script.communicate(timeout=60)
    assert script.returncode == 0, said
    assert [(folder / f"saved-{rank}").read_text() for rank in range(2)] == ["SIGINT", "SIGINT"]


@pytest.mark.parametrize("num_processes", NUM_PROCESSES)
def test_a_second_signal_reaches_a_run_that_is_saving(folder: Path, num_processes: int):
    script = start(folder, "save,0", num_processes=num_processes)
    wait_for(*(folder / f"started-{rank}" for rank in range(num_processes)))
    script.send_signal(signal.SIGTERM)
    time.sleep(0.25)
    script.send_signal(signal.SIGINT)
    _, said = script.communicate(timeout=60)
    assert script.returncode == 0, said
    for rank in range(num_processes):
        assert (folder / f"saved-{rank}").read_text() == "SIGTERM,SIGINT"


@pytest.mark.parametrize("num_processes", NUM_PROCESSES)
def test_the_exit_status_is_the_runs(folder: Path, num_processes: int):
    script = start(folder, "save,7", num_processes=num_processes)
    wait_for(*(folder / f"started-{rank}" for rank in range(num_processes)))
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=60)
    assert script.returncode == 7


def test_a_rank_that_has_stopped_as_asked_leaves_the_other_in_peace(folder: Path):
    """One rank saves, the other waits or leaves: a second SIGTERM would tell the first to give up."""
    script = start(folder, f"rank-0-saves-slowly,{128 + signal.SIGTERM}", num_processes=2)
    wait_for(folder / "started-0", folder / "started-1")
    script.terminate()
    _, said = script.communicate(timeout=60)
    assert (script.returncode, said) == (128 + signal.SIGTERM, "")
    assert (folder / "saved-0").read_text() == "SIGTERM"


@pytest.mark.parametrize("failing", ["0", "1"])
def test_one_rank_that_fails_stops_the_other(folder: Path, failing: str):
    script = start(folder, f"leave,{failing},5", num_processes=2)
    _, said = script.communicate(timeout=60)
    assert script.returncode == 5
    assert f"process {failing} failed (exit status 5): stopping the others" in said
    other = folder / f"saved-{1 - int(failing)}"
    assert not other.exists() or other.read_text() == "SIGTERM"  # it may not have got as far as to listen


def test_a_rank_that_leaves_well_does_not_stop_the_other(folder: Path):
    script = start(folder, "leave,0,0", num_processes=2)
    wait_for(folder / "started-0", folder / "started-1")
    time.sleep(0.5)
    assert script.poll() is None
    assert not (folder / "saved-1").exists()
    script.terminate()
    script.communicate(timeout=60)
    assert script.returncode == 0
    assert (folder / "saved-1").read_text() == "SIGTERM"


@pytest.mark.parametrize("num_processes", NUM_PROCESSES)
def test_arguments_and_environment_arrive_unchanged(folder: Path, num_processes: int):
    arguments = ["--config", "a folder/config.json", "--validation_prompt", 'it\'s "$HOME" *', "leave,0,0"]
    script = start(folder, *arguments, num_processes=num_processes, ENV="examples/x")
    wait_for(*(folder / f"started-{rank}" for rank in range(num_processes)))
    script.terminate()
    script.communicate(timeout=60)
    for rank in range(num_processes):
        assert (folder / f"started-{rank}").read_text() == repr(["train", *arguments]) + "examples/x"


def test_one_process_is_the_script_itself(folder: Path):
    (folder / "simpletuner" / "__main__.py").write_text("import os; print(os.getpid(), 'RANK' in os.environ)")
    for more in ({}, {"TRAINING_NUM_PROCESSES": "1"}, {"ACCELERATE_EXTRA_ARGS": "--num_processes 1"}):
        script = start(folder, **more)
        said, errors = script.communicate(timeout=60)
        assert said.split() == [str(script.pid), "False"], errors


def test_two_ranks_find_each_other(folder: Path):
    (folder / "simpletuner" / "__main__.py").write_text(
        "import torch\n"
        "from simpletuner.training.build import make_accelerator\n"
        "accelerator = make_accelerator()\n"
        "total = accelerator.reduce(torch.tensor([accelerator.process_index + 1.0]))\n"
        "print(f'{accelerator.num_processes} processes, total {total.item()}\\n', end='', flush=True)\n"
        "accelerator.end_training()\n"
    )
    script = start(folder, num_processes=2)
    said, errors = script.communicate(timeout=120)
    assert script.returncode == 0, errors
    assert sorted(said.splitlines()) == ["2 processes, total 3.0"] * 2


def test_a_mistake_in_the_environment_is_one_line(folder: Path):
    script = start(folder, "save,0", TRAINING_NUM_PROCESSES="two")
    _, said = script.communicate(timeout=60)
    assert (script.returncode, said) == (2, "error: num_processes: 'two' must be a whole number, 1 or more\n")


def run_venv_sh(path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs venv.sh with nothing in PATH but the tools it needs and the commands in ``path``."""
    for tool in ("bash", "dirname", "cat", "cksum", "mkdir", "flock", "tee"):
        found = subprocess.run(["bash", "-c", f"command -v {tool}"], capture_output=True, text=True, check=False)
        if found.returncode == 0 and not (path / tool).exists():
            (path / tool).symlink_to(found.stdout.strip())
    command = ["bash", str(ROOT / "venv.sh")]
    return subprocess.run(command, env={"PATH": str(path)} | more, capture_output=True, text=True, check=False)


def make_command(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_an_old_python_is_one_line(tmp_path: Path):
    make_command(tmp_path / "python3", '[ "$1" = --version ] && echo Python 3.9.2; exit 1')
    done = run_venv_sh(tmp_path, VENV_PATH=str(tmp_path / "venv"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Python 3.11 to 3.13 is needed; python3 is Python 3.9.2. Install one and run this again.\n"


def test_a_missing_python3_venv_is_one_line(tmp_path: Path):
    make_command(tmp_path / "python3", 'case "$2" in *ensurepip*) echo no ensurepip >&2; exit 1;; esac')
    done = run_venv_sh(tmp_path, VENV_PATH=str(tmp_path / "venv"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "python3 cannot make environments. On Debian and Ubuntu: sudo apt install python3-venv\n"


def test_an_active_environment_with_an_old_python_is_one_line(tmp_path: Path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    make_command(tmp_path / "venv" / "bin" / "python", '[ "$1" = --version ] && echo Python 3.9.2; exit 1')
    done = run_venv_sh(tmp_path, VIRTUAL_ENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path}/venv has Python 3.9.2, not Python 3.11 to 3.13: ")
    assert len(done.stderr.splitlines()) == 1


def test_an_environment_that_is_up_to_date_is_left_alone():
    first = subprocess.run(
        ["bash", ROOT / "venv.sh"], env=environment(ROOT), capture_output=True, text=True, check=True
    )
    again = subprocess.run(
        ["bash", ROOT / "venv.sh"], env=environment(ROOT), capture_output=True, text=True, check=True
    )
    assert first.stdout == again.stdout == f"{sys.prefix}/bin/python\n"
    assert again.stderr == ""
