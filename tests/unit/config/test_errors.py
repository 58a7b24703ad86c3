from simpletuner.config import UserError
from tests.unit.config.conftest import Run


def test_lines_are_kept_and_joined() -> None:
    error = UserError("a: wrong", "b: wrong")
    assert error.lines == ("a: wrong", "b: wrong")
    assert str(error) == "a: wrong\nb: wrong"


def test_a_shared_config_cannot_steer_the_terminal(run: Run) -> None:
    (line,) = run.problems({"seed\x1b[2J\n": 1})
    assert line.startswith("seed\\x1b[2J: unknown key - did you mean 'seed'?")
    config = run.load({"distillation_method": "lcm", "distillation_config": {"lcm": {"a": 1}, "x\x1by": {}}})
    assert config.notices == ("distillation_config.x\\x1by: without effect: distillation_method is lcm",)
