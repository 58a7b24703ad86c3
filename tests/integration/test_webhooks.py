"""A run tells its webhooks, and of its failure too."""

import json

import pytest

from simpletuner.config.errors import UserError
from tests.integration.conftest import Project
from tests.unit.hooks.test_webhook import Listener, listener  # noqa: F401  (a fixture)


def test_a_run_is_told_from_start_to_end_and_one_that_fails_too(project: Project, listener: Listener):  # noqa: F811
    project.folder.mkdir(parents=True)
    (project.folder / "hooks.json").write_text(json.dumps({"webhook_url": listener.url}))
    project.train(webhook_config="hooks.json", validation_prompt="a picture", disable_benchmark=True)
    told = [json.loads(body) for _, body in listener.posted]
    assert [one["event"] for one in told] == ["start", "validation", "end"]
    assert {one["run"] for one in told} == {"output"}
    card = (project.output / "README.md").read_text() + (project.output / "simpletuner.json").read_text()
    assert "secret-token" not in card
    listener.posted.clear()
    with pytest.raises(UserError):
        project.train(learning_rate=1e30, max_train_steps=9, max_grad_norm=0, output_dir=str(project.folder / "two"))
    last = json.loads(listener.posted[-1][1])
    assert last["event"] == "failure"
    assert last["message"].startswith("two failed: the loss is not finite at step ")


def test_a_file_that_is_not_there_is_one_line(project: Project):
    with pytest.raises(UserError, match=r"^webhook_config: there is no file 'none.json' \(looked at: "):
        project.train(webhook_config="none.json")
