"""Tells other programs how a run goes on: JSON to a url, or messages to Discord (``webhook_config``).

A thread sends; what waits is bounded, and a hook that does not answer delays nothing and stops nothing. The url is a
secret: it is in no log, card or upload.
"""

import json
import logging
import queue
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr, ValidationError

from simpletuner.config.errors import UserError
from simpletuner.config.fields import Section, setting
from simpletuner.config.files import read_json
from simpletuner.config.findings import Findings
from simpletuner.config.values import fill
from simpletuner.training.metrics import Row
from simpletuner.training.state import TrainState

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 5
_TIMEOUT_SECONDS = 15.0
_MOST_WAITING = 64
_MOST_PICTURES = 10
"""What Discord takes with one message."""

Event = Literal["start", "checkpoint", "validation", "end", "failure"]


class WebhookConfig(Section):
    """One place that is told."""

    webhook_type: Literal["raw", "discord"] = setting("raw", "free", "raw: an object of JSON; discord: a message.")
    webhook_url: SecretStr = setting(..., "free", "Where to; {env:NAME} keeps it out of the file.")
    message_prefix: str = setting("", "free", "Stands before each message.")


def read_hooks(path: Path, environ: Mapping[str, str]) -> list[WebhookConfig]:
    """Returns the hooks of a JSON file: an object, or a list of them. Raises UserError for each mistake."""

    def named(name: str) -> str | None:
        return environ.get(name.removeprefix("env:"), "") if name.startswith("env:") else None

    written = fill(read_json(path, "webhook_config"), named, "webhook_config", Findings())
    found: list[WebhookConfig] = []
    for entry in written if isinstance(written, list) else [written]:
        own = dict(entry) if isinstance(entry, dict) else {}
        own.pop("log_level", None)  # upstream's: how much is told; here each event is told once
        own["webhook_url"] = own.pop("callback_url", None) or own.get("webhook_url")
        try:
            made = WebhookConfig.model_validate(own)
        except ValidationError as error:
            lines = (f"webhook_config: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(*lines) from error
        if not made.webhook_url.get_secret_value().startswith(("http://", "https://")):
            raise UserError("webhook_config: webhook_url: a url of http or https is required")
        found.append(made)
    return found


@dataclass
class Webhook:
    """A hook of the main process, and the sender behind it."""

    config: WebhookConfig
    about: Mapping[str, Any]  # Any: JSON
    """What every message says of the run."""
    pictures: Path
    """The folder of the validation."""
    checkpoint_step_interval: int = 0
    first_pause_seconds: float = 1.0
    _waiting: "queue.Queue[tuple[Event, dict[str, Any], list[Path]] | None]" = field(
        default_factory=lambda: queue.Queue(_MOST_WAITING), repr=False
    )
    _thread: threading.Thread | None = field(default=None, repr=False)
    _drawn: frozenset[str] = frozenset()

    def on_start(self, state: TrainState) -> None:
        """Tells that the run begins."""
        self._drawn = self._columns()
        self.tell("start", {"step": state.step})

    def on_step(self, state: TrainState, row: Row | None) -> None:
        """Tells of checkpoints and of new pictures."""
        if self.checkpoint_step_interval and state.step % self.checkpoint_step_interval == 0:
            self.tell("checkpoint", {"step": state.step})
        new = self._columns() - self._drawn
        if new:
            self._drawn |= new
            files = sorted(path for name in new for path in (self.pictures / name).glob("*.png"))
            self.tell("validation", {"step": state.step, "loss": (row or {}).get("loss")}, files[:_MOST_PICTURES])

    def on_end(self, state: TrainState) -> None:
        """Tells that the run ended, or was stopped."""
        self.tell("end", {"step": state.step, "stopped_by": state.stopped_by.name if state.stopped_by else None})

    def tell(self, event: Event, facts: dict[str, Any], files: Sequence[Path] = ()) -> None:
        """Puts a message into the queue; when it is full the message is dropped, and that is said."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="webhook", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((event, {**self.about, **facts}, list(files)))
        except queue.Full:
            _LOG.warning("webhook: too much is waiting; '%s' is not told", event)

    def leave(self, kind: object, error: BaseException | None, *_: object) -> None:
        """Tells of the failure that ends the run, if one does, and waits until all is told."""
        if error is not None:
            reason = error.lines[0] if isinstance(error, UserError) else type(error).__name__
            self.tell("failure", {"reason": reason})
        self.close()

    def close(self, seconds: float = 30.0) -> None:
        """Waits, but not for long, until all has been told."""
        if self._thread is not None:
            try:
                self._waiting.put(None, timeout=seconds)
            except queue.Full:
                return
            self._thread.join(seconds)
            self._thread = None

    def _columns(self) -> frozenset[str]:
        return frozenset(path.name for path in self.pictures.glob("*") if path.is_dir())

    def _send_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            self._send(*item)

    def _send(self, event: Event, facts: dict[str, Any], files: list[Path]) -> None:
        """Sends one message, again after growing pauses where that may help; says when it was in vain."""
        pause, reason = self.first_pause_seconds, ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                content, kind = self._message(event, facts, files)
                headers = {"Content-Type": kind, "User-Agent": "simpletuner"}
                request = urllib.request.Request(self.config.webhook_url.get_secret_value(), content, headers)
                with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
                    return
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, ValueError) as error:
                reason = type(error).__name__  # its text may have the url
        _LOG.warning("webhook: '%s' could not be told: %s", event, reason)

    def _message(self, event: Event, facts: dict[str, Any], files: list[Path]) -> tuple[bytes, str]:
        """Returns the content of a request and its type."""
        text = f"{self.config.message_prefix} {_sentence(event, facts)}".strip()
        if self.config.webhook_type == "raw":
            return json.dumps({"event": event, "message": text, **facts}).encode(), "application/json"
        payload = json.dumps({"content": text, "allowed_mentions": {"parse": []}}).encode()
        return _form(payload, [path for path in files if path.is_file()])


def _sentence(event: Event, facts: Mapping[str, Any]) -> str:
    run, step = facts.get("run", "run"), f"step {facts.get('step', 0)} of {facts.get('max_steps', '?')}"
    match event:
        case "start":
            return f"{run} begins at {step}"
        case "checkpoint":
            return f"{run}: a checkpoint of {step}"
        case "validation":
            return f"{run}: pictures of {step}"
        case "end":
            stopped = facts.get("stopped_by")
            return f"{run}: stopped by {stopped} after {step}" if stopped else f"{run} is finished: {step}"
        case "failure":
            return f"{run} failed: {facts.get('reason', '')}"


def _form(payload: bytes, files: Sequence[Path]) -> tuple[bytes, str]:
    """Returns a form with the payload and files, and its type."""
    boundary = secrets.token_hex(16)
    parts = [(b'name="payload_json"', b"application/json", payload)]
    parts += [
        (f'name="files[{number}]"; filename="{path.name}"'.encode(), b"image/png", path.read_bytes())
        for number, path in enumerate(files)
    ]
    body = b"".join(
        b"--%s\r\nContent-Disposition: form-data; %s\r\nContent-Type: %s\r\n\r\n%s\r\n"
        % (boundary.encode(), name, kind, content)
        for name, kind, content in parts
    )
    return body + b"--%s--\r\n" % boundary.encode(), f"multipart/form-data; boundary={boundary}"
