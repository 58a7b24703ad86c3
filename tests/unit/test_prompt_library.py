import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.errors import UserError
from simpletuner.config.validation import ValidationSection
from simpletuner.prompt_library import Wish, read_library, wishes


def library(tmp_path: Path, entries: Any) -> Path:
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    return tmp_path / "prompts.json"


def test_an_entry_is_a_prompt_or_says_what_is_drawn_otherwise(tmp_path: Path) -> None:
    path = library(
        tmp_path,
        {
            "a": " a boat ",
            "b": {
                "prompt": "a tree",
                "negative_prompt": "blur",
                "guidance": 4,
                "seed": 7,
                "resolution": "64x96,128",
            },
        },
    )
    assert read_library(path) == [Wish("a boat"), Wish("a tree", "blur", 4.0, 7, ((64, 96), (128, 128)))]


def test_the_config_s_own_prompt_comes_first_and_each_is_drawn_once(tmp_path: Path) -> None:
    path = library(tmp_path, {"a": "a boat", "b": {"prompt": "a tree", "seed": 3}})
    section = ValidationSection(validation_prompt="a tree", user_prompt_library=path, validation_prompt_library=True)
    found = wishes(section)
    assert found[:2] == [Wish("a tree"), Wish("a boat")]
    assert len(found) == 2 + 12
    assert len({wish.prompt for wish in found}) == len(found)
    assert wishes(ValidationSection()) == []


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (7, "needs a prompt"),
        ({"promt": "a"}, "unknown key 'promt' - did you mean 'prompt'?"),
        ({"prompt": "a", "guidance": "high"}, 'guidance: "high" is no number from 0 on'),
        ({"prompt": "a", "seed": -1}, "seed: -1 is no whole number from 0 on"),
        ({"prompt": "a", "seed": True}, "seed: true is no whole number"),
        ({"prompt": "a", "negative_prompt": 1}, "negative_prompt: 1 is not text"),
        ({"prompt": "a", "resolution": "wide"}, "resolution: 'wide'"),
    ],
)
def test_mistakes_are_one_line_each(tmp_path: Path, entry: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_library(library(tmp_path, {"fine": "a", "odd": entry}))
    assert any(said.startswith(f"user_prompt_library: 'odd': {line}") for said in caught.value.lines)


@pytest.mark.parametrize("text", ["[]", "{}", '["a"]', "{"])
def test_a_file_of_another_form_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=r"^user_prompt_library: '.*p.json' is no"):
        read_library(tmp_path / "p.json")
