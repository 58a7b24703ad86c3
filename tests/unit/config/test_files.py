from pathlib import Path

import pytest

from simpletuner.config import UserError, default_config_path
from simpletuner.config.files import Places, parse


def test_default_config_path(tmp_path: Path) -> None:
    assert default_config_path({}, tmp_path) is None
    config = tmp_path / "config"
    for folder in (config, config / "foo", config / "examples" / "x"):
        folder.mkdir(parents=True, exist_ok=True)
    (config / "foo" / "config.toml").touch()
    assert default_config_path({"ENV": "foo"}, tmp_path) == config / "foo" / "config.toml"
    (config / "foo" / "config.json").touch()
    assert default_config_path({"ENV": "foo"}, tmp_path) == config / "foo" / "config.json"
    assert default_config_path({"ENV": "examples/x"}, tmp_path) == config / "examples" / "x" / "config.json"
    assert default_config_path({}, tmp_path) is None
    (config / "config.json").touch()
    assert default_config_path({}, tmp_path) == config / "config.json"
    assert default_config_path({"ENV": " "}, tmp_path) == config / "config.json"


def test_a_misspelt_env_is_not_another_run(tmp_path: Path) -> None:
    assert default_config_path({"ENV": "fooo"}, tmp_path) == tmp_path / "config" / "fooo" / "config.json"


def test_a_shells_start_up_file_in_env_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / ".shrc").touch()
    assert default_config_path({"ENV": str(tmp_path / ".shrc")}, tmp_path) is None


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ('{"a": 1,\n "b": }', "2:7", "Expecting value"),
        ("{'a': 1}", "1:2", "text in single quotes; use double quotes"),
        ('{"a": 1\n "b": 2}', "2:2", "a comma is missing before this place"),
        ('{"a": [1, 2', "1:12", "the file ends too early"),
        ('{// why\n"a": 1}', "1:2", "a comment; write it as a key with a leading underscore"),
        ("", "1:1", "the file ends too early"),
    ],
)
def test_malformed_json(tmp_path: Path, text: str, place: str, hint: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf8")
    with pytest.raises(UserError) as caught:
        parse(path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}:{place}: not valid JSON: {hint}")


def test_a_byte_order_mark_is_no_mistake_and_other_encodings_are(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": "\u00e9"}', encoding="utf-8-sig")
    assert parse(path) == {"a": "\u00e9"}
    path.write_text('{"a": "\u00e9"}', encoding="latin-1")
    with pytest.raises(UserError, match=r"not a text file in UTF-8 \(byte 7\)"):
        parse(path)
    with pytest.raises(UserError, match="cannot be read: "):
        parse(tmp_path)


def test_comments_may_repeat(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"_c": 1, "_c": 2, "inner": {"a": 1}, "other": {"a": 1}}', encoding="utf8")
    assert parse(path) == {"_c": 2, "inner": {"a": 1}, "other": {"a": 1}}


def test_places_expand_the_home_folder_and_keep_absolute_paths(tmp_path: Path) -> None:
    places = Places(tmp_path / "here", tmp_path / "there")
    assert places.candidates("~/x") == (Path.home() / "x",)
    assert places.candidates("/x") == (Path("/x"),)
    assert places.candidates("x") == (tmp_path / "here" / "x", tmp_path / "there" / "x")
