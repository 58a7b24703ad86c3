"""Processes that wait for each other, and leave together when one of them finds a mistake."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from simpletuner.config.errors import SaidElsewhere, UserError

_LOG = logging.getLogger(__name__)


@contextmanager
def closing(accelerator: Accelerator) -> Generator[None]:
    """Ends the group of processes at the end of the context, also where a mistake ends it."""
    try:
        yield
    except (UserError, SaidElsewhere):
        accelerator.end_training()
        raise
    accelerator.end_training()


@dataclass(frozen=True)
class Meeting:
    """The barriers of a run until it trains; a process that found a mistake comes to the next one and says so.

    Else the others would wait for one that has left, and end with a traceback about their connection.
    """

    accelerator: Accelerator

    def wait(self) -> None:
        """Returns when all ranks have called it.

        Raises:
            SaidElsewhere: Another rank has found a mistake, which it says.
        """
        if self._first_with_mistake(False) is not None:
            raise SaidElsewhere

    @contextmanager
    def leaving_together(self) -> Generator[None]:
        """Lets a mistake of any rank within the context end all of them; of those who found one, the first says it.

        All that waits for other ranks within the context must do so by ``wait``.
        """
        try:
            yield
        except UserError as error:
            speaker, rank = self._first_with_mistake(True), self.accelerator.process_index
            if speaker not in (None, rank):
                raise SaidElsewhere from error
            if rank > 0:  # the command line prints the first rank's alone
                for line in error.lines:
                    _LOG.error("error: %s", line)
            raise

    def _first_with_mistake(self, mine: bool) -> int | None:
        """Returns the lowest rank that has a mistake, None when none has; every rank asks at the same time."""
        if self.accelerator.num_processes == 1:
            return None
        index = self.accelerator.process_index
        votes = torch.zeros(self.accelerator.num_processes, device=self.accelerator.device)
        votes[index] = float(mine)
        torch.distributed.all_reduce(votes)
        return int(votes.argmax()) if bool(votes.any()) else None
