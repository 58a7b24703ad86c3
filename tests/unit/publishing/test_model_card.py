"""The card: code that can be read by Python, and metadata that the hub takes."""

import ast
from dataclasses import replace

import torch
import yaml

from simpletuner.publishing.model_card import CardFacts, card_text, inference_code

FACTS = CardFacts(
    title="a model, distilled by lcm",
    base_model="stabilityai/stable-diffusion-xl-base-1.0",
    base_config=None,
    here="someone/adapter",
    pipeline="StableDiffusionXLPipeline",
    network=None,
    scheduler="LCMScheduler",
    sampling={"num_inference_steps": 4, "guidance_scale": 0.0},
    dtype=torch.bfloat16,
    prompt='a "quoted" prompt\nof two lines',
    size_px=(1024, 768),
    seed=42,
    rows={"steps": "10"},
    tags=("lora",),
    note="A note.",
)


def calls(facts: CardFacts) -> dict[str, ast.Call]:
    """Returns the code's calls by the name of what is called."""
    tree = ast.parse(inference_code(facts))
    return {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}


def keywords(call: ast.Call) -> dict[str, str]:
    return {str(keyword.arg): ast.unparse(keyword.value) for keyword in call.keywords}


def test_an_adapter_is_drawn_with_the_base_the_adapter_and_its_scheduler() -> None:
    found = calls(FACTS)
    assert ast.literal_eval(found["StableDiffusionXLPipeline.from_pretrained"].args[0]) == FACTS.base_model
    assert ast.literal_eval(found["pipeline.load_lora_weights"].args[0]) == "someone/adapter"
    assert keywords(found["LCMScheduler.from_pretrained"]) == {"subfolder": "'scheduler'"}
    assert ast.literal_eval(found["pipeline"].args[0]) == FACTS.prompt
    arguments = keywords(found["pipeline"])
    assert [arguments[key] for key in ("width", "height", "num_inference_steps", "guidance_scale")] == [
        "1024",
        "768",
        "4",
        "0.0",
    ]


def test_a_network_takes_the_bases_place() -> None:
    found = calls(replace(FACTS, network="UNet2DConditionModel"))
    assert "pipeline.load_lora_weights" not in found
    assert ast.literal_eval(found["UNet2DConditionModel.from_pretrained"].args[0]) == "someone/adapter"
    assert keywords(found["StableDiffusionXLPipeline.from_pretrained"])["unet"] == "network"


def test_a_single_file_is_loaded_with_the_configs_that_trained_it() -> None:
    facts = replace(FACTS, base_model="models/base.safetensors")
    assert "config" not in keywords(calls(facts)["StableDiffusionXLPipeline.from_single_file"])
    named = calls(replace(facts, base_config="someone/configs"))["StableDiffusionXLPipeline.from_single_file"]
    assert keywords(named)["config"] == "'someone/configs'"


def test_the_metadata_names_a_base_of_the_hub_and_no_path_of_this_machine() -> None:
    def metadata(facts: CardFacts) -> dict[str, object]:
        return yaml.safe_load(card_text(facts).split("---")[1])

    assert metadata(FACTS)["base_model"] == FACTS.base_model
    assert "base_model" not in metadata(replace(FACTS, base_model="/home/someone/model"))
    assert metadata(FACTS)["tags"] == ["lora"]
    assert "A note." in card_text(FACTS)
    assert "instance_prompt" not in metadata(FACTS)
    assert metadata(replace(FACTS, instance_prompt="sks: a dog"))["instance_prompt"] == "sks: a dog"
