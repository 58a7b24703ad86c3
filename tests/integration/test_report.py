"""`report.html` of a run: what stands on it, what does not, and that it stops nothing."""

import logging
from pathlib import Path

import pytest

from tests.integration.conftest import Project


def test_the_page_of_a_run(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_NAME", "hunter2hunter2")
    project.train(validation_prompt="a {env:SECRET_NAME} picture", validation_step_interval=1, disable_benchmark=True)
    page = (project.output / "report.html").read_text(encoding="utf8")
    assert "a {env:SECRET_NAME} picture" in page
    assert "hunter2" not in page
    assert "2 of 2" in page
    assert '"moments": ["step 1, 4 steps", "step 2, 4 steps"]' in page
    assert "load_lora_weights" in page  # the code of the card
    assert page.count('class="thumbs"') == 3  # buckets
    assert page.count("title=") >= 6  # their images


def test_a_page_that_cannot_be_written_ends_no_run(project: Project, caplog: pytest.LogCaptureFixture):
    (project.output / "report.html").mkdir(parents=True)
    caplog.set_level(logging.WARNING)
    state = project.train(validation_disable=True)
    assert state.finished
    assert "report.html could not be written" in caplog.text
    assert (project.output / "pytorch_lora_weights.safetensors").is_file()
    assert not list(Path(project.output).glob(".writing-*"))
