"""The README beside the weights: what was trained, and the exact code that draws with it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub import ModelCardData

from simpletuner.publishing.card_code import call, further_code

_DTYPES = {torch.float32: "torch.float32", torch.bfloat16: "torch.bfloat16", torch.float16: "torch.float16"}

_BYPASS = (
    "for layer in adapter.loras:  # else small changes are rounded away when they are added to weights of 16 bits",
    "    layer.bypass_mode = True",
)


@dataclass(frozen=True)
class CardFacts:
    """What the card says of a run."""

    title: str
    base_model: str
    """Hub id or path, as the config names it."""
    base_config: str | None
    """Folder or hub id with the component configs of a base model that is a single file; None: diffusers guesses."""
    here: str
    """Where a reader finds the files: the repository on the hub, or output_dir."""
    pipeline: str
    """Name of the diffusers pipeline class."""
    network: str | None
    """Name of the network's class for a full model; None: the files hold an adapter."""
    scheduler: str
    """Name of the diffusers scheduler class."""
    sampling: Mapping[str, Any]  # Any: arguments of the pipeline's call
    """num_inference_steps, guidance_scale and what else was set, such as negative_prompt."""
    dtype: torch.dtype
    prompt: str
    size_px: tuple[int, int]
    seed: int
    rows: Mapping[str, str]
    """What was trained: heading -> text."""
    tags: tuple[str, ...]
    note: str | None
    is_lycoris: bool = False
    """Whether the adapter is LyCORIS's, which its own package loads."""
    bypasses: bool = False
    """Whether that one's changes are computed beside the layers."""
    instance_prompt: str | None = None
    """The words that call what was learned, where all images were trained with them."""
    licence: Mapping[str, str] = field(default_factory=dict[str, str])
    """The base model's, by the hub's own keys: license, and license_name and license_link where it has them."""
    sheet: str | None = None
    """The contact sheet, as a path beside the card."""
    evaluation: str | None = None
    """A table of what was judged, as Markdown."""
    samples: Mapping[str, str] = field(default_factory=dict[str, str])
    """Pictures that the model drew, as paths beside the card -> their prompts."""


def card_text(facts: CardFacts) -> str:
    """Returns the card as Markdown with the hub's metadata in front."""
    # A path of this machine means nothing to the hub, which refuses a card whose base_model is no repository.
    base = facts.base_model if looks_like_hub_id(facts.base_model) else None
    widget = [{"text": prompt, "output": {"url": path}} for path, prompt in facts.samples.items()]
    metadata: dict[str, Any] = {**facts.licence, **({"widget": widget} if widget else {})}
    if facts.instance_prompt:
        metadata["instance_prompt"] = facts.instance_prompt
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(facts.tags),
        **metadata,
    )
    table = "\n".join(f"| {heading} | {text} |" for heading, text in facts.rows.items())
    note = f"\n{facts.note}\n" if facts.note else ""
    sheet = f"\n![What was drawn while it was trained]({facts.sheet})\n" if facts.sheet else ""
    further = "".join(f"\n### {heading}\n\n```python\n{code}```\n" for heading, code in further_code(facts).items())
    evaluation = f"\n## How good it is\n\n{facts.evaluation.strip()}\n" if facts.evaluation else ""
    return f"""---
{data.to_yaml()}
---

# {facts.title}
{note}{sheet}
## Draw with it

```python
{inference_code(facts)}```

The scheduler of this folder belongs to the weights: it samples on the noise times that were trained.

The same pipeline goes on, with files of yours in place of the names:
{further}{evaluation}
## What was trained

| | |
|---|---|
{table}

The whole configuration is in `simpletuner.json`.
"""


def inference_code(facts: CardFacts) -> str:
    """Returns a Python program that draws one picture with stock diffusers."""
    classes = sorted(name for name in {facts.pipeline, facts.scheduler, facts.network} if name is not None)
    lines = [
        "import torch",
        f"from diffusers import {', '.join(classes)}",
        "",
        f"dtype = {_DTYPES[facts.dtype]}",
    ]
    single_file = facts.base_model.endswith(".safetensors")
    arguments_of_base = [repr(facts.base_model)]
    if single_file and facts.base_config is not None:
        arguments_of_base.append(f"config={facts.base_config!r}")
    if facts.network is not None:
        lines.append(f"network = {facts.network}.from_pretrained({facts.here!r}, torch_dtype=dtype)")
        arguments_of_base.append("unet=network")
    loader = "from_single_file" if single_file else "from_pretrained"
    lines.append(f"pipeline = {facts.pipeline}.{loader}({', '.join([*arguments_of_base, 'torch_dtype=dtype'])})")
    if facts.network is None and not facts.is_lycoris:
        lines.append(f"pipeline.load_lora_weights({facts.here!r})")
    lines += [
        f'pipeline.scheduler = {facts.scheduler}.from_pretrained({facts.here!r}, subfolder="scheduler")',
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        *(_lycoris(facts) if facts.is_lycoris else ()),
        *call(facts, "pipeline"),
        'image.save("image.png")',
    ]
    return "\n".join(lines) + "\n"


def _lycoris(facts: CardFacts) -> list[str]:
    """Returns the lines that put an adapter of LyCORIS on the network (pip install lycoris-lora)."""
    name = "pytorch_lora_weights.safetensors"
    at_hub = looks_like_hub_id(facts.here)
    file = f"hf_hub_download({facts.here!r}, {name!r})" if at_hub else repr(f"{facts.here}/{name}")
    return [
        *(["from huggingface_hub import hf_hub_download"] if at_hub else []),
        "from lycoris import create_lycoris_from_weights  # pip install lycoris-lora",
        f"adapter, _ = create_lycoris_from_weights(1.0, {file}, pipeline.unet)",
        *(_BYPASS if facts.bypasses else ()),
        "adapter.apply_to()",
        "adapter.to(pipeline.device, dtype)",
    ]


def looks_like_hub_id(name: str) -> bool:
    """Whether a model's name can be a repository of the hub, and is no path of this machine."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not name.endswith(".safetensors")
