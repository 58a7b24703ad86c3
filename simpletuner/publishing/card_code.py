"""The programs of a model card: what draws with a result in stock diffusers, and with what else it goes together."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner.publishing.model_card import CardFacts

STYLE, CONTROLNET, PHOTO, EDGES = "style.safetensors", "controlnet", "photo.png", "edges.png"
"""What the reader is to put in: an adapter, a ControlNet's folder or hub id, and two pictures."""


def further_code(facts: "CardFacts") -> dict[str, str]:
    """Returns heading -> program that goes on after ``inference_code``."""
    found = {
        "From a picture": _from_picture(facts),
        "With a ControlNet": _with_controlnet(facts),
    }
    if facts.network is None and not facts.is_lycoris:
        found = {"With a style LoRA": _with_style(facts), **found}
    return found


def call(facts: "CardFacts", pipeline: str, **further: str) -> list[str]:
    """Returns the lines that draw one picture.

    Args:
        facts: How.
        pipeline: The variable.
        further: Argument -> expression; they take the place of width and height.
    """
    size = f"width={facts.size_px[0]}, height={facts.size_px[1]}"
    arguments = "".join(f", {key}={value!r}" for key, value in facts.sampling.items())
    given = ", ".join(f"{key}={value}" for key, value in further.items()) if further else size
    return [
        f"image = {pipeline}(",
        f"    {facts.prompt!r},",
        f"    {given}{arguments},",
        f"    generator=torch.Generator().manual_seed({facts.seed}),",
        ").images[0]",
    ]


def _with_style(facts: "CardFacts") -> str:
    return _program(
        f'pipeline.load_lora_weights({STYLE!r}, adapter_name="style")',
        'pipeline.set_adapters(["default_0", "style"], adapter_weights=[1.0, 0.8])',
        *call(facts, "pipeline"),
        'pipeline.delete_adapters("style")',
        'pipeline.set_adapters("default_0")',
    )


def _from_picture(facts: "CardFacts") -> str:
    steps = max(2, facts.sampling["num_inference_steps"])
    facts = replace(facts, sampling={**facts.sampling, "num_inference_steps": steps})
    width, height = facts.size_px
    return _program(
        "from diffusers import AutoPipelineForImage2Image",
        "from diffusers.utils import load_image",
        "",
        f"photo = load_image({PHOTO!r}).resize(({width}, {height}))",
        "from_picture = AutoPipelineForImage2Image.from_pipe(pipeline)",
        *call(facts, "from_picture", image="photo", strength="0.6"),
    )


def _with_controlnet(facts: "CardFacts") -> str:
    width, height = facts.size_px
    return _program(
        "from diffusers import AutoPipelineForText2Image, ControlNetModel",
        "from diffusers.utils import load_image",
        "",
        f"edges = load_image({EDGES!r}).resize(({width}, {height}))",
        f"network = ControlNetModel.from_pretrained({CONTROLNET!r}, torch_dtype=dtype).to(pipeline.device)",
        "controlled = AutoPipelineForText2Image.from_pipe(pipeline, controlnet=network)",
        *call(facts, "controlled", image="edges", controlnet_conditioning_scale="0.7"),
    )


def _program(*lines: str) -> str:
    return "\n".join(lines) + "\n"
