"""How the scan and the caching go on, for a person: a plain line every few seconds."""

import logging
import time
from dataclasses import dataclass, field

from simpletuner.hooks.progress import duration

_LOG = logging.getLogger(__name__)
_LINE_SECONDS = 2.0


@dataclass
class CachingProgress:
    """Called as ``progress(done, total, what)``; total is 0 while it is not known."""

    _started: dict[str, float] = field(default_factory=dict[str, float])
    _last_line: float = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        """Says how far ``what`` is, unless a line was written a moment ago and more is to come."""
        now = time.monotonic()
        started = self._started.setdefault(what, now)
        finished = done == total
        if not finished and now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        if finished:
            del self._started[what]
            _LOG.info("%s: %d in %s", what, done, duration(now - started))
        elif total and done:
            _LOG.info("%s: %d of %d, %s left", what, done, total, duration((now - started) * (total - done) / done))
        else:
            _LOG.info("%s: %d so far", what, done)
