"""The files that users have: the published quickstart, and every config that this repository ships."""

import json
import shutil
from pathlib import Path

import pytest

from simpletuner.config import UserError, load
from tests.unit.config.conftest import Run

ROOT = Path(__file__).parents[3]
PUBLISHED = Path(__file__).parent / "published"
EXAMPLES = sorted((ROOT / "config" / "examples").glob("*/config.json"))


def test_published_quickstart_loads_unchanged_but_for_the_images_folder(run: Run) -> None:
    config_text = (PUBLISHED / "config.json").read_text(encoding="utf8")
    backend = json.loads((PUBLISHED / "multidatabackend.json").read_text(encoding="utf8"))
    backend[0]["instance_data_dir"] = "images"
    config = run.load(config_text, backend)
    assert config.explicit == set(json.loads(config_text))
    flat = config.flat()
    odd = {"aspect_bucket_rounding", "minimum_image_size", "maximum_image_size", "distillation_config", "report_to"}
    odd.add("validation_num_inference_steps")
    assert all(flat[key] == value for key, value in json.loads(config_text).items() if key not in odd)
    assert config.distillation.distillation_config["num_ddim_timesteps"] == 50
    assert config.publish.report_to == ("wandb",)
    assert config.validation.resolutions == ((1024, 1024), (1280, 768), (768, 1280))
    (dataset,) = config.datasets
    assert (dataset.resolution, dataset.resolution_type) == (1.0, "area")
    assert (dataset.minimum_image_size, dataset.maximum_image_size, dataset.target_downsample_size) == (0.5, 1.0, 1.0)
    assert (dataset.crop, dataset.crop_aspect, dataset.crop_style) == (False, "square", "center")
    assert (dataset.aspect_bucket_rounding, dataset.alignment) == (2, 64)
    assert dataset.cache_dir_vae == run.working_dir / "cache/vae/sdxl/your-dataset"
    assert config.text_cache.id == "text-embeds"
    assert config.text_cache.cache_dir == run.working_dir / "cache/text/sdxl/your-dataset"
    told = "\n".join(config.notices)
    assert "aspect_bucket_rounding: 64 is above 9 decimals" in told
    assert "minimum_image_size: 0.5 beside resolution_type pixel is read as megapixels: 707 px" in told
    assert "without effect on the datasets, which set their own: resolution, minimum_image_size" in told


def test_published_quickstart_without_its_folder_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        load(PUBLISHED, environ={})
    assert len(caught.value.lines) == 1
    assert "dataset 'your-dataset-name': instance_data_dir: there is no folder '/path/to/your/dataset'" in str(
        caught.value
    )


def test_example_files_load_when_they_are_copied(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "datasets" / "my-dataset").mkdir(parents=True)
    for name in ("config.json", "multidatabackend.json"):
        shutil.copy(ROOT / "config" / f"{name}.example", tmp_path / "config" / name)
    config = load(tmp_path / "config", environ={}, working_dir=tmp_path)
    assert config.distillation.distillation_method == "lcm"
    assert config.datasets[0].cache_dir_vae == tmp_path / "cache/vae/sdxl/my-dataset"
    assert not [notice for notice in config.notices if "without effect on the datasets" not in notice]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_shipped_examples_load(path: Path, tmp_path: Path) -> None:
    backend_path = path.parent / "multidatabackend.json"
    for entry in json.loads(backend_path.read_text(encoding="utf8")):
        if "instance_data_dir" in entry and not Path(entry["instance_data_dir"]).is_absolute():
            (tmp_path / entry["instance_data_dir"]).mkdir(parents=True, exist_ok=True)
    model = json.loads(path.read_text(encoding="utf8"))["pretrained_model_name_or_path"]
    if model.count("/") != 1:
        (tmp_path / model).mkdir(parents=True, exist_ok=True)
    config = load(path, environ={}, working_dir=tmp_path)
    assert config.sources == (path, backend_path)
