from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.datasets import sized
from tests.unit.config.conftest import IMAGES, Run

TEXT = {"id": "text", "dataset_type": "text_embeds", "cache_dir": "text"}


def images(**keys: Any) -> dict[str, Any]:
    return {**IMAGES, **keys}


def test_a_dataset_inherits_what_it_does_not_say(run: Run) -> None:
    config = {
        "resolution": 512,
        "resolution_type": "pixel",
        "minimum_image_size": 256,
        "aspect_bucket_rounding": 3,
        "aspect_bucket_alignment": 32,
        "caption_strategy": "filename",
        "train_batch_size": 3,
        "vae_batch_size": 2,
        "write_batch_size": 9,
        "max_train_samples": 7,
    }
    (dataset,) = run.load(config).datasets
    assert (dataset.resolution, dataset.resolution_type, dataset.minimum_image_size) == (512, "pixel", 256)
    assert (dataset.aspect_bucket_rounding, dataset.alignment, dataset.caption_strategy) == (3, 32, "filename")
    assert (dataset.train_batch_size, dataset.vae_batch_size, dataset.write_batch_size) == (3, 2, 9)
    assert dataset.max_num_samples == 7
    own = {"resolution": 1.0, "resolution_type": "area", "minimum_image_size": 0, "train_batch_size": "5"}
    own |= {"aspect_bucket_alignment": 8, "caption_strategy": "textfile", "max_num_samples": 2}
    (dataset,) = run.load(config, [images(**own)]).datasets
    assert (dataset.resolution, dataset.resolution_type, dataset.minimum_image_size) == (1.0, "area", None)
    assert (dataset.alignment, dataset.train_batch_size, dataset.max_num_samples) == (8, 5, 2)
    assert dataset.caption_strategy == "textfile"


def test_defaults(run: Run) -> None:
    (dataset,) = run.load().datasets
    assert (dataset.resolution, dataset.resolution_type) == (1024, "pixel_area")
    assert (dataset.aspect_bucket_rounding, dataset.alignment) == (2, 64)
    assert (dataset.crop, dataset.crop_style, dataset.crop_aspect) == (False, "center", "square")
    assert (dataset.caption_strategy, dataset.missing_caption) == ("textfile", "skip")
    assert (dataset.probability, dataset.repeats, dataset.max_num_samples) == (1.0, 0, None)
    assert (dataset.train_batch_size, dataset.vae_batch_size, dataset.write_batch_size) == (1, 4, 128)
    assert dataset.minimum_image_size is dataset.maximum_image_size is dataset.target_downsample_size is None


def test_inherited_sizes_change_their_unit(run: Run) -> None:
    config = {"resolution": 1000, "resolution_type": "pixel", "minimum_image_size": 500}
    (dataset,) = run.load(config, [images(resolution_type="area")]).datasets
    assert (dataset.resolution, dataset.minimum_image_size) == (1.0, 0.25)
    config = {"resolution": 1.0, "resolution_type": "area", "maximum_image_size": 4.0}
    (dataset,) = run.load(config, [images(resolution_type="pixel")]).datasets
    assert (dataset.resolution, dataset.maximum_image_size) == (1000, 2000)


def test_several_resolutions_are_several_datasets(run: Run) -> None:
    entries = [images(resolution=[0.25, "1.0"], resolution_type="area", probability=0.5, repeats=2), images(id="b")]
    first, second, other = run.load({}, entries).datasets
    assert (first.id, second.id, other.id) == ("images-0.25", "images-1", "b")
    assert (first.resolution, second.resolution) == (0.25, 1.0)
    assert (first.probability, second.probability, first.repeats, second.repeats) == (0.25, 0.25, 2, 2)
    folder = run.working_dir / "simpletuner-results" / "cache" / "vae" / "sdxl" / "images"
    assert (first.cache_dir_vae, second.cache_dir_vae) == (folder / "0.25", folder / "1")
    assert first.files_folder == second.files_folder == folder
    assert other.files_folder == other.cache_dir_vae
    entry = images(resolution=[512, 1024], cache_dir_vae="c/{id}")
    first, second = run.load({}, [entry]).datasets
    folder = run.working_dir / "c" / "images"
    assert (first.cache_dir_vae, second.cache_dir_vae) == (folder / "512", folder / "1024")
    (only,) = run.load({}, [images(resolution=[512])]).datasets
    assert (only.id, only.resolution) == ("images", 512)
    # each size may be in the other unit, as a single one may
    assert [d.resolution for d in run.load({}, [images(resolution=[0.25, 1024])]).datasets] == [500, 1024]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (0.25, "pixel", 500),
        (0.25, "area", 0.25),
        (16, "area", 16),
        (1000, "area", 1.0),
        (1024, "pixel", 1024),
        (1.0, "pixel_area", 1000),
    ],
)
def test_sizes_in_the_other_unit(value: float, kind: str, expected: float) -> None:
    assert sized(value, kind) == expected


