import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

import pytest

from simpletuner import registry
from simpletuner.config.errors import UserError, suggestion
from tests.unit.optimizers.test_plugins import OPTIONAL


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of plug-ins beside a copy of the registry, which looks for them in its own folder."""
    folder = tmp_path / "plugged"
    (folder / "optimizers").mkdir(parents=True)
    source = Path(registry.__file__).read_text(encoding="utf8")
    (folder / "registry.py").write_text(source.replace('f"simpletuner.{kind}.', 'f"plugged.{kind}.'), encoding="utf8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "plugged"]:
        del sys.modules[name]


def test_names_are_files_and_declared_names_and_nothing_is_imported(package: Path) -> None:
    (package / "optimizers" / "plain.py").write_text("raise SystemExit\n", encoding="utf8")
    (package / "optimizers" / "many.py").write_text('NAMES = ("a-b", "c")\nPLUGIN = 3\n', encoding="utf8")
    (package / "optimizers" / "typed.py").write_text('NAMES: tuple[str, ...] = ("t-1",)\nPLUGIN = 4\n', encoding="utf8")
    (package / "optimizers" / "_base.py").touch()
    plugged = import_module("plugged.registry")
    assert plugged.names("optimizers") == ["a-b", "c", "plain", "t-1"]
    assert plugged.load("optimizers", "a-b") == plugged.load("optimizers", "c") == 3
    assert plugged.load("optimizers", "t-1") == 4


def test_a_missing_package_is_told_with_its_extra(package: Path) -> None:
    (package / "optimizers" / "one.py").write_text("import bitsandbytes_\nPLUGIN = 1\n", encoding="utf8")
    plugged = import_module("plugged.registry")
    with pytest.raises(UserError) as caught:
        plugged.load("optimizers", "one", "optimizer")
    assert str(caught.value) == "optimizer: 'one' needs the package 'bitsandbytes_': pip install bitsandbytes_"
    (package / "optimizers" / "two.py").write_text(
        "raise ModuleNotFoundError('no', name='bitsandbytes.optim')\n", encoding="utf8"
    )
    plugged._files.cache_clear()
    with pytest.raises(UserError, match=r'pip install "simpletuner\[bitsandbytes\]"'):
        plugged.load("optimizers", "two", "optimizer")


def test_a_package_of_another_version_is_told(package: Path) -> None:
    (package / "optimizers" / "one.py").write_text("from json import nothing\nPLUGIN = 1\n", encoding="utf8")
    with pytest.raises(
        UserError, match=r"'one' does not work with the installed 'json' \(cannot import name 'nothing'"
    ):
        import_module("plugged.registry").load("optimizers", "one", "optimizer")


def test_two_files_of_one_name_are_our_own_mistake(package: Path) -> None:
    for file in ("one", "two"):
        (package / "optimizers" / f"{file}.py").write_text('NAMES = ("x",)\n', encoding="utf8")
    with pytest.raises(ValueError, match=r"'x' is declared by plugged.optimizers.one and by plugged.optimizers.two"):
        import_module("plugged.registry").names("optimizers")


def test_our_own_broken_import_is_not_blamed_on_a_package(package: Path) -> None:
    (package / "optimizers" / "one.py").write_text("import simpletuner.nowhere\n", encoding="utf8")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        import_module("plugged.registry").load("optimizers", "one")


def test_a_file_without_plugin_is_our_own_mistake(package: Path) -> None:
    (package / "optimizers" / "one.py").touch()
    with pytest.raises(AttributeError, match="PLUGIN"):
        import_module("plugged.registry").load("optimizers", "one")


def test_entry_points_add_names_and_files_go_first(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "optimizers" / "ours.py").write_text("PLUGIN = 1\n", encoding="utf8")
    (package / "outside.py").write_text("PLUGIN = 2\n", encoding="utf8")
    plugged = import_module("plugged.registry")
    points = [EntryPoint(name, "plugged.outside:PLUGIN", "simpletuner.optimizers") for name in ("theirs", "ours")]
    monkeypatch.setattr(plugged, "entry_points", lambda group: points if group == "simpletuner.optimizers" else [])
    assert plugged.names("optimizers") == ["ours", "theirs"]
    assert plugged.load("optimizers", "theirs") == 2
    assert plugged.load("optimizers", "ours") == 1


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        registry.load("families", "sdxxl", "model_family")
    assert str(caught.value).startswith("model_family: unknown value 'sdxxl' - did you mean 'sdxl'? (known: ")


def test_an_unknown_kind_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="no such kind of plug-in: wheels"):
        registry.names("wheels")


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_shipped_name_loads(kind: str) -> None:
    assert registry.names(kind)
    for name in registry.names(kind):
        package = {**OPTIONAL, "aws": "s3fs", "huggingface": "datasets"}.get(name)
        if package is not None and find_spec(package) is None:  # an extra
            continue
        assert registry.load(kind, name) is not None


def test_suggestion() -> None:
    assert suggestion("lora_rnk", ["lora_rank", "seed"]) == " - did you mean 'lora_rank'?"
    assert suggestion("xyz", ["lora_rank", "seed"]) == ""
