import pytest

from simpletuner import registry
from simpletuner.config.deprecated import _OPTIMIZERS, ALIASES, CONFIG_KEYS, DATASET_KEYS
from simpletuner.config.schema import DatasetConfig, section_of
from tests.unit.config.conftest import IMAGES, Run


def test_the_tables_name_only_keys_that_are_not_ours() -> None:
    ours = section_of().keys()
    assert not ours & CONFIG_KEYS.keys()
    assert not ours & ALIASES.keys()
    assert set(ALIASES.values()) <= ours
    assert not ALIASES.keys() & CONFIG_KEYS.keys()
    assert not DatasetConfig.model_fields.keys() & DATASET_KEYS.keys()


@pytest.mark.parametrize("key", sorted(CONFIG_KEYS))
def test_every_known_key_is_told_with_its_reason(run: Run, key: str) -> None:
    level, reason = CONFIG_KEYS[key]
    if level == "error":
        assert run.problems({key: "x"}) == [f"{key}: not supported: {reason}"]
        assert run.load({key: False}).notices == (f"{key}: has no effect: {reason}",)
    else:
        assert run.load({key: "x"}).notices == (f"{key}: has no effect: {reason}",)


@pytest.mark.parametrize("key", sorted(DATASET_KEYS))
def test_every_known_dataset_key_is_told_with_its_reason(run: Run, key: str) -> None:
    level, reason = DATASET_KEYS[key]
    entry = {**IMAGES, key: "x"}
    where = "multidatabackend.json: dataset 'images': "
    if level == "error":
        assert run.problems({}, [entry]) == [f"{where}{key}: not supported: {reason}"]
    else:
        assert run.load({}, [entry]).notices == (f"{where}{key}: has no effect: {reason}",)


@pytest.mark.parametrize(("key", "value"), [("snr_weight", 1.0), ("huber_schedule", "constant"), ("snr_weight", "0")])
def test_values_that_change_nothing_are_no_error(run: Run, key: str, value: object) -> None:
    assert run.load({key: value}).notices[0].startswith(f"{key}: has no effect")


@pytest.mark.parametrize(("alias", "key"), sorted(ALIASES.items()))
def test_aliases(run: Run, alias: str, key: str) -> None:
    value = {"use_gradient_checkpointing": False, "pretrained_model": "x/y", "lora_target_modules": ["to_q"]}.get(alias)
    value = {"pretrained_teacher_model": "x/y", "teacher_revision": "main"}.get(alias, value)
    value = {"model_flavor": "a", "lora_initialisation_style": "gaussian", "gradient_clip_method": "value"}.get(
        alias, value if value is not None else 0.5 if "steps" not in alias and "limit" not in alias else 3
    )
    text = {key: None, alias: value}
    config = run.load(text)
    assert config.flat()[key] == value
    assert config.notices == (f"{alias}: read as {key}",)
    assert key in config.explicit


@pytest.mark.parametrize("name", sorted(name for names in _OPTIMIZERS.values() for name in names.split()))
def test_an_optimizer_that_is_not_built_is_told_with_the_nearest_that_is(run: Run, name: str) -> None:
    (line,) = run.problems({"optimizer": name})
    near = line.partition("is not built; '")[2].partition("'")[0]
    assert line == f"optimizer: '{name}' is not supported: it is not built; '{near}' is the nearest"
    assert near in registry.names("optimizers")
    assert name not in registry.names("optimizers")


def test_an_alias_beside_its_key(run: Run) -> None:
    (line,) = run.problems({"validation_steps": 5, "validation_step_interval": 6})
    assert line.startswith("validation_steps: it is another name of validation_step_interval, which is given too")
    assert run.load({"validation_steps": 5, "validation_step_interval": 5}).validation.validation_step_interval == 5


def test_values_of_other_names(run: Run) -> None:
    config = run.load({"mixed_precision": "FP32", "attention_mechanism": "flash-attn-2", "distillation_method": "none"})
    assert (config.run.mixed_precision, config.distillation.distillation_method) == ("no", None)
    assert config.notices == (
        "mixed_precision: 'fp32' is read as no: it is another name",
        "attention_mechanism: 'flash-attn-2' is read as diffusers: it changes speed only",
        "distillation_method: 'none' is read as the default: it is another word for the default",
    )
    assert run.problems({"lora_init_type": "pissa"}) == [
        "lora_init_type: 'pissa' is not supported: it changes the base weights, which are the teacher; "
        "use default or gaussian",
    ]
    config = run.load({}, [{**IMAGES, "crop_style": "centre", "metadata_backend": "json"}])
    assert config.datasets[0].crop_style == "center"