def test_own_sizes_in_the_other_unit_are_told(run: Run) -> None:
    config = run.load({}, [images(resolution=1024, resolution_type="area", minimum_image_size=0.5)])
    assert config.datasets[0].resolution == pytest.approx(1.048576)
    assert config.notices == (
        "multidatabackend.json: dataset 'images': resolution: 1024 beside resolution_type area is read as the square "
        "of 1024 px: 1.04858 megapixels",
    )


def test_paths_and_placeholders(run: Run) -> None:
    (run.working_dir / "pictures").mkdir()
    entry = images(instance_data_dir="{env:WHERE}", cache_dir_vae="c/{model_family}/{id}/{unknown}")
    text = {**TEXT, "cache_dir": "{output_dir}/text"}
    config = run.load({"output_dir": "out"}, [entry, text], environ={"WHERE": "pictures"})
    assert config.datasets[0].instance_data_dir == run.working_dir / "pictures"
    assert config.datasets[0].cache_dir_vae == run.working_dir / "c/sdxl/images/{unknown}"
    assert config.text_cache.cache_dir == run.working_dir / "out/text"
    assert "the environment variable WHERE is not set" in run.problems({}, [entry, text])[0]


def test_working_directory_goes_before_the_configs_folder(run: Run) -> None:
    assert run.load().datasets[0].instance_data_dir == run.folder / "images"
    (run.working_dir / "images").mkdir()
    assert run.load().datasets[0].instance_data_dir == run.working_dir / "images"


def test_default_caches(run: Run) -> None:
    config = run.load({"output_dir": "out"})
    assert config.datasets[0].cache_dir_vae == run.working_dir / "out/cache/vae/sdxl/images"
    assert config.text_cache.cache_dir == run.working_dir / "out/cache/text/sdxl"
    assert config.text_cache.write_batch_size == 128
    named = run.load({}, [images(), {**TEXT, "write_batch_size": "32"}]).text_cache
    assert (named.id, named.cache_dir, named.write_batch_size) == ("text", run.working_dir / "text", 32)


def test_image_embeds_entries_give_a_folder_for_each_dataset(run: Run) -> None:
    store = {"id": "store", "dataset_type": "image_embeds", "cache_dir": "latents"}
    config = run.load({}, [images(image_embeds="store"), store])
    assert config.datasets[0].cache_dir_vae == run.working_dir / "latents/images"
    config = run.load({}, [images(), {**store, "default": True}])
    assert config.datasets[0].cache_dir_vae == run.working_dir / "latents/images"
    (line,) = run.problems({}, [images(image_embeds="stor"), store])
    assert line.endswith("no image_embeds entry has the id 'stor' - did you mean 'store'?")


S3 = {"type": "aws", "aws_bucket_name": "b", "aws_secret_access_key": "s"}


def test_caches_in_a_bucket_are_kept_on_this_machine_too(run: Run) -> None:
    latents = {"id": "latents", "dataset_type": "image_embeds", "default": True, "cache_dir": "/vae/", **S3}
    config = run.load({}, [images(resolution=[512, 1024]), images(id="b"), TEXT | S3 | {"cache_dir": "text"}, latents])
    local = run.working_dir / "simpletuner-results" / "cache"
    own = {"aws_bucket_name": "b", "aws_secret_access_key": "s"}
    assert config.text_cache.cache_dir == local / "text" / "sdxl"
    assert config.text_cache.remote is not None
    assert (config.text_cache.remote.folder, config.text_cache.remote.options) == ("text", own)
    folders = {d.id: (d.cache_dir_vae, d.latents_remote and d.latents_remote.folder) for d in config.datasets}
    vae = local / "vae" / "sdxl"
    assert folders == {
        "images-512": (vae / "images" / "512", "vae/images/512"),
        "images-1024": (vae / "images" / "1024", "vae/images/1024"),
        "b": (vae / "b", "vae/b"),
    }
    (dataset,) = run.load({}, [images(cache_dir_vae="here"), TEXT, latents]).datasets
    assert dataset.cache_dir_vae == run.working_dir / "here"
    assert dataset.latents_remote is not None


