"""Whatever a user writes, the answer is a Config or lines that tell the mistake; never another exception."""

import json
import tempfile
from collections.abc import Mapping
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


def answer(
    config: object, backend: object, overrides: Mapping[str, str] | None = None
) -> tuple[Config | None, tuple[str, ...]]:
    """Returns the config, or None and the lines that tell the mistakes; exactly one of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
        (folder / "multidatabackend.json").write_text(json.dumps(backend), encoding="utf8")
        loaded, lines = None, ()
        try:
            loaded = load(folder, overrides, {}, folder)
        except UserError as error:
            lines = error.lines
    assert (loaded is None) == bool(lines)
    assert all(line.isprintable() for line in lines), lines
    return loaded, lines


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_config(values: dict[str, object]) -> None:
    config, _ = answer({**MINIMAL, **values}, [IMAGES])
    if config is not None:
        json.dumps(config.flat(), allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(DATASET_KEYS, VALUES, max_size=4).map(lambda entry: {**IMAGES, **entry}), max_size=2))
@example([{**IMAGES, "dataset_type": "text_embeds", "cache_dir": 3}, IMAGES])
def test_any_backend_file(entries: list[object]) -> None:
    config, _ = answer(MINIMAL, entries)
    assert config is None or config.datasets


@settings(max_examples=30, deadline=None)
@given(VALUES, VALUES)
def test_any_shape(config: object, backend: object) -> None:
    answer(config, [IMAGES])
    answer(MINIMAL, backend)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, st.text(max_size=8) | WORDS, max_size=3))
def test_any_override(overrides: dict[str, str]) -> None:
    config, _ = answer(MINIMAL, [IMAGES], overrides)
    assert config is None or config.datasets
