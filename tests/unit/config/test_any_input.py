"""Whatever a user writes, the answer is a Config or lines that tell the mistake; never another exception."""

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from simpletuner.config import Config, UserError, load
from simpletuner.config.deprecated import ALIASES, CONFIG_KEYS
from simpletuner.config.schema import DatasetConfig, section_of
from tests.unit.config.conftest import IMAGES, MINIMAL

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(
    ["none", "true", "area", "{env:X}", "{", "[1,", "{id}", "1e999", "nan", "-1", "a=b,c", "/", "~", "1x"]
)
VALUES = st.recursive(
    SCALARS | WORDS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)
KEYS = st.sampled_from([*section_of(), *ALIASES, *sorted(CONFIG_KEYS)[::10], "--seed", "unknown", "_c", ""])
DATASET_KEYS = st.sampled_from(
    [
        *DatasetConfig.model_fields,
        "disabled",
        "default",
        "cache_dir",
        "text_embeds",
        "image_embeds",
        "unknown",
        "_c",
        "",
    ]
)


def answer(config: object, backend: object) -> Config | None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
        (folder / "multidatabackend.json").write_text(json.dumps(backend), encoding="utf8")
        try:
            return load(folder, {}, {}, folder)
        except UserError as error:
            assert error.lines
            assert all(line.isprintable() for line in error.lines), error.lines
            return None


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_config(values: dict[str, object]) -> None:
    config = answer({**MINIMAL, **values}, [IMAGES])
    if config is not None:
        json.dumps(config.flat(), allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(DATASET_KEYS, VALUES, max_size=4).map(lambda entry: {**IMAGES, **entry}), max_size=2))
@example([{**IMAGES, "dataset_type": "text_embeds", "cache_dir": 3}, IMAGES])
def test_any_backend_file(entries: list[object]) -> None:
    config = answer(MINIMAL, entries)
    assert config is None or config.datasets


@settings(max_examples=30, deadline=None)
@given(VALUES, VALUES)
def test_any_shape(config: object, backend: object) -> None:
    answer(config, [IMAGES])
    answer(MINIMAL, backend)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, st.text(max_size=8) | WORDS, max_size=3))
def test_any_override(overrides: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "config.json").write_text(json.dumps(MINIMAL), encoding="utf8")
        (folder / "multidatabackend.json").write_text(json.dumps([IMAGES]), encoding="utf8")
        try:
            assert load(folder, overrides, {}, folder).datasets
        except UserError as error:
            assert error.lines
