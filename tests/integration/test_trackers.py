"""What trackers store of a run, read back from the files of the real libraries."""

import importlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.hooks import tracking
from simpletuner.hooks.tracking import Trackers, start_trackers
from simpletuner.training import metrics
from tests.integration.conftest import Project

SECRET = "s3cr3t-4711"


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STYLE", SECRET)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the library, on a machine that keeps its runs."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = pytest.importorskip("wandb")
    found.teardown()
    return found


def tensorboard_of(project: Project) -> Any:
    """Returns what TensorBoard itself shows of a run."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = (project.output / "tensorboard").iterdir()
    shown = accumulators.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return shown.Reload()


def wandb_records(path: Path) -> list[Any]:
    """Returns the records of an offline run: a LevelDB log of protocol buffers after seven bytes."""
    record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content, records, waiting, at = path.read_bytes(), [], b"", 7
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        waiting += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = record_type()
            record.ParseFromString(waiting)
            records.append(record)
            waiting = b""
    return records


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """Returns the logged values of an offline run, in order."""
    rows = [record.history.item for record in wandb_records(path) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def test_a_run_and_what_resumes_it_are_one_curve_in_both_trackers(project: Project, wandb: Any):
    changes: dict[str, Any] = {
        "report_to": "tensorboard,wandb",
        "tracker_project_name": "few steps",
        "tracker_run_name": "a/../run",
        "validation_prompt": "{env:STYLE} on a picture",
        "model_card_note": "{env:STYLE}",
        "logging_steps": 2,  # pictures of step 1 are there before its numbers
        "validation_step_interval": 1,
        "disable_benchmark": True,
    }
    project.train(**changes, max_train_steps=2)
    project.train(max_train_steps=3)
    expected = metrics.read(project.output / metrics.FILE_NAME)
    assert [row["step"] for row in expected] == [1, 2, 3]

    shown = tensorboard_of(project)
    assert (project.output / "tensorboard" / "a-..-run").is_dir()
    for name in ("loss", "learning_rate", "samples_per_second"):
        events = shown.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx([row[name] for row in expected])
    assert [event.step for event in shown.Images("trained/picture-0")] == [1, 2, 3]
    assert (shown.Images("trained/picture-0")[0].width, shown.Images("trained/picture-0")[0].height) == (64, 64)

    first, second = sorted((project.output / "wandb").glob("offline-run-*/*.wandb"))
    (begun,) = (record.run for record in wandb_records(first) if record.WhichOneof("record_type") == "run")
    (resumed,) = (record.run for record in wandb_records(second) if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name) == ("few steps", "a/../run")
    assert begun.run_id == resumed.run_id
    rows = [*wandb_history(first), *wandb_history(second)]
    assert [row["_step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected])
    assert [row["trained/picture-0/count"] for row in rows] == [1, 1, 1]
    (drawn,) = (project.output / "validation" / "step-000001").glob("*.png")
    stored = Image.open(first.parent / "files" / rows[0]["trained/picture-0/filenames"][0])
    assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(Image.open(drawn).convert("RGB")))

    settings = {
        update.key: json.loads(update.value_json)
        for record in wandb_records(first)
        if record.WhichOneof("record_type") == "config"
        for update in record.config.update
    }
    assert settings["learning_rate"] == 1e-2
    assert settings["model_card_note"] == "{env:STYLE}"
    files = [path for name in ("wandb", "tensorboard") for path in (project.output / name).rglob("*")]
    assert not [path for path in files if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not [path for path in files if SECRET in path.name]


def test_what_a_killed_run_logged_after_its_checkpoint_is_replaced(project: Project):
    """From the very beginning too, where there was no checkpoint yet."""
    config = load(project.write(report_to="tensorboard"))
    for loss, begins, last in ((9.0, 0, 6), (0.0, 0, 3), (1.0, 1, 4)):
        trackers = start_trackers(config, begins)
        trackers.rows([{"step": step, "loss": loss} for step in range(begins + 1, last + 1)])
        trackers.finish()
        time.sleep(1.1)  # the files are read in the order of their names, which count seconds
    events = tensorboard_of(project).Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]


def test_pictures_wait_for_the_numbers_of_their_step(tmp_path: Path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 4)).save(path)
    logged: list[Any] = []

    class Tracker:
        name = "another"

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def log_images(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, {name: value.shape for name, value in values.items()}))

    tracker: Any = Tracker()
    trackers = Trackers([tracker], 0)
    trackers.pictures(0, {"base": path})
    trackers.pictures(2, {"trained": path})
    trackers.rows([{"step": step, "loss": 0.5} for step in (1, 2, 3)])
    numbers, shape = {"loss": 0.5}, (1, 4, 8, 3)
    assert logged == [(0, {"base": shape}), (1, numbers), (2, numbers), (2, {"trained": shape}), (3, numbers)]


def test_a_new_run_has_a_new_id(project: Project, wandb: Any):
    config = load(project.write(report_to="wandb"))
    ids: list[str] = []
    for step in (0, 5, 0):
        start_trackers(config, step).finish()
        ids.append(json.loads((project.output / tracking.IDS).read_text())["wandb"])
    assert ids[0] == ids[1] != ids[2]


def test_wandb_without_a_login_is_one_line_before_any_work(
    project: Project, wandb: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(UserError, match=r"report_to: nobody is logged in at wandb: .*WANDB_MODE=offline"):
        project.train(report_to="wandb", cache_dir=str(tmp_path / "own-cache"))
    assert not list((tmp_path / "own-cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "advice"), [("wandb", 'pip install "simpletuner[wandb]"'), ("comet_ml", "pip install comet-ml")]
)
def test_a_missing_package_names_what_to_install(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, advice: str
):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(UserError) as caught:
        start_trackers(load(project.write(report_to=name)), 0)
    assert caught.value.lines == (f"report_to: '{name}' needs its package: {advice}",)


def test_trackio_stores_rows_pictures_and_options_of_one_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    options = {
        "report_to": "trackio",
        "tracker_project_name": "few-steps",
        "validation_prompt": "a red picture",
        "validation_step_interval": 1,
        "disable_benchmark": True,
        "checkpoint_step_interval": 1,
        "model_card_note": "{env:STYLE}",
    }
    project.train(**options, max_train_steps=2)
    project.train(**options, max_train_steps=3)
    expected = metrics.read(project.output / metrics.FILE_NAME)
    folder = Path(importlib.import_module("trackio.utils").TRACKIO_DIR)
    with sqlite3.connect(folder / "few-steps.db") as base:
        stored = base.execute("select run_id, step, metrics from metrics order by id").fetchall()
        ((settings,),) = base.execute("select config from configs").fetchall()
    assert len({run for run, _, _ in stored}) == 1
    rows = [(step, json.loads(values)) for _, step, values in stored]
    losses = [(step, values["loss"]) for step, values in rows if "loss" in values]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in expected]
    pictures = [(step, value) for step, values in rows for key, value in values.items() if key.startswith("trained/")]
    assert [step for step, _ in pictures] == [1, 2, 3]
    (drawn,) = (project.output / "validation" / "step-000001").glob("*.png")
    kept = Image.open(folder / "media" / pictures[0][1]["file_path"])
    assert np.array_equal(np.asarray(kept.convert("RGB")), np.asarray(Image.open(drawn).convert("RGB")))
    assert json.loads(settings)["learning_rate"] == 1e-2
    assert json.loads(settings)["model_card_note"] == "{env:STYLE}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def documented_tracker() -> str:
    page = (Path(__file__).parents[2] / "documentation" / "PUBLISHING.md").read_text()
    return page.partition("```python\nfrom accelerate.tracking")[2].partition("```")[0]


def test_the_documented_tracker_of_ones_own_runs(project: Project):
    folder = project.folder / "custom-trackers"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text("from accelerate.tracking" + documented_tracker())
    project.train(
        report_to="custom-tracker",
        custom_tracker="mine",
        validation_prompt="a red picture",
        validation_step_interval=1,
        disable_benchmark=True,
        model_card_note="{env:STYLE}",
    )
    settings, *lines = (project.output / "custom-tracker" / "rows.txt").read_text().splitlines()
    assert "'model_card_note': '{env:STYLE}'" in settings
    assert SECRET not in settings
    expected = [row["loss"] for row in metrics.read(project.output / metrics.FILE_NAME)]
    assert [(line.split()[0], line.split()[1]) for line in lines] == [
        ("1", f"{expected[0]}"),
        ("1", lines[1].split()[1]),
        ("2", f"{expected[1]}"),
        ("2", lines[3].split()[1]),
    ]
    assert "trained/a-red-picture" in lines[1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("import this_is_not_there", "fails: ModuleNotFoundError: No module named 'this_is_not_there'"),
        ("x = 1", "needs one subclass of accelerate's GeneralTracker, has none"),
        ("from accelerate.tracking import GeneralTracker as G\nclass A(G): ...\nclass B(G): ...", "has A, B"),
        (
            "from accelerate.tracking import GeneralTracker as G\nclass A(G):\n    def __init__(self, mine): ...",
            "A cannot be made: TypeError",
        ),
    ],
)
def test_a_tracker_of_ones_own_that_does_not_work_is_one_line(project: Project, code: str, said: str):
    path = project.folder / "mine.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    with pytest.raises(UserError) as caught:
        project.train(report_to="custom-tracker", custom_tracker="mine.py")
    (line,) = caught.value.lines
    assert line.startswith("custom_tracker: ")
    assert said in line


def test_a_tracker_of_ones_own_has_to_be_named(project: Project):
    with pytest.raises(UserError, match="custom_tracker: required by report_to custom-tracker"):
        load(project.write(report_to="custom-tracker"))
    with pytest.raises(UserError, match="custom_tracker: there is no file 'custom-trackers/other.py'"):
        load(project.write(report_to="custom-tracker", custom_tracker="other"))
