"""What a person sees of a run."""

import io
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from simpletuner.hooks.progress import ProgressHook, duration


@dataclass
class State:
    step: int = 0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    """A run of 1 s a step that logs every ``logging_steps``, with pauses after some steps."""

    num_steps: int = 1000
    logging_steps: int = 10
    terminal: bool = False
    clock: Clock = field(default_factory=Clock)
    out: io.StringIO = field(default_factory=io.StringIO)

    def go(self, num_steps: int, first: int = 0, pauses: dict[int, float] | None = None, **row: float) -> ProgressHook:
        console = Console(file=self.out, force_terminal=self.terminal, width=200)
        hook = ProgressHook(self.num_steps, samples_per_step=4, console=console, clock=self.clock)
        state = State(first)
        hook.on_start(state)
        self.clock.now += 500  # loading and compiling before and in the first step
        for _ in range(num_steps):
            state.step += 1
            self.clock.now += 1
            hook.on_step(state, row if state.step % self.logging_steps == 0 else None)
            self.clock.now += (pauses or {}).get(state.step, 0)
        hook.on_end(state)
        return hook


def test_plain_lines_come_every_ten_seconds_with_the_numbers() -> None:
    run = Run()
    run.go(30, loss=0.12345, grad_norm=0.5678, learning_rate=1e-4)
    assert run.out.getvalue().splitlines() == [
        "step 10/1000  loss 0.1235  grad norm 0.568  lr 1.00e-04  4 samples/s  16 min 30 s left",
        "step 20/1000  loss 0.1235  grad norm 0.568  lr 1.00e-04  4 samples/s  16 min 20 s left",
        "step 30/1000  loss 0.1235  grad norm 0.568  lr 1.00e-04  4 samples/s  16 min 10 s left",
    ]


def test_fast_steps_do_not_flood_the_log_and_the_last_step_is_said() -> None:
    run = Run(num_steps=26, logging_steps=1)
    run.go(26, loss=1.0)
    assert [line.split()[1] for line in run.out.getvalue().splitlines()] == ["1/26", "11/26", "21/26", "26/26"]
    assert run.out.getvalue().splitlines()[-1].endswith("0 s left")


def test_start_up_validation_and_checkpoints_do_not_stretch_the_time_left() -> None:
    run = Run()
    run.go(200, pauses={50: 90, 100: 90, 150: 90, 175: 300, 180: 0}, loss=1.0)
    assert run.out.getvalue().splitlines()[-1] == "step 200/1000  loss 1.0000  4 samples/s  13 min 20 s left"


def test_a_resumed_run_counts_from_its_step() -> None:
    run = Run()
    run.go(20, first=900, loss=1.0)
    assert run.out.getvalue().splitlines()[-1] == "step 920/1000  loss 1.0000  4 samples/s  1 min 20 s left"


def test_nothing_is_guessed_before_the_pace_is_known() -> None:
    run = Run(logging_steps=1)
    run.go(1, loss=2.0)
    assert run.out.getvalue() == "step 1/1000  loss 2.0000\n"


def test_plain_lines_are_ascii_without_control_characters() -> None:
    run = Run()
    run.go(30, loss=float("nan"), grad_norm=1e9)
    assert all(32 <= ord(character) < 127 or character == "\n" for character in run.out.getvalue())


def test_a_terminal_gets_a_bar_with_the_same_numbers() -> None:
    run = Run(num_steps=30, terminal=True)
    run.go(30, loss=0.12345, grad_norm=0.5, learning_rate=1e-4)
    shown = run.out.getvalue()
    assert "30/30" in shown
    assert "loss 0.1235  grad norm 0.5  lr 1.00e-04  4 samples/s  0 s left" in shown
    assert "step 30/30" not in shown


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-1, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (7265, "2 h 01 min"), (93_600, "1 d 02 h")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