@pytest.mark.parametrize("kind", ["huggingface", "gcs"])
def test_caches_are_kept_on_known_backends(run: Run, kind: str) -> None:
    latents = {"id": "latents", "dataset_type": "image_embeds", "default": True, "type": kind}
    for entry, name in ((TEXT | {"type": kind}, "text"), (latents, "latents")):
        assert run.problems({}, [images(), entry]) == [
            f"multidatabackend.json: dataset '{name}': type: a cache cannot be kept on '{kind}'; use one of local, aws"
        ]


def test_disabled_entries_are_left_out_whatever_they_hold(run: Run) -> None:
    broken = {"id": "images", "disabled": True, "instance_data_dir": "{env:NOWHERE}", "what": 1}
    config = run.load({}, [images(), broken, {**broken, "disabled": "true"}])
    assert [dataset.id for dataset in config.datasets] == ["images"]
    assert run.problems({}, [broken]) == ["multidatabackend.json: there is no enabled image dataset"]


def test_several_text_caches(run: Run) -> None:
    other = {**TEXT, "id": "other"}
    (line,) = run.problems({}, [images(), {**TEXT, "default": True}, {**other, "default": True}])
    assert line == "multidatabackend.json: several default text caches: 'text', 'other'; keep one `default: true`"
    (line,) = run.problems({}, [images(), TEXT, other])
    assert line == "multidatabackend.json: several text caches and no default: 'text', 'other'; set `default: true`"
    config = run.load({}, [images(), TEXT, {**other, "default": True}])
    assert config.text_cache.id == "other"
    assert config.notices == ("text caches 'text' are not used: 'other' serves all datasets",)


def test_ids_must_differ(run: Run) -> None:
    lines = run.problems({}, [images(), images(cache_dir_vae="other")])
    assert lines == ["multidatabackend.json: the id 'images' is used twice; ids must differ"]
    lines = run.problems({}, [images(resolution=[512, 1024]), images(id="images-512")])
    assert lines == ["multidatabackend.json: the id 'images-512' is used twice; ids must differ"]


def test_caches_must_differ(run: Run) -> None:
    lines = run.problems({}, [images(cache_dir_vae="c"), images(id="b", cache_dir_vae="c")])
    assert lines == ["multidatabackend.json: dataset 'b': cache_dir_vae: 'images' has the same; give each its own"]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"dataset_type": "imag"}, "dataset_type: unknown value 'imag' - did you mean 'image'?"),
        ({"dataset_type": "conditioning"}, "dataset_type: 'conditioning' is not built yet"),
        ({"crop_stil": "center"}, "crop_stil: unknown key - did you mean 'crop_style'?"),
        ({"crop_style": "middle"}, 'crop_style: unknown value "middle" (random, center, corner)'),
        ({"caption_strategy": "parquet"}, "caption_strategy: parquet needs metadata_backend: parquet"),
        ({"metadata_backend": "parquet"}, "parquet: required by metadata_backend: parquet, such as "),
        (
            {"metadata_backend": "parquet", "parquet": {"path": "x.parquet"}},
            "parquet.path: there is no file 'x.parquet' (looked at: ",
        ),
        ({"repeats": -1}, "repeats: -1 is too small; at least 0"),
        ({"crop": "maybe"}, 'crop: "maybe" is not true or false'),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt: required"),
        ({"prepend_instance_prompt": True}, "instance_prompt: required"),
        ({"crop": True, "crop_aspect": "closest"}, "crop_aspect_buckets: required"),
        (
            {"minimum_image_size": 900, "maximum_image_size": 800},
            "minimum_image_size: 900 is above maximum_image_size 800",
        ),
        ({"start_step": 5, "end_step": 5}, "end_step: 5 is not behind start_step, so no image is shown"),
        ({"start_epoch": 3, "end_epoch": 2}, "end_epoch: 2 is not behind start_epoch, so no image is shown"),
        ({"resolution": [512, 512]}, "resolution: [512, 512] is no list of different sizes"),
        ({"resolution": [512, "x"]}, 'resolution: [512, "x"] is no list of different sizes'),
        ({"resolution": []}, "resolution: [] is no list of different sizes"),
        ({"instance_data_dir": None}, "instance_data_dir: required"),
        ({"instance_data_dir": "config.json"}, "is not a folder"),
        ({"probability": 0}, "probability: it is 0 for every dataset"),
        ({"text_embeds": "x"}, "text_embeds: no text_embeds entry has the id 'x'"),
        ({"id": None}, "entry 1: id: required"),
        ({"disabled": "maybe"}, 'entry 1: disabled: "maybe" is not true or false'),
        ({"default": 3}, "dataset 'images': default: 3 is not true or false"),
        ({"cache_dir_vae": ["x"]}, 'entry 1: cache_dir_vae: ["x"] is not text'),
    ],
)
def test_mistakes_in_an_entry(run: Run, entry: dict[str, Any], line: str) -> None:
    lines = run.problems({}, [images(**entry), images(id="good")] if "probability" not in entry else [images(**entry)])
    assert len(lines) == 1
    assert lines[0].startswith("multidatabackend.json: ")
    assert line in lines[0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"images": []}, "the file must hold a list of datasets"),
        ([3], "entry 1 is not an object"),
        ([], "there is no enabled image dataset"),
    ],
)
def test_a_file_of_another_shape(run: Run, content: Any, line: str) -> None:
    assert line in run.problems({}, content)[0]


