"""Runs ``simpletuner`` once per rank: train.sh calls ``python -m simpletuner.launch train ...`` for several processes.

A signal sent to this process reaches every rank, once, and the ranks have all the time they need to save; the exit
status is theirs. Neither launcher at hand does that (torch 2.13, accelerate 1.15; documentation/LOG.md): torchrun
forwards the signal, but ends with a traceback and status 1 even when every rank saved and left with 0, and by default
kills after 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT); accelerate launch runs torchrun, or on a CPU one process for two.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from simpletuner.config.environment import VARIABLES, accelerate_file, parse_accelerate
from simpletuner.config.errors import UserError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
STOP_SECONDS = 30
"""How long the other ranks may take to stop after one failed: mostly they wait for the dead one and cannot save."""

_DISTRIBUTED_TYPES = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU")
_TOPOLOGY = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")
_ENVIRONMENT = {"TRAINING_NUM_PROCESSES": "num_processes", "TRAINING_NUM_MACHINES": "num_machines"}
_PASSED_ON = {key: name for name, key in VARIABLES.items()} | {"num_cpu_threads_per_process": "OMP_NUM_THREADS"}


@dataclass(frozen=True)
class Launch:
    """What to start on this machine."""

    num_processes: int
    """On all machines together."""
    environments: tuple[dict[str, str], ...]
    """One per process on this machine."""


def plan_launch(environ: Mapping[str, str]) -> Launch:
    """Returns the processes that accelerate's config file, TRAINING_* and ACCELERATE_EXTRA_ARGS ask for.

    Of two that say the same thing the later one in that list wins.

    Raises:
        UserError: A value is no number, does not fit the others, or names something that is not supported.
    """
    extra = _extra_arguments(environ.get("ACCELERATE_EXTRA_ARGS", ""))
    from_environ = {option: environ[name] for name, option in _ENVIRONMENT.items() if environ.get(name)}
    settings = {**_config_file(environ), **from_environ, **extra}
    num_processes = _number(settings, "num_processes", 1, least=1)
    num_machines = _number(settings, "num_machines", 1, least=1)
    machine_rank = _number(settings, "machine_rank", 0, least=0)
    port = _number(settings, "main_process_port", 0, least=0)
    if num_processes % num_machines:
        raise UserError(f"num_processes: {num_processes} cannot be shared evenly by num_machines: {num_machines}")
    if machine_rank >= num_machines:
        raise UserError(f"machine_rank: {machine_rank} must be below num_machines: {num_machines}")
    if num_machines > 1 and not settings.get("main_process_ip"):
        raise UserError(
            f"num_machines: {num_machines} needs the first machine's address:"
            ' ACCELERATE_EXTRA_ARGS="--main_process_ip ADDRESS --machine_rank N"'
        )
    shared = dict(environ) | {_PASSED_ON[key]: value for key, value in extra.items() if key in _PASSED_ON}
    if settings.get("gpu_ids", "all") != "all":
        shared["CUDA_VISIBLE_DEVICES"] = settings["gpu_ids"]
    if settings.get("use_cpu", "").lower() == "true":
        shared["ACCELERATE_USE_CPU"] = "true"
    if num_processes == 1:
        return Launch(1, (shared,))
    num_local = num_processes // num_machines
    first = machine_rank * num_local
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_local)))
    shared |= {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_local),
        "MASTER_ADDR": settings.get("main_process_ip") or "127.0.0.1",
        "MASTER_PORT": str(port or (29500 if num_machines > 1 else _free_port())),
    }
    ranks = ({"LOCAL_RANK": str(local), "RANK": str(first + local)} for local in range(num_local))
    return Launch(num_processes, tuple(shared | rank for rank in ranks))


def run(command: Sequence[str], environments: Sequence[dict[str, str]]) -> int:
    """Runs the command once per environment and returns the exit status: 0, or that of the rank that failed first."""
    pending: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        pending.append(number)

    for number in FORWARDED:
        # nohup ignores SIGHUP so that the run outlives the terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, remember)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            # A process group of its own: Ctrl-C in the terminal reaches this process alone, and the rank only once.
            rank = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
            ranks.append(rank)
        return _supervise(ranks, pending)
    finally:
        _kill(ranks)


def _supervise(ranks: Sequence[subprocess.Popen[bytes]], pending: list[int]) -> int:
    """Returns the exit status when all ranks have ended; forwards pending signals, and stops all when one fails."""
    sent: set[int] = set()
    first = 0
    deadline = float("inf")
    while True:
        while pending:
            sent.add(pending[0])
            _send(ranks, pending.pop(0))
        statuses = [status if status is None or status >= 0 else 128 - status for status in (r.poll() for r in ranks)]
        first = first or next(filter(None, statuses), 0)
        if None not in statuses:
            return first
        # A rank that was told to stop and says so (128 + signal, as a shell counts) has not failed: others still save.
        failed = [status for status in statuses if status and status - 128 not in sent]
        if failed and deadline == float("inf"):
            said = f"process {statuses.index(failed[0])} failed (exit status {failed[0]}): stopping the others"
            print(said, file=sys.stderr)
            _send(ranks, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
        if time.monotonic() > deadline:
            _kill(ranks)
        time.sleep(0.05)


def _send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # does nothing for a rank that has ended


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)  # its data workers too


def _config_file(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns what accelerate's config file says about processes; an empty dict where there is no file."""
    path = accelerate_file(environ)
    content = parse_accelerate(path) if path else None
    if not isinstance(content, dict):
        return {}
    kind = str(content.get("distributed_type") or "NO")  # YAML reads a bare NO as false
    if kind not in _DISTRIBUTED_TYPES:
        raise UserError(f"{path}: distributed_type: {kind} is not supported (known: {', '.join(_DISTRIBUTED_TYPES)})")
    return {key: str(content[key]) for key in (*_TOPOLOGY, "use_cpu") if content.get(key) is not None}


def _extra_arguments(text: str) -> dict[str, str]:
    """Returns the options of ``accelerate launch`` in ACCELERATE_EXTRA_ARGS that have a meaning here."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*_TOPOLOGY, *_PASSED_ON):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    parser.add_argument("--cpu", dest="use_cpu", action="store_const", const="true")
    # True of every run here, so said without effect.
    parser.add_argument("--multi_gpu", "--multi-gpu", action="store_const", const=None)
    parser.add_argument("--same_network", "--same-network", action="store_const", const=None)
    try:
        known, unknown = parser.parse_known_args(shlex.split(text))
    except (argparse.ArgumentError, ValueError) as error:
        raise UserError(f"ACCELERATE_EXTRA_ARGS: {error}") from error
    if unknown:
        allowed = ", ".join(f"--{name}" for name in (*_TOPOLOGY, *_PASSED_ON, "cpu"))
        raise UserError(f"ACCELERATE_EXTRA_ARGS: not supported: {' '.join(unknown)} (known: {allowed})")
    return {key: str(value) for key, value in vars(known).items() if value is not None}


def _number(settings: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = settings.get(name, str(default))
    if not text.strip().isdecimal() or int(text) < least:
        raise UserError(f"{name}: '{text}' must be a whole number, {least} or more")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Runs ``simpletuner`` with this command's arguments: here for one process, once per rank for several."""
    try:
        launch = plan_launch(os.environ)
    except UserError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    command = [sys.executable, "-m", "simpletuner", *sys.argv[1:]]
    if launch.num_processes == 1:
        os.execve(command[0], command, launch.environments[0])
    sys.exit(run(command, launch.environments))


if __name__ == "__main__":
    main()
