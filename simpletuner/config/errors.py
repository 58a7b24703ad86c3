"""What a user wrote wrongly: one error type, printed as plain lines with exit status 2."""

import difflib
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in what the user wrote; each line names the key, the value, what is allowed and what to change."""

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(printable(line) for line in lines)
        super().__init__("\n".join(self.lines))


class SaidElsewhere(Exception):
    """Another process of the run has found a mistake and says it; this one ends without a word."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns ``" - did you mean 'x'?"`` for the known word nearest to a misspelt one, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" - did you mean '{nearest[0]}'?" if nearest else ""


def printable(line: str) -> str:
    """Returns a line without control characters, so that a file from elsewhere cannot steer the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


class Problems:
    """Collects the lines of all mistakes, so that a user sees them at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Returns the action's result, or None when it raised a UserError, whose lines are kept."""
        try:
            return action()
        except UserError as error:
            self.lines.extend(error.lines)
            return None

    def raise_any(self) -> None:
        """Raises one UserError with all lines, if there are any."""
        if self.lines:
            raise UserError(*dict.fromkeys(self.lines))
