"""What a run changes while it trains, and the request to stop it."""

import signal
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import torch

from simpletuner.data.sampler import Position


@dataclass
class TrainState:
    """The only mutable thing of a run besides tensors, and the only thing that a resumed run restores with them."""

    max_steps: int
    """Optimizer steps of the whole run."""
    step: int = 0
    """Optimizer steps made so far."""
    samples: int = 0
    """Samples trained on so far by all ranks, filler left out."""
    position: Position | None = None
    """Where the data goes on; None at the start."""
    stopped_by: signal.Signals | None = None
    """The signal that ended this process before the last step."""

    @property
    def finished(self) -> bool:
        """Whether the last step has been made."""
        return self.step >= self.max_steps


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request, honoured at a step boundary; the second one kills."""

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}  # Any: signal.getsignal has no narrower type

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, self._previous[signal.Signals(number)])

    def agreed(self, group: torch.distributed.ProcessGroup | None) -> signal.Signals | None:
        """Returns the signal that any rank has received, the same on all ranks, or None.

        Args:
            group: A gloo group of all ranks: the question costs 0.2 ms of the host and never waits for a device.
                None for a single process.
        """
        received = self._received
        if group is not None:
            number = torch.tensor(received)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=group)
            received = int(number)
        return signal.Signals(received) if received else None
