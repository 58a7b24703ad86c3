"""What a finished run leaves in output_dir: weights, scheduler, card, and the configuration that made them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from simpletuner.plan import Plan
from simpletuner.plan_view import plan_rows
from simpletuner.publishing.export import write_lora, write_model
from simpletuner.publishing.model_card import CardFacts, card_text
from simpletuner.training.adapters import adapter_metadata, adapter_state
from simpletuner.training.build import Run
from simpletuner.training.checkpoint import provenance
from simpletuner.training.sampling import student_settings

CARD, CONFIG = "README.md", "simpletuner.json"


def result_is_there(plan: Plan) -> bool:
    """Returns whether a run's result has been written: the card is the last of its files."""
    return (plan.config.run.output_dir / CARD).is_file()


def write_result(plan: Plan, run: Run) -> Iterator[str]:
    """Writes the result; yields a line for a person on each part."""
    folder = plan.config.run.output_dir
    settings = student_settings(plan, run)
    if run.has_adapter:
        path = write_lora(
            folder, run.family, adapter_state(run.module), adapter_metadata(run.module), settings.scheduler
        )
        yield f"adapter: {path}"
    else:
        write_model(folder, run.module, settings.scheduler)
        yield f"model: {folder}"
    document = {"config": plan.config.model_dump(mode="json"), **provenance()}
    _write(folder / CONFIG, json.dumps(document, indent=1) + "\n")
    _write(folder / CARD, card_text(_card_facts(plan, run)))
    yield f"how to draw with it: {folder / CARD}"


def _card_facts(plan: Plan, run: Run) -> CardFacts:
    config, settings = plan.config, student_settings(plan, run)
    prompt = plan.validation.prompts[0] if plan.validation.prompts else "a photograph of a cat"
    method = "fine-tuned" if plan.method == "sft" else f"distilled by {plan.method}"
    name = plan.source.path.rstrip("/").rpartition("/")[2]
    return CardFacts(
        title=f"{name}, {method}",
        base_model=plan.source.path,
        here=config.publish.hub_model_id if config.publish.push_to_hub and config.publish.hub_model_id else str(config.run.output_dir),
        pipeline=run.family.pipeline_class,
        network=None if run.has_adapter else type(run.module).__name__,
        scheduler=type(settings.scheduler).__name__,
        sampling={"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale},
        dtype=plan.weight_dtype,
        prompt=prompt,
        size_px=plan.validation.sizes_px[0],
        seed=plan.validation.seeds[0],
        rows=plan_rows(plan),
        tags=("text-to-image", "diffusers", *(("lora",) if run.has_adapter else ()), plan.method),
        note=config.publish.model_card_note,
    )


def _write(path: Path, text: str) -> None:
    """Writes a text file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
