"""Two runs cannot share an output_dir."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simpletuner.config.errors import UserError
from simpletuner.training import run_lock

HOLD = """
import os, sys, time, pathlib
from simpletuner.training import run_lock
lock = run_lock.hold(pathlib.Path(sys.argv[1]))
there, here = os.pipe()
worker = os.fork() if "fork" in sys.argv else 1
if worker == 0:
    os.write(here, b".")  # what fork runs in the child has run
    time.sleep(60)
if "fork" in sys.argv:
    os.read(there, 1)
print(worker, flush=True)
time.sleep(60)
"""


def holder(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    """Returns a process that holds the lock, and the id of its worker."""
    command = [sys.executable, "-c", HOLD, str(folder), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_the_second_run_is_told_the_process_of_the_first(tmp_path: Path) -> None:
    process, _ = holder(tmp_path / "new" / "run")
    try:
        with pytest.raises(
            UserError, match=re.escape(f"is in use by another run (process {process.pid} on ")
        ) as raised:
            run_lock.hold(tmp_path / "new" / "run")
        assert len(raised.value.lines) == 1
    finally:
        process.kill()
        process.wait()


def test_the_lock_dies_with_a_killed_process_even_if_its_worker_lives_on(tmp_path: Path) -> None:
    process, worker = holder(tmp_path, "fork")
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(worker, 0)  # raises if the worker is gone, and the test shows nothing
        run_lock.hold(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_release_lets_the_next_one_in(tmp_path: Path) -> None:
    first = run_lock.hold(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        run_lock.hold(tmp_path)
    first.release()
    second = run_lock.hold(tmp_path)
    first.release()  # twice is harmless, and does not open the other's lock
    with pytest.raises(UserError):
        run_lock.hold(tmp_path)
    second.release()


def test_nobody_waits(tmp_path: Path) -> None:
    lock = run_lock.hold(tmp_path)
    start = time.monotonic()
    with pytest.raises(UserError):
        run_lock.hold(tmp_path)
    assert time.monotonic() - start < 1
    lock.release()
