import json

import pytest

from simpletuner.config import UserError, load
from simpletuner.config.schema import resume_rules, section_of
from tests.unit.config.conftest import IMAGES, MINIMAL, Run


def test_sections_get_their_keys_and_the_rest_is_default(run: Run) -> None:
    config = run.load({"lora_rank": 64, "learning_rate": 2e-5, "seed": 7})
    assert (config.lora.lora_rank, config.optimizer.learning_rate, config.run.seed) == (64, 2e-5, 7)
    assert config.run.checkpoint_step_interval == 500
    assert config.explicit == {*MINIMAL, "lora_rank", "learning_rate", "seed"}
    assert config.notices == ()
    assert config.sources == (run.folder / "config.json", run.folder / "multidatabackend.json")


def test_a_loaded_config_is_frozen(run: Run) -> None:
    config = run.load()
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("key", ["train_batch_size", "--train_batch_size", "-train_batch_size", "--train-batch-size"])
def test_leading_dashes(run: Run, key: str) -> None:
    assert run.load({key: 3}).run.train_batch_size == 3


@pytest.mark.parametrize("key", ["_comment", "__note", "//", "// why", "--_x", "#"])
def test_comment_keys_are_left_alone(run: Run, key: str) -> None:
    config = run.load({key: {"any": ["thing"]}})
    assert config.explicit == set(MINIMAL)


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("key", ["learning_rate", "validation_prompt", "seed", "report_to", "distillation_config"])
def test_null_and_empty_mean_the_default(run: Run, key: str, empty: str | None) -> None:
    config = run.load({key: empty})
    assert config.flat()[key] == config.default_of(key)
    assert key not in config.explicit


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("max_train_steps", "100", 100),
        ("max_train_steps", "1e4", 10000),
        ("max_train_steps", 1e4, 10000),
        ("gradient_checkpointing", "false", False),
        ("gradient_checkpointing", "False", False),
        ("use_dora", "true", True),
        ("use_dora", "True", True),
        ("validation_resolution", 512, "512"),
        ("tracker_run_name", 4, "4"),
        ("report_to", "wandb, tensorboard", ["wandb", "tensorboard"]),
        ("report_to", ["wandb"], ["wandb"]),
        ("report_to", "none", []),
        ("peft_lora_target_modules", "to_q,to_k", ["to_q", "to_k"]),
        ("peft_lora_target_modules", '["to_q"]', ["to_q"]),
        (
            "optimizer_config",
            "fused=true,betas=[0.9, 0.99],eps=1e-6",
            {"fused": True, "betas": [0.9, 0.99], "eps": 1e-6},
        ),
        ("optimizer_config", '{"fused": false}', {"fused": False}),
        ("optimizer_config", {"momentum": 0.9}, {"momentum": 0.9}),
        ("resume_from_checkpoint", "none", None),
        ("resume_from_checkpoint", False, None),
        ("resume_from_checkpoint", True, "latest"),
        ("resume_from_checkpoint", "checkpoint-5", "checkpoint-5"),
        ("snr_gamma", 0, None),
        ("distillation_config", '{"w_min": 1}', {"w_min": 1}),
    ],
)
def test_values_are_read_as_what_they_stand_for(run: Run, key: str, text: object, value: object) -> None:
    assert run.load({key: text}).flat()[key] == value


def test_mistakes_are_told_all_at_once(run: Run) -> None:
    lines = run.problems(
        {
            "model_family": None,
            "lora_rnk": 4,
            "model_type": "lra",
            "seed": "x",
            "train_batch_size": 0,
            "use_dora": "perhaps",
            "ema_decay": 1.0,
            "lora_dropout": True,
            "aspect_bucket_alignment": 20,
            "validation_resolution": "1024x",
            "learning_rate": float("inf"),
            "gradient_accumulation_steps": 1.5,
        },
        backend=[{"id": "a", "instance_data_dir": "nowhere"}],
    )
    text = "\n".join(lines)
    assert len(lines) == 13
    assert "lora_rnk: unknown key - did you mean 'lora_rank'?" in text
    assert "model_type: unknown value \"lra\" - did you mean 'lora'? (lora, full)" in text
    assert 'seed: "x" is not a whole number' in text
    assert "train_batch_size: 0 is too small; at least 1" in text
    assert 'use_dora: "perhaps" is not true or false' in text
    assert "ema_decay: 1.0 is too large; it must be below 1" in text
    assert "lora_dropout: true is not a number" in text
    assert "aspect_bucket_alignment: 20 is not a multiple of 8" in text
    assert "validation_resolution: '1024x' is not a size such as 1024x768" in text
    assert "learning_rate: Infinity is not a finite number" in text
    assert "gradient_accumulation_steps: 1.5 is not a whole number" in text
    assert "model_family: required" in text
    assert f"there is no folder 'nowhere' (looked at: {run.working_dir}/nowhere, {run.folder}/nowhere)" in text


