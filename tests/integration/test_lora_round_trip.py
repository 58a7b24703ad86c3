"""A saved adapter, loaded by stock diffusers in a process that knows nothing of us."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.families._base import lora_modules
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.publishing.export import write_lora
from simpletuner.training.adapters import adapter_metadata, adapter_state, attach_lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The published LCM-LoRA's targets (arXiv 2311.05556).
PUBLISHED = (
    *ATTENTION,
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

STOCK = """
import sys
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

model, run, out = sys.argv[1:]
pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
pipeline.load_lora_weights(run, adapter_name="lcm")
assert not any(module.startswith("simpletuner") for module in sys.modules)
state = dict(get_peft_model_state_dict(pipeline.unet, adapter_name="lcm"))
state["alpha"] = torch.tensor(float(pipeline.unet.peft_config["lcm"].lora_alpha))
inputs = load_file(run + "/inputs.safetensors")
with torch.no_grad():
    state["output"] = pipeline.unet(
        inputs["x_t"], inputs["t"], encoder_hidden_states=inputs["tokens"],
        added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["ids"]}, return_dict=False,
    )[0]
scheduler = LCMScheduler.from_pretrained(run, subfolder="scheduler")
state["steps"] = torch.tensor(scheduler.config.original_inference_steps)
save_file({name: value.contiguous() for name, value in state.items()}, out)
"""


@pytest.mark.parametrize("alpha", [4, 10])
def test_every_tensor_comes_back(tiny_model: Path, tmp_path: Path, alpha: int):
    from diffusers import LCMScheduler
    from safetensors.torch import save_file

    family, source, run = SDXL(), ModelSource(str(tiny_model)), tmp_path / "run"
    unet = family.load(source)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x_t": torch.randn(2, 4, 8, 12, generator=generator),
        "t": torch.tensor([999, 19]),
        "tokens": torch.randn(2, 77, 96, generator=generator),
        "pooled": torch.randn(2, 64, generator=generator),
        "ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2),
    }

    @torch.no_grad()
    def predict() -> torch.Tensor:
        cond = {"prompt_embeds": inputs["tokens"], "pooled_prompt_embeds": inputs["pooled"]}
        return family.forward(unet, inputs["x_t"], inputs["t"], cond, inputs["ids"])

    base = predict()
    attach_lora(unet, {"r": 4, "lora_alpha": alpha, "target_modules": list(PUBLISHED)}, seed=0)
    state = adapter_state(unet)
    with torch.no_grad():
        for value in state.values():
            value.normal_(std=0.05, generator=generator)
    trained = predict()
    assert (trained - base).abs().max() > 0.05

    file = write_lora(run, family, state, adapter_metadata(unet), LCMScheduler(original_inference_steps=40))
    assert file == run / "pytorch_lora_weights.safetensors"
    save_file(inputs, run / "inputs.safetensors")
    subprocess.run([sys.executable, "-c", STOCK, str(tiny_model), str(run), str(tmp_path / "got")], check=True, cwd=run)

    got = load_file(tmp_path / "got")
    assert got.pop("steps") == 40
    assert got.pop("alpha") == alpha
    torch.testing.assert_close(got.pop("output"), trained, rtol=1e-5, atol=1e-6)
    assert got.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in got.items())

    shapes = family.facts(source).shapes
    assert shapes is not None
    modules = {name.rpartition(".lora_")[0] for name in got}
    assert modules == lora_modules(shapes, PUBLISHED).keys()
    assert sum(name.endswith(ATTENTION) for name in modules) == len(lora_modules(shapes, ATTENTION)) == 32
    assert len(modules) == 79
