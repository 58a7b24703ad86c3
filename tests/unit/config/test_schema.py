import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from simpletuner.config.backends import DatasetConfig, TextCacheConfig
from simpletuner.config.fields import rule_of
from simpletuner.config.schema import SECTIONS, inert_options, resume_rules, section_of

EVERY_SECTION = [*SECTIONS.values(), DatasetConfig, TextCacheConfig]


def test_a_key_belongs_to_one_section() -> None:
    assert len(section_of()) == sum(len(section.model_fields) for section in SECTIONS.values())


@pytest.mark.parametrize("section", EVERY_SECTION, ids=lambda section: section.__name__)
def test_every_option_is_documented_and_its_default_is_valid(section: type) -> None:
    for key, field in section.model_fields.items():
        assert field.description, key
        assert field.description[0].isupper() or field.description.split()[0].rstrip(":,") in ("latest", "skip"), key
        assert field.description.endswith("."), key
        assert rule_of(section, key, "resume") in ("must_match", "may_change", "free"), key
        if not field.is_required():
            TypeAdapter(field.annotation).validate_python(field.default)
    required = {key: "x" for key, field in section.model_fields.items() if field.is_required()}
    made = section(**required)
    assert section.model_validate(made.model_dump()) == made


def test_resume_rules_of_keys_that_decide_what_a_checkpoint_is() -> None:
    rules = resume_rules()
    for key in ("model_family", "model_type", "lora_rank", "lora_alpha", "seed", "optimizer", "distillation_method"):
        assert rules[key] == "must_match", key
    for key in ("learning_rate", "mixed_precision", "gradient_accumulation_steps", "lr_warmup_steps"):
        assert rules[key] == "may_change", key
    for key in ("max_train_steps", "validation_num_inference_steps", "output_dir", "checkpoint_step_interval"):
        assert rules[key] == "free", key


def test_inert_options_have_a_reason() -> None:
    assert "vae_cache_ondemand" in inert_options()
    assert "learning_rate" not in inert_options()
    assert all(inert_options().values())


def test_config_imports_no_framework_and_is_quick() -> None:
    code = """
import sys, time
start = time.process_time()
import simpletuner.config
seconds = time.process_time() - start
heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "yaml"} & set(sys.modules)
assert not heavy, heavy
print(seconds)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 0.2 s on the slowest machine at hand; a framework takes 2 s and more.
    assert float(done.stdout) < 1.5
