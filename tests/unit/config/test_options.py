from pathlib import Path

from simpletuner.config.backends import DERIVED
from simpletuner.config.options import PATH, render
from simpletuner.config.schema import DatasetConfig, section_of

DATALOADER = Path(__file__).parents[3] / "documentation" / "DATALOADER.md"


def test_options_page_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf8") == render(), "run: python -m simpletuner.config.options"


def test_options_page_has_every_option_with_type_default_and_bounds() -> None:
    rows = {line.split("`")[1]: line for line in render().splitlines() if line.startswith("| `")}
    assert section_of().keys() <= rows.keys()
    assert rows["seed"].startswith("| `seed` | whole number, at least 0 | `42` | fixed | ")
    assert rows["model_type"].startswith("| `model_type` | `lora`, `full` | `lora` | fixed | ")
    assert rows["ema_decay"].startswith("| `ema_decay` | number, above 0, below 1 | `0.995` | told | ")
    assert rows["report_to"].split(" | ")[1].startswith("list of `wandb`")
    assert "**No effect yet:**" in rows["vae_cache_ondemand"]
    assert "**No effect yet:**" not in rows["learning_rate"]


def test_dataloader_page_names_every_key_of_a_dataset() -> None:
    text = DATALOADER.read_text(encoding="utf8")
    keys = DatasetConfig.model_fields.keys() - DERIVED | {"aspect_bucket_alignment", "disabled"}
    assert not [key for key in sorted(keys) if f"`{key}`" not in text]
