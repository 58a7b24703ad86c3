"""What a finished run leaves in output_dir: weights, scheduler, card, and the configuration that made them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.atomic import files_into
from simpletuner.config.schema import DatasetConfig
from simpletuner.families._lora_file import LORA_FILE
from simpletuner.plan import Plan
from simpletuner.plan_view import plan_rows
from simpletuner.publishing.export import (
    whole_pipeline,
    write_lora,
    write_model,
    write_network,
    write_pipeline,
    write_scheduler,
)
from simpletuner.publishing.model_card import CardFacts, card_text
from simpletuner.training.adapters import adapter_metadata, adapter_state
from simpletuner.training.build import Run
from simpletuner.training.checkpoint import provenance
from simpletuner.training.lycoris import lycoris_state, write_lycoris
from simpletuner.training.sampling import SamplingSettings, student_settings
from simpletuner.training.state import TrainState

CARD, CONFIG = "README.md", "simpletuner.json"


def result_step(plan: Plan) -> int | None:
    """Returns the step whose weights are in output_dir, or None when no run has finished there."""
    path = plan.config.run.output_dir / CONFIG
    return json.loads(path.read_text(encoding="utf8")).get("step") if path.is_file() else None


def result_files(plan: Plan) -> list[Path]:
    """Returns the files and folders of a result that are in output_dir, a model's ``config.json`` left out.

    A config.json there may as well be the one that the user wrote.
    """
    folder = plan.config.run.output_dir
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    others = (folder / name for name in (CARD, CONFIG, "scheduler", "pipeline"))
    return [path for path in (*others, *weights) if path.exists()]


def disown(plan: Plan, step: int) -> None:
    """Takes the mark of a finished run off a result that was made after ``step``: it is of a course that was left.

    Else a run that dies between its last checkpoint and its result would later find that one and call itself finished.
    """
    if (result_step(plan) or 0) > step:
        path = plan.config.run.output_dir / CONFIG
        path.rename(path.with_name(f"abandoned-{CONFIG}"))


def write_result(plan: Plan, run: Run, state: TrainState) -> Iterator[str]:
    """Writes the result, ``simpletuner.json`` last; yields a line for a person on each part."""
    folder = plan.config.run.output_dir
    settings = student_settings(plan, run)
    yield write_weights(plan, run, settings, folder)
    if not run.has_adapter:
        yield from _write_further(plan, run, settings)
    document = {
        "step": state.step,
        "sampling": _sampling(plan, settings),
        "teacher": _teacher(plan),
        "loading": {
            "network": None if run.has_adapter else type(run.module).__name__,
            "scheduler": type(settings.scheduler).__name__,
            "dtype": "float32" if _exported(plan, run) == "ema" else str(plan.weight_dtype).removeprefix("torch."),
        },
        "config": plan.config.model_dump(mode="json"),
        **provenance(),
    }
    write_card(plan, document)
    with files_into(folder) as made:
        (made / CONFIG).write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")
    yield f"how to draw with it: {folder / CARD}"


def write_card(plan: Plan, document: Mapping[str, Any] | None = None) -> None:  # Any: JSON
    """Writes the card beside the result; again, where a result that is there has been judged meanwhile."""
    folder = plan.config.run.output_dir
    if document is None:
        document = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    assert document is not None
    with files_into(folder) as made:
        (made / CARD).write_text(card_text(card_facts(plan, document, str(folder))), encoding="utf8")


def write_weights(plan: Plan, run: Run, settings: SamplingSettings, folder: Path) -> str:
    """Writes the adapter or the network, and its scheduler; returns a line for a person."""
    if plan.lora is not None and plan.lora.is_lycoris:
        write_scheduler(folder, settings.scheduler)
        write_lycoris(folder / LORA_FILE, lycoris_state(run.module), plan.lora.settings)
        return f"adapter of LyCORIS: {folder / LORA_FILE}"
    if run.has_adapter:
        state, metadata = adapter_state(run.module), adapter_metadata(run.module)
        return f"adapter: {write_lora(folder, run.family, state, metadata, settings.scheduler)}"
    write_model(folder, _networks(run)[_exported(plan, run)], settings.scheduler)
    return f"model: {folder}"


def _networks(run: Run) -> dict[str, nn.Module]:
    """Returns the trained network of a full model, and its average where the method keeps one."""
    averages = {"ema": run.averages["target"].network} if run.averages else {}
    return {"online": run.module, **averages}


def _write_further(plan: Plan, run: Run, settings: SamplingSettings) -> Iterator[str]:
    """Writes the weights of a full model that are not the result, and the whole pipeline if that is asked for."""
    folder = plan.config.run.output_dir
    networks = _networks(run)
    result = networks.pop(_exported(plan, run))
    for name, network in networks.items():
        write_network(folder / name, network)
        yield f"its {'average' if name == 'ema' else 'online weights'}: {folder / name}"
    if plan.config.publish.export_pipeline:
        pipeline = whole_pipeline(run.family, run.source, result, settings.scheduler)
        yield f"a pipeline of its own: {write_pipeline(folder, pipeline)}"


def _exported(plan: Plan, run: Run) -> str:
    """Returns which weights of a full model are the result: ``ema`` means something only where there is an average."""
    return plan.config.publish.export_weights if run.averages else "online"


def card_facts(plan: Plan, document: Mapping[str, Any], here: str) -> CardFacts:
    """Returns what the card says.

    Args:
        plan: Of the run.
        document: The content of ``simpletuner.json``.
        here: Where a reader finds the files: the repository on the hub, or output_dir.
    """
    prompt = plan.validation.prompts[0] if plan.validation.prompts else "a photograph of a cat"
    method = "fine-tuned" if plan.method == "sft" else f"distilled by {plan.method}"
    loading = document["loading"]
    return CardFacts(
        title=f"{plan.source.path.rstrip('/').rpartition('/')[2]}, {method}",
        base_model=plan.source.path,
        base_config=plan.source.single_file_config,
        here=here,
        pipeline=plan.family.pipeline_class,
        network=loading["network"],
        is_lycoris=plan.lora is not None and plan.lora.is_lycoris,
        bypasses=plan.lora is not None and bool(plan.lora.settings.get("bypass_mode")),
        scheduler=loading["scheduler"],
        sampling=document["sampling"],
        dtype=getattr(torch, loading["dtype"]),
        prompt=prompt,
        size_px=plan.validation.sizes_px[0],
        seed=plan.validation.seeds[0],
        rows=plan_rows(plan),
        tags=("text-to-image", "diffusers", *(() if plan.lora is None else ("lora",)), plan.method),
        note=plan.config.publish.model_card_note,
        instance_prompt=_instance_prompt(plan),
        evaluation=_evaluation(plan),
    )


def _instance_prompt(plan: Plan) -> str | None:
    """Returns the one prompt that all images were trained with, or that stood before their captions."""
    configs = [summary.config for summary in plan.datasets]
    prompts = {config.instance_prompt if _uses_instance_prompt(config) else None for config in configs}
    return prompts.pop() if len(prompts) == 1 else None


def _uses_instance_prompt(config: DatasetConfig) -> bool:
    return config.caption_strategy == "instanceprompt" or config.only_instance_prompt or config.prepend_instance_prompt


def _evaluation(plan: Plan) -> str | None:
    """Returns the table of a run that is judged at its end, once it has been."""
    path = plan.config.run.output_dir / "evaluation" / "evaluation.md"
    judged = plan.config.validation.evaluation_prompts > 0 and path.is_file()
    return path.read_text(encoding="utf8").partition("\n\n")[0] if judged else None


def _teacher(plan: Plan) -> dict[str, float]:
    """Returns how the base model draws what the result is to draw."""
    steps, guidance = plan.family.usual_sampling
    advised = plan.distiller.defaults(plan.method_config, plan.config.model.model_type).teacher_guidance
    return {"num_inference_steps": steps, "guidance_scale": guidance if advised is None else advised}


def _sampling(plan: Plan, settings: SamplingSettings) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call with which the validation pictures are drawn."""
    numbers = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    negative = plan.validation.negative_prompt if settings.guidance_scale > 1 else ""
    return {**numbers, **settings.options, **({"negative_prompt": negative} if negative else {})}
