"""Webhooks against a server on this machine, one that fails, and one that does not answer."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.config.errors import UserError
from simpletuner.hooks.webhook import Webhook, WebhookConfig, read_hooks
from simpletuner.training.state import TrainState


class Listener:
    """What was posted, and the statuses to answer with before the last one, 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.posted: list[tuple[str, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = outer.statuses.pop(0) if outer.statuses else 200
                if status == 200:
                    outer.posted.append((self.headers["Content-Type"], body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-token"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Listener()
    yield made
    made.server.shutdown()


def hook(tmp_path: Path, url: str, **config: Any) -> Webhook:
    settings = WebhookConfig.model_validate({"webhook_url": url, **config})
    return Webhook(settings, {"run": "my-run", "max_steps": 4}, tmp_path, 2, first_pause_seconds=0.01)


def go(webhook: Webhook, folder: Path) -> None:
    """Goes through a run of four steps with pictures at the fourth."""
    state = TrainState(4)
    webhook.on_start(state)
    for step in range(1, 5):
        state.step = step
        if step == 4:
            (folder / "step-000004").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "step-000004" / "a.png")
        webhook.on_step(state, {"loss": 0.5})
    webhook.on_end(state)
    webhook.leave(None, None)


def test_events_are_json_in_their_order(tmp_path: Path, listener: Listener) -> None:
    go(hook(tmp_path, listener.url, message_prefix="[x]"), tmp_path)
    told = [json.loads(body) for kind, body in listener.posted if kind == "application/json"]
    assert [(one["event"], one["step"]) for one in told] == [
        *(("start", 0), ("checkpoint", 2), ("checkpoint", 4), ("validation", 4), ("end", 4)),
    ]
    assert told[0]["message"] == "[x] my-run begins at step 0 of 4"
    assert told[-1]["message"] == "[x] my-run is finished: step 4 of 4"
    assert told[3]["loss"] == 0.5


def test_discord_gets_the_pictures_and_pings_nobody(tmp_path: Path, listener: Listener) -> None:
    go(hook(tmp_path, listener.url, webhook_type="discord"), tmp_path)
    kind, body = next((kind, body) for kind, body in listener.posted if b"pictures of" in body)
    boundary = kind.partition("boundary=")[2].encode()
    parts = [part.strip(b"\r\n").partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)[1:-1]]
    assert json.loads(parts[0][2]) == {
        "content": "my-run: pictures of step 4 of 4",
        "allowed_mentions": {"parse": []},
    }
    assert b'filename="a.png"' in parts[1][0]
    assert parts[1][2] == (tmp_path / "step-000004" / "a.png").read_bytes()


def test_what_may_pass_is_tried_again_and_what_may_not_is_said_once(
    tmp_path: Path, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    listener.statuses = [503, 429, 200, 404]
    webhook = hook(tmp_path, listener.url)
    webhook.tell("start", {})
    webhook.tell("end", {})
    webhook.close()
    assert [json.loads(body)["event"] for _, body in listener.posted] == ["start"]
    assert caplog.messages == ["webhook: 'end' could not be told: status 404"]


def test_a_dead_hook_delays_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    webhook = hook(tmp_path, "http://127.0.0.1:9/secret-token")
    webhook.first_pause_seconds = 0.05
    started = time.perf_counter()
    for _ in range(100):
        webhook.tell("checkpoint", {})
    assert time.perf_counter() - started < 0.5
    assert any("too much is waiting" in message for message in caplog.messages)
    started = time.perf_counter()
    webhook.close(0.2)
    assert time.perf_counter() - started < 1.0
    assert "secret-token" not in caplog.text


def test_a_failure_is_told_with_its_first_line(tmp_path: Path, listener: Listener) -> None:
    webhook = hook(tmp_path, listener.url)
    webhook.leave(UserError, UserError("learning_rate: too high", "more"))
    webhook = hook(tmp_path, listener.url)
    webhook.leave(RuntimeError, RuntimeError("/home/me/secret"))
    assert [json.loads(body)["message"] for _, body in listener.posted] == [
        *("my-run failed: learning_rate: too high", "my-run failed: RuntimeError"),
    ]


def test_a_file_names_one_or_several(tmp_path: Path) -> None:
    path = tmp_path / "hooks.json"
    path.write_text(json.dumps({"webhook_type": "raw", "callback_url": "https://a.example/x", "log_level": "info"}))
    (one,) = read_hooks(path, {})
    assert one.webhook_url.get_secret_value() == "https://a.example/x"
    assert "a.example" not in repr(one)
    path.write_text(json.dumps([{"webhook_url": "{env:HOOK}", "webhook_type": "discord"}] * 2))
    assert [h.webhook_url.get_secret_value() for h in read_hooks(path, {"HOOK": "https://d.example"})] == [
        *("https://d.example", "https://d.example"),
    ]


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ({"webhook_type": "slack", "webhook_url": "https://x"}, "webhook_config: webhook_type: "),
        ({}, "webhook_config: webhook_url: "),
        ({"webhook_url": "ftp://x"}, "webhook_config: webhook_url: a url of http or https is required"),
        ({"webhook_url": "{env:NOT_SET}"}, "webhook_config: webhook_url: a url of http or https is required"),
        ({"webhook_url": "https://x", "colour": 1}, "webhook_config: colour: "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, written: Any, line: str) -> None:
    (tmp_path / "hooks.json").write_text(json.dumps(written))
    with pytest.raises(UserError) as caught:
        read_hooks(tmp_path / "hooks.json", {})
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(line)
