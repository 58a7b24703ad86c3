"""The command that the page shows, run as it stands."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from simpletuner import cli
from simpletuner.convert.page import PATH

(COMMAND,) = re.findall(r"```bash\n(.*?)```", PATH.read_text(encoding="utf8"), re.DOTALL)


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int | str | None:
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_the_command_of_the_page_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, shlex.split(COMMAND)) == 0
    assert "bash train.sh --config config/converted\n" in capsys.readouterr().out
    config = json.loads((tmp_path / "config" / "converted" / "config.json").read_text())
    assert config["distillation_config"]["lcm"]["loss_type"] == "huber"
    (entry,) = json.loads((tmp_path / "config" / "converted" / "multidatabackend.json").read_text())
    assert entry["shards"] == "https://example.org/shards/{00000..00099}.tar"


def test_what_is_printed_is_what_would_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, shlex.split(COMMAND))
    capsys.readouterr()
    name, verb, _, _, command = shlex.split(COMMAND)
    assert run(monkeypatch, [name, verb, command]) == 0
    printed = capsys.readouterr().out
    for file in ("config.json", "multidatabackend.json"):
        assert (tmp_path / "config" / "converted" / file).read_text() in printed


def test_a_mistake_is_a_line_and_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, ["simpletuner", "convert-command", "accelerate launch other.py"]) == 2
    assert capsys.readouterr().err.startswith("error: convert-command: no command line of these scripts")
