"""A saved adapter, loaded by stock diffusers in a process that knows nothing of us."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner import registry
from simpletuner.denoiser import adapter_layers
from simpletuner.families._base import lora_modules
from simpletuner.families._source import ModelSource
from simpletuner.publishing.export import write_lora
from simpletuner.training.adapters import adapter_metadata, adapter_state, attach_lora
from tests.tiny import RECIPES

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The published LCM-LoRA's targets (arXiv 2311.05556).
PUBLISHED = (
    *ATTENTION,
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

STOCK = """
import sys
import diffusers
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

name, model, run, out = sys.argv[1:]
pipeline = getattr(diffusers, name).from_pretrained(model, use_safetensors=True)
pipeline.load_lora_weights(run, adapter_name="lcm")
assert not any(module.startswith("simpletuner") for module in sys.modules)
state = dict(get_peft_model_state_dict(pipeline.unet, adapter_name="lcm"))
state["alpha"] = torch.tensor(float(pipeline.unet.peft_config["lcm"].lora_alpha))
inputs = load_file(run + "/inputs.safetensors")
with torch.no_grad():
    state["output"] = pipeline.unet(
        inputs["x_t"], inputs["t"], encoder_hidden_states=inputs["tokens"],
        added_cond_kwargs={key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs},
        return_dict=False,
    )[0]
scheduler = diffusers.LCMScheduler.from_pretrained(run, subfolder="scheduler")
state["steps"] = torch.tensor(scheduler.config.original_inference_steps)
save_file({name: value.contiguous() for name, value in state.items()}, out)
"""


@pytest.mark.parametrize(("alpha", "use_rslora"), [(4, False), (10, False), (10, True)])
@pytest.mark.parametrize(("name", "num_attention", "num_modules"), [("sdxl", 32, 79), ("sd1x", 32, 79)])
def test_every_tensor_comes_back(
    tmp_path: Path, name: str, num_attention: int, num_modules: int, alpha: int, use_rslora: bool
):
    from diffusers import LCMScheduler
    from safetensors.torch import save_file

    source, run = ModelSource(str(RECIPES[name](tmp_path / "model"))), tmp_path / "run"
    family = registry.load("families", name)().for_model(source)
    unet = family.load(source)
    generator = torch.Generator().manual_seed(0)
    encoders = family.load_encoders(source, torch.device("cpu"), torch.float32, frozenset({"text"}))
    cond = family.encode_prompt(encoders, ["a red star", "a blue ring"])
    inputs = {
        "x_t": torch.randn(2, 4, 8, 12, generator=generator),
        "t": torch.tensor([999, 19]),
        "tokens": cond["prompt_embeds"],
    }
    geometry = torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
    if "pooled_prompt_embeds" in cond:
        inputs |= {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": geometry}

    @torch.no_grad()
    def predict() -> torch.Tensor:
        return family.forward(unet, inputs["x_t"], inputs["t"], cond, geometry)

    base = predict()
    settings = {"r": 4, "lora_alpha": alpha, "use_rslora": use_rslora, "target_modules": list(PUBLISHED)}
    attach_lora(unet, settings, seed=0)
    assert {layer.scaling["default"] for layer in adapter_layers(unet)} == {alpha / (2 if use_rslora else 4)}
    state = adapter_state(unet)
    with torch.no_grad():
        for value in state.values():
            value.normal_(std=0.05, generator=generator)
    trained = predict()
    assert (trained - base).abs().max() > 0.05

    file = write_lora(run, family, state, adapter_metadata(unet), LCMScheduler(original_inference_steps=40))
    assert file == run / "pytorch_lora_weights.safetensors"
    save_file(inputs, run / "inputs.safetensors")
    arguments = family.pipeline_class, source.path, str(run), str(tmp_path / "got")
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=run)

    got = load_file(tmp_path / "got")
    assert got.pop("steps") == 40
    assert got.pop("alpha") == alpha
    torch.testing.assert_close(got.pop("output"), trained, rtol=1e-5, atol=1e-6)
    assert got.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in got.items())

    shapes = family.facts(source).shapes
    assert shapes is not None
    modules = {key.rpartition(".lora_")[0] for key in got}
    assert modules == lora_modules(shapes, PUBLISHED).keys()
    num_found = sum(module.endswith(ATTENTION) for module in modules)
    assert num_found == len(lora_modules(shapes, ATTENTION)) == num_attention
    assert len(modules) == num_modules