def test_a_wrong_value_within_an_object_is_one_line(run: Run) -> None:
    (line,) = run.problems({"optimizer_config": {"eps": {}, "fused": True}})
    assert line.startswith("optimizer_config.eps: {} is not text, a number, a switch or a list of numbers")
    (line,) = run.problems({"optimizer_config": "fast"})
    assert line.startswith('optimizer_config: "fast" is not an object')


@pytest.mark.parametrize("size", ["63", "63x1024", "1024x32", "0", "1024x", "a", "1024x768x3", ","])
def test_sizes_that_are_none(run: Run, size: str) -> None:
    (line,) = run.problems({"validation_resolution": size})
    assert "is not a size such as 1024x768 (pixels, at least 64 each)" in line


def test_malformed_json_has_line_and_column(run: Run) -> None:
    (line,) = run.problems('{\n  "seed": 1,\n}\n')
    assert line.startswith(f"{run.folder}/config.json:3:1: not valid JSON: a comma before the closing bracket") or (
        line.startswith(f"{run.folder}/config.json:2:12: not valid JSON: a comma before the closing bracket")
    )
    lines = run.problems({"seed": "x"}, backend='[\n  {"id" "a"}]')
    assert lines[0].startswith('seed: "x"')
    assert lines[1].startswith(f"{run.folder}/multidatabackend.json:2:9: not valid JSON: Expecting ':' delimiter")


def test_a_key_that_is_given_twice(run: Run) -> None:
    (line,) = run.problems('{"seed": 1, "seed": 2}')
    assert line == f"{run.folder}/config.json: seed: given twice; keep one of them"


def test_a_config_must_be_an_object(run: Run) -> None:
    assert run.problems("[1]") == [f"{run.folder}/config.json: a config is one object: {{...}}"]


def test_missing_config_names_the_places(run: Run) -> None:
    with pytest.raises(UserError, match="there is no 'nowhere.json'") as caught:
        load(run.folder.relative_to(run.folder) / "nowhere.json", working_dir=run.working_dir, environ={})
    assert f"(looked at: {run.working_dir}/nowhere.json)" in str(caught.value)
    with pytest.raises(UserError, match=r"has no config.json or config.toml"):
        load(run.working_dir, environ={})


def test_a_misspelt_config_is_told_the_one_beside_it(run: Run) -> None:
    run.load({})
    for missing in (
        run.folder.with_name(f"{run.folder.name}s"),
        run.folder.with_name(run.folder.name[1:]) / "config.json",
    ):
        with pytest.raises(UserError, match=f"there is no '{missing}' - did you mean '{run.folder.name}'"):
            load(missing, working_dir=run.working_dir, environ={})


def test_toml_beside_json(run: Run) -> None:
    (run.folder / "config.toml").write_text(
        'model_family = "sdxl"\npretrained_model_name_or_path = "some/model"\nmax_train_steps = 3\n'
        "[distillation_config.lcm]\nw_min = 2.0\n",
        encoding="utf8",
    )
    (run.folder / "multidatabackend.toml").write_text(
        '[[datasets]]\nid = "images"\ninstance_data_dir = "images"\n', encoding="utf8"
    )
    config = load(run.folder, environ={}, working_dir=run.working_dir)
    assert config.run.max_train_steps == 3
    assert config.datasets[0].instance_data_dir == run.folder / "images"
    (run.folder / "config.toml").write_text("a = = 1", encoding="utf8")
    with pytest.raises(UserError, match=r"config.toml: not valid TOML: .*line 1, column 5"):
        load(run.folder, environ={}, working_dir=run.working_dir)


def test_command_line_goes_before_the_file(run: Run) -> None:
    config = run.load(
        {"learning_rate": 1e-4, "lora_rank": 8},
        overrides={"--learning_rate": "2e-4", "lora_rank": "", "validation_steps": "5", "use-dora": "true"},
    )
    assert config.optimizer.learning_rate == 2e-4
    assert config.lora.lora_rank == 16
    assert config.lora.use_dora
    assert config.validation.validation_step_interval == 5
    assert "learning_rate: 2e-4, from the command line, replaces 0.0001" in config.notices
    assert "lora_rank" not in config.explicit


