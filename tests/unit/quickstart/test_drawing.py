from pathlib import Path

import pytest

from simpletuner.config.errors import UserError
from simpletuner.quickstart.drawing import draw
from simpletuner.quickstart.scenes import make_scene


def test_pictures_are_a_function_of_the_seed(tmp_path: Path):
    one, two, other = (draw(tmp_path / name, 20, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 41  # pictures, captions, and the mark of what was drawn
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert any((one / name).read_bytes() != (other / name).read_bytes() for name in names)
    assert (one / "00007.txt").read_text() == f"{make_scene(0, 7).caption}\n"
    longer = draw(tmp_path / "d", 25, 0)
    assert (longer / "00019.png").read_bytes() == (one / "00019.png").read_bytes()


def test_a_finished_folder_is_not_drawn_again(tmp_path: Path):
    folder = draw(tmp_path / "pictures", 3)
    (folder / "00000.png").unlink()
    draw(folder, 3)
    assert not (folder / "00000.png").exists()
    with pytest.raises(UserError, match="holds other files"):
        draw(folder, 4)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds other files"):
        draw(tmp_path / "own", 3)
    (tmp_path / "empty").mkdir()
    assert (draw(tmp_path / "empty", 1) / "00000.txt").is_file()
