"""What reading a config found: problems, which are raised all at once, and notices, which the plan prints."""

from dataclasses import dataclass, field

from simpletuner.config.errors import UserError


@dataclass(frozen=True)
class Findings:
    """Lines collected while reading; the lists grow, so one object serves one call of ``load``."""

    problems: list[str] = field(default_factory=list[str])
    notices: list[str] = field(default_factory=list[str])

    def raise_problems(self) -> None:
        """Raises every problem found so far, each line once.

        Raises:
            UserError: There is a problem.
        """
        if self.problems:
            raise UserError(*dict.fromkeys(self.problems))