def test_overrides_reach_into_objects(run: Run) -> None:
    distillation = {"distillation_method": "lcm", "distillation_config": {"lcm": {"w_min": 1.0, "w_max": 12.0}}}
    overrides = {"distillation_config.w_max": "8", "--distillation_config.lcm.w_min": "7.5"}
    config = run.load(distillation, overrides=overrides)
    assert config.distillation.distillation_config == {"w_min": 7.5, "w_max": 8}
    empty = run.load({"distillation_method": "lcm"}, overrides={"distillation_config.w_max": "8"})
    assert empty.distillation.distillation_config == {"w_max": 8}


def test_overrides_alone_make_a_config(run: Run) -> None:
    (run.working_dir / "config").mkdir()
    backend = [{"id": "a", "instance_data_dir": str(run.folder)}]
    (run.working_dir / "config" / "multidatabackend.json").write_text(json.dumps(backend), encoding="utf8")
    overrides = {key: str(value) for key, value in MINIMAL.items()}
    config = load(None, overrides, {}, run.working_dir)
    assert config.sources == (None, run.working_dir / "config" / "multidatabackend.json")
    assert config.run.output_dir == run.working_dir / "simpletuner-results"


def test_distillation_config_flat_or_nested(run: Run) -> None:
    flat = run.load({"distillation_method": "lcm", "distillation_config": {"w_min": 2, "_why": "x", "w_max": None}})
    nested = run.load({"distillation_method": "lcm", "distillation_config": {"lcm": {"w_min": 2}, "dmd2": {"x": 1}}})
    assert flat.distillation.distillation_config == nested.distillation.distillation_config == {"w_min": 2}
    assert nested.notices == ("distillation_config.dmd2: without effect: distillation_method is lcm",)
    without = run.load({"distillation_config": {"lcm": {"w_min": 2}}})
    assert without.notices == ("distillation_config: without effect: distillation_method is not set",)


def test_steps_or_epochs_are_required_and_zero_means_not_given(run: Run) -> None:
    assert run.load({"num_train_epochs": 0}).run.num_train_epochs is None
    both = run.load({"num_train_epochs": 3}).run
    assert (both.max_train_steps, both.num_train_epochs) == (10, 3)
    only_epochs = run.load({"max_train_steps": 0, "num_train_epochs": 3}).run
    assert (only_epochs.max_train_steps, only_epochs.num_train_epochs) == (None, 3)
    for values in ({"max_train_steps": 0}, {"max_train_steps": None}, {"max_train_steps": 0, "num_train_epochs": 0}):
        assert run.problems(values) == ["max_train_steps: required, or num_train_epochs: how long the run is"]


def test_rounding_above_nine_is_an_alignment(run: Run) -> None:
    config = run.load({"aspect_bucket_rounding": "32"})
    assert (config.data.aspect_bucket_rounding, config.data.aspect_bucket_alignment) == (2, 32)
    assert (config.datasets[0].aspect_bucket_rounding, config.datasets[0].alignment) == (2, 32)
    assert "read as an alignment of buckets to 32 px" in config.notices[0]
    assert run.load({"aspect_bucket_rounding": 3}).data.aspect_bucket_rounding == 3
    assert "aspect_bucket_alignment: 65 is not a multiple of 8" in run.problems({"aspect_bucket_rounding": 65})[0]


def test_environment_variables_in_values(run: Run) -> None:
    config = run.load({"tracker_run_name": "{env:WHO}-{step}"}, environ={"WHO": "me"})
    assert config.publish.tracker_run_name == "me-{step}"
    assert run.problems({"output_dir": "{env:NOWHERE}/x"}) == [
        "output_dir: the environment variable NOWHERE is not set"
    ]


def test_what_the_environment_filled_in_is_not_in_what_is_published(run: Run) -> None:
    """Neither in a value, nor in a list or an object, nor where it ends a path; and no path of this machine."""
    secret = "hf_4/2Z"
    config = run.load(
        {
            "tracker_run_name": "run of {env:WHO}",
            "distillation_config": {"note": "{env:TOKEN} and {env:TOKEN}"},
            "report_to": ["wandb"],
            "output_dir": "/home/{env:WHO}/of/{env:TOKEN}",
            "cache_dir": "/home/someone/cache",
        },
        backend=[{**IMAGES, "caption_strategy": "instanceprompt", "instance_prompt": "{env:BACKEND}"}],
        environ={"WHO": "a person", "TOKEN": secret, "BACKEND": "backend key", "OTHER": "some"},
    )
    published = config.published()
    assert published["tracker_run_name"] == "run of {env:WHO}"
    assert published["distillation_config"] == {"note": "{env:TOKEN} and {env:TOKEN}"}
    assert published["output_dir"] == "{env:TOKEN}"
    assert published["cache_dir"] == "cache"
    assert published["pretrained_model_name_or_path"] == "some/model"
    assert published.keys() == config.flat().keys()
    assert config.hide(f"a person: {secret}, backend key, some") == "{env:WHO}: {env:TOKEN}, {env:BACKEND}, some"
    assert "environment" not in config.model_dump(mode="json")
    assert secret not in json.dumps(published)


