from pathlib import Path

import pytest

from tests.unit.config.conftest import Run

ACCELERATE = "mixed_precision: fp16\ndynamo_config:\n  dynamo_backend: INDUCTOR\nnum_processes: 2\n"


def accelerate_home(folder: Path, text: str) -> dict[str, str]:
    (folder / "accelerate").mkdir(exist_ok=True)
    (folder / "accelerate" / "default_config.yaml").write_text(text, encoding="utf8")
    return {"HF_HOME": str(folder)}


def test_precedence_of_mixed_precision(run: Run) -> None:
    environ = accelerate_home(run.working_dir, ACCELERATE)
    assert run.load().run.mixed_precision == "bf16"
    assert run.load(environ=environ).run.mixed_precision == "fp16"
    environ["MIXED_PRECISION"] = "NO"
    assert run.load(environ=environ).run.mixed_precision == "no"
    assert run.load({"mixed_precision": "bf16"}, environ=environ).run.mixed_precision == "bf16"
    over = run.load({"mixed_precision": "bf16"}, overrides={"mixed_precision": "fp16"}, environ=environ)
    assert over.run.mixed_precision == "fp16"


def test_what_won_is_told(run: Run) -> None:
    environ = accelerate_home(run.working_dir, ACCELERATE)
    file = run.working_dir / "accelerate" / "default_config.yaml"
    config = run.load(environ={**environ, "MIXED_PRECISION": "no"})
    assert config.notices == (
        "mixed_precision: no, from MIXED_PRECISION=no",
        f"mixed_precision: no, from MIXED_PRECISION=no, which goes before {file} (mixed_precision: fp16)",
        f"dynamo_backend: inductor, from {file} (dynamo_backend: INDUCTOR)",
    )
    assert {"mixed_precision", "dynamo_backend"} <= config.explicit
    config = run.load({"mixed_precision": "bf16"}, environ={"MIXED_PRECISION": "no"})
    assert config.notices == ("mixed_precision: bf16, from config.json, which goes before MIXED_PRECISION=no",)
    assert run.load({"mixed_precision": "bf16"}, environ={"MIXED_PRECISION": "bf16"}).notices == ()


def test_a_bare_no_in_yaml(run: Run) -> None:
    config = run.load(environ=accelerate_home(run.working_dir, "mixed_precision: no\n"))
    assert config.run.mixed_precision == "no"


def test_named_accelerate_file(run: Run) -> None:
    (run.working_dir / "a.json").write_text('{"mixed_precision": "fp16"}', encoding="utf8")
    config = run.load(environ={"ACCELERATE_CONFIG_PATH": str(run.working_dir / "a.json")})
    assert config.run.mixed_precision == "fp16"
    (line,) = run.problems(environ={"ACCELERATE_CONFIG_PATH": str(run.working_dir / "b.yaml")})
    assert "b.yaml: accelerate's config cannot be read" in line
    (run.working_dir / "c.yaml").write_text("a: [", encoding="utf8")
    (line,) = run.problems(environ={"ACCELERATE_CONFIG_PATH": str(run.working_dir / "c.yaml")})
    assert "c.yaml: accelerate's config cannot be read" in line


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "HOME"])
def test_where_the_default_file_is(run: Run, name: str) -> None:
    cache = run.working_dir if name == "XDG_CACHE_HOME" else run.working_dir / ".cache"
    (cache / "huggingface").mkdir(parents=True)
    accelerate_home(cache / "huggingface", ACCELERATE)
    assert run.load(environ={name: str(run.working_dir)}).run.mixed_precision == "fp16"


def test_a_wrong_value_is_refused(run: Run) -> None:
    (line,) = run.problems(environ={"MIXED_PRECISION": "bf61"})
    assert line.startswith("mixed_precision: unknown value \"bf61\" - did you mean 'bf16'?")
