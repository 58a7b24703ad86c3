"""The tables, against the scripts' own flags and defaults (``scripts.json``) and accelerate's own parser."""

import json
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from simpletuner.config.schema import DatasetConfig, section_of
from simpletuner.convert.flags import FLAGS, LAUNCH_FLAGS, LAUNCH_GROUPS, SCRIPTS, flags_of
from simpletuner.convert.page import PATH, render
from simpletuner.distillers.lcm import LCMConfig

# Names and defaults as the scripts of huggingface/diffusers at 58eb52c declare them.
DECLARED = json.loads((Path(__file__).parent / "scripts.json").read_text(encoding="utf8"))


def test_the_page_is_up_to_date():
    assert PATH.read_text(encoding="utf8") == render(), "run: python -m simpletuner.convert.page"


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_every_flag_of_a_script_is_known_with_its_default(name: str):
    script = SCRIPTS[name]
    known = {flag: script.defaults.get(flag, row.default) for flag, row in flags_of(script).items()}
    assert known == DECLARED[name]
    assert {flag for flag, row in flags_of(script).items() if row.switch} == {
        flag for flag, default in DECLARED[name].items() if default is False
    }


def test_every_key_exists():
    keys = {"config": section_of().keys(), "method": LCMConfig.model_fields.keys()}
    keys["dataset"] = DatasetConfig.model_fields.keys()
    wrong = [name for name, flag in FLAGS.items() if flag.target in keys and flag.key not in keys[flag.target]]
    assert not wrong


def test_every_flag_of_accelerate_launch_is_known():
    unknown: list[str] = []
    for action in launch_command_parser()._actions:
        for option in action.option_strings:
            name = option.removeprefix("--").replace("-", "_")
            if option.startswith("--") and not name.startswith(tuple(LAUNCH_GROUPS)) and name != "help":
                if name not in LAUNCH_FLAGS:
                    unknown.append(name)
                elif LAUNCH_FLAGS[name].switch != (action.nargs == 0):
                    unknown.append(f"{name}: switch or not")
    assert not unknown