@pytest.mark.parametrize(
    ("resolution", "resolution_type", "expected"),
    [(1024, "pixel", 1024), (1.0, "area", 1024), (0.5, "area", 768), (0.6, "area", 768), (500, "pixel_area", 512)],
)
def test_validation_resolution_follows_resolution(
    run: Run, resolution: float, resolution_type: str, expected: int
) -> None:
    config = run.load({"resolution": resolution, "resolution_type": resolution_type})
    assert config.validation.resolutions == ((expected, expected),)
    given = run.load({"resolution": resolution, "validation_resolution": "1024X768, 640"})
    assert given.validation.resolutions == ((1024, 768), (640, 640))


def test_written_paths_are_below_the_working_directory(run: Run) -> None:
    config = run.load({"output_dir": "out", "cache_dir": "kept"})
    assert config.run.output_dir == run.working_dir / "out"
    assert config.run.cache_dir == run.working_dir / "kept"
    assert config.datasets[0].cache_dir_vae == run.working_dir / "kept/vae/sdxl/images"
    assert config.text_cache.cache_dir == run.working_dir / "kept/text/sdxl"
    assert run.load({"output_dir": "out"}).text_cache.cache_dir == run.working_dir / "out/cache/text/sdxl"


def test_model_paths(run: Run) -> None:
    (run.folder / "model").mkdir()
    assert run.load({"pretrained_model_name_or_path": "model"}).model.pretrained_model_name_or_path == str(
        run.folder / "model"
    )
    assert run.load().model.pretrained_model_name_or_path == "some/model"
    for missing in ("/no/model", "./model2", "a/b/c", "x.safetensors"):
        (line,) = run.problems({"pretrained_model_name_or_path": missing})
        assert line.startswith(f"pretrained_model_name_or_path: there is no '{missing}' (looked at: ")
    (line,) = run.problems({"pretrained_vae_model_name_or_path": "old.ckpt"})
    assert line.endswith("is a pickle, which can run code; convert it to .safetensors")
    assert "user_prompt_library: there is no file 'p.json'" in run.problems({"user_prompt_library": "p.json"})[0]


def test_backend_file_lookup_order(run: Run) -> None:
    def write(folder: str, name: str) -> None:
        place = run.working_dir / folder / "multidatabackend.json"
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps([{"id": name, "instance_data_dir": str(run.folder)}]), encoding="utf8")

    write("out", "in-output")
    write("config", "in-config")
    write(str(run.folder), "beside")
    (run.folder / "config.json").write_text(json.dumps({**MINIMAL, "output_dir": "out"}), encoding="utf8")

    def found(**overrides: str) -> str:
        return load(run.folder, overrides, {}, run.working_dir).datasets[0].id

    assert found() == "beside"
    assert found(data_backend_config="out/multidatabackend.json") == "in-output"
    (run.folder / "multidatabackend.json").unlink()
    assert found() == "in-output"
    (run.working_dir / "out" / "multidatabackend.json").unlink()
    assert found() == "in-config"
    (run.working_dir / "config" / "multidatabackend.json").unlink()
    with pytest.raises(UserError) as caught:
        found()
    for place in (run.folder, run.working_dir / "out", run.working_dir / "config"):
        assert f"{place}/multidatabackend.json" in str(caught.value)
    with pytest.raises(UserError, match="data_backend_config: there is no file 'x.json'"):
        found(data_backend_config="x.json")


def test_flat_has_every_key_as_json_and_loads_again(run: Run) -> None:
    config = run.load({"report_to": "wandb", "peft_lora_target_modules": ["to_q"], "distillation_method": "lcm"})
    flat = config.flat()
    assert flat.keys() == section_of().keys() == resume_rules().keys()
    again = run.load(json.loads(json.dumps(flat)))
    assert again.flat() == flat
    assert again.notices == ()


def test_all_trackers_are_those_that_are_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tensorboard", "mlflow"}
    monkeypatch.setattr("simpletuner.config.trackers.find_spec", lambda name: name in there or None)
    assert run.load({"report_to": "all"}).publish.report_to == ("tensorboard", "mlflow")
    custom = {"report_to": "all,custom-tracker", "custom_tracker": __file__}
    assert run.load(custom).publish.report_to == ("custom-tracker", "tensorboard", "mlflow")
    there.clear()
    (line,) = run.problems({"report_to": "all"})
    assert line == "report_to: all: none is installed of wandb, tensorboard, trackio, comet_ml, mlflow, swanlab"