def test_keys_of_another_backend_are_handed_to_it(run: Run) -> None:
    entry = {"id": "far", "type": "aws", "aws_bucket_name": "b", "repeats": 2}
    (dataset,) = run.load({}, [entry]).datasets
    assert (dataset.type, dataset.options, dataset.repeats) == ("aws", {"aws_bucket_name": "b"}, 2)
    assert dataset.instance_data_dir == Path()


def test_lists_and_switches_in_quotes(run: Run) -> None:
    entry = images(crop="true", crop_aspect="closest", crop_aspect_buckets="0.5, 1.0,2", repeats="3")
    (dataset,) = run.load({}, [entry]).datasets
    assert dataset.crop
    assert dataset.crop_aspect_buckets == (0.5, 1.0, 2.0)
    assert dataset.repeats == 3


def test_caches_are_disabled_for_all_datasets_or_for_one(run: Run) -> None:
    entries = [images(vae_cache_disable="false"), images(id="more", instance_data_dir="images")]
    config = run.load({"vae_cache_disable": True, "text_cache_disable": "true"}, entries)
    assert [(d.vae_cache_disable, d.text_cache_disable) for d in config.datasets] == [(False, True), (True, True)]
    assert config.notices == ()


def test_settings_without_effect_are_told(run: Run) -> None:
    config = run.load({}, [images(vae_cache_clear_each_epoch=True, preserve_data_backend_cache=True)])
    where = "multidatabackend.json: dataset 'images': "
    assert config.notices == (
        f"{where}vae_cache_clear_each_epoch: has no effect: only random crops change (crop_style)",
        f"{where}preserve_data_backend_cache: has no effect: nothing is ever deleted from a cache",
    )


def test_a_cache_that_is_cleared_each_epoch_means_other_crops_each_time(run: Run) -> None:
    config = run.load({}, [images(vae_cache_clear_each_epoch="true", crop=True, crop_style="random")])
    (dataset,) = config.datasets
    assert dataset.vae_cache_clear_each_epoch
    assert dataset.vae_cache_disable
    assert "each image is cut anew each time it is shown" in config.notices[0]


def test_relative_shards_begin_where_they_exist(run: Run) -> None:
    config_dir = run.folder
    (config_dir / "tars").mkdir()
    (config_dir / "tars" / "a.tar").touch()
    entry = {"id": "shards", "type": "webdataset"}
    for written in (
        "tars/{a,b}.tar",
        "tars/*.tar",
        ["https://h/{0..1}.tar?x=1", "tars/a.tar"],
        ["none.tar", "tars/?.tar"],
    ):
        (dataset,) = run.load({}, [entry | {"shards": written}]).datasets
        assert dataset.instance_data_dir == config_dir
        assert dataset.options == {"shards": written}
    for written in ("elsewhere/*.tar", "https://h/{0..1}.tar", "pipe:cat tars/a.tar"):
        assert run.load({}, [entry | {"shards": written}]).datasets[0].instance_data_dir == run.working_dir
    (dataset,) = run.load({}, [entry | {"instance_data_dir": "tars"}]).datasets
    assert dataset.instance_data_dir == config_dir / "tars"


def test_files_of_other_backends_begin_where_they_exist_and_bring_their_captions(run: Run) -> None:
    (run.folder / "list.csv").touch()
    (run.folder / "rows").mkdir()
    for kind, key, name in (("csv", "csv_file", "list.csv"), ("huggingface", "dataset_name", "rows")):
        config = run.load({}, [{"id": "x", "type": kind, key: name, "caption_strategy": kind}])
        (dataset,) = config.datasets
        assert (dataset.instance_data_dir, dataset.options) == (run.folder, {key: name})
        assert dataset.caption_strategy == "textfile"
        assert config.notices == ()
