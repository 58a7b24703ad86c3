"""What of a result is uploaded: weights, scheduler, pictures, and a card and settings that others may read."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpletuner.data.cache import digest
from simpletuner.plan import Plan
from simpletuner.publishing.hub import Hub
from simpletuner.publishing.model_card import CardFacts, card_text
from simpletuner.publishing.result import CARD, CONFIG, card_facts

_NUM_SAMPLES = 4
"""Pictures in the card's metadata; all of the last validation are uploaded."""


def push_result(plan: Plan, hub: Hub) -> bool:
    """Uploads the result in output_dir; returns whether that was done at last."""
    return hub.upload(_files(plan, hub), f"step {plan.max_steps}")


def _files(plan: Plan, hub: Hub) -> dict[str, Path | bytes]:
    """Returns what is uploaded, by its path in the repository."""
    folder = plan.config.run.output_dir
    document = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    pictures = _pictures(plan, document["step"])
    paths = [*_weights(plan, folder), *pictures]
    facts = _public_facts(plan, document, hub, [path.relative_to(folder).as_posix() for path in pictures])
    public = {**document, "sampling": dict(facts.sampling), "config": plan.config.published()}
    return {
        **{path.relative_to(folder).as_posix(): path for path in paths},
        CARD: card_text(facts).encode(),
        CONFIG: (json.dumps(public, indent=1) + "\n").encode(),
    }


def _weights(plan: Plan, folder: Path) -> list[Path]:
    """Returns the files that diffusers loads: of an adapter or a network, its scheduler, and a whole pipeline."""
    names = ["scheduler/*.json", "pipeline/**/*.*"]
    if plan.lora is None:
        names += ["config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index*.json"]
    else:
        names += ["pytorch_lora_weights.safetensors"]
    return sorted({path for name in names for path in folder.glob(name) if path.is_file()})


def _pictures(plan: Plan, step: int) -> list[Path]:
    """Returns the contact sheet and the result's own pictures; none where one shows what the environment filled in."""
    folder = plan.config.run.output_dir / "validation"
    prompts = (*plan.validation.prompts, plan.validation.negative_prompt)
    if any(plan.config.hide(prompt) != prompt for prompt in prompts):
        return []
    return [*folder.glob("contact_sheet.png"), *sorted(folder.glob(f"step-{step:06d}*/*.png"))]


def _public_facts(plan: Plan, document: Mapping[str, Any], hub: Hub, pictures: list[str]) -> CardFacts:
    """Returns what the card says to others: no value of the environment, and no path of this machine."""
    family = plan.family.for_model(plan.source)
    facts = card_facts(replace(plan, family=family), document, hub.repo_id)
    prompts = {digest(prompt)[:6]: prompt for prompt in plan.validation.prompts}
    drawn = {path: prompts[key] for path in pictures for key in prompts if f"-{key}-" in path}
    sheets = [path for path in pictures if path.endswith("contact_sheet.png")]
    hide, hide_path = plan.config.hide, plan.config.hide_path
    return replace(
        facts,
        title=hide(facts.title),
        base_model=hide_path(facts.base_model),
        base_config=hide_path(facts.base_config) if facts.base_config else None,
        sampling={key: hide(value) if isinstance(value, str) else value for key, value in facts.sampling.items()},
        prompt=hide(facts.prompt),
        rows={heading: hide_path(text) for heading, text in facts.rows.items()},
        note=hide(facts.note) if facts.note else None,
        instance_prompt=hide(facts.instance_prompt) if facts.instance_prompt else None,
        licence=hub.licence,
        sheet=sheets[0] if sheets else None,
        samples=dict(list(drawn.items())[:_NUM_SAMPLES]),
    )
