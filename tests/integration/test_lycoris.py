"""LyCORIS adapters: they begin as the base, learn, resume, and their file is read by LyCORIS itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.config.errors import UserError
from simpletuner.config.load import load
from simpletuner.denoiser import adapters_off
from simpletuner.exporting import export
from simpletuner.plan_view import plan_text
from simpletuner.planning import look_ahead
from simpletuner.sample import Wishes, sample
from simpletuner.training.adapters import trainable_parameters
from simpletuner.training.lycoris import load_lycoris
from tests.integration.conftest import Project

pytest.importorskip("lycoris")

PROMPT = "a red picture"
LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 4}
PRESET = {"target_module": ["Attention", "FeedForward"], "module_algo_map": {"Attention": {"factor": 8}}}
FILES: dict[str, dict[str, Any]] = {
    "lokr": {**LOKR, "apply_preset": PRESET},
    "lokr-everywhere": {**LOKR, "linear_dim": 2},
    "loha": {"algo": "loha", "linear_dim": 2, "linear_alpha": 2, "apply_preset": PRESET},
    "locon": {"algo": "locon", "linear_dim": 2, "linear_alpha": 1, "conv_dim": 2},
    "glora": {"algo": "glora", "linear_dim": 2, "linear_alpha": 1, "apply_preset": PRESET},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4, "linear_alpha": 1, "apply_preset": PRESET},
    "boft": {"algo": "boft", "linear_dim": 4, "linear_alpha": 1, "apply_preset": PRESET},
}


@pytest.fixture
def lycoris(project: Project) -> Project:
    project.settings |= {"lora_type": "lycoris", "lycoris_config": "lycoris.json", "lora_rank": None}
    return told(project, FILES["lokr"])


def told(project: Project, settings: dict[str, Any]) -> Project:
    project.folder.mkdir(parents=True, exist_ok=True)
    (project.folder / "lycoris.json").write_text(json.dumps(settings))
    return project


def predict(module: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    width = module.config.cross_attention_dim
    pooled = module.config.projection_class_embeddings_input_dim - 6 * module.config.addition_time_embed_dim
    x, tokens, text = (torch.randn(*size, generator=generator) for size in ((2, 4, 8, 8), (2, 7, width), (2, pooled)))
    added = {"text_embeds": text, "time_ids": torch.full((2, 6), 64.0)}
    return module(x, torch.tensor([500, 20]), encoder_hidden_states=tokens, added_cond_kwargs=added).sample


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_begins_as_the_base_and_can_be_switched_off_again(lycoris: Project, tiny_model: Path, name: str):
    run = told(lycoris, FILES[name]).build()
    base = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    with torch.no_grad():
        expected = predict(base)
        torch.testing.assert_close(predict(run.module), expected)
        for parameter in trainable_parameters(run.module).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        changed = predict(run.module)
        assert (changed - expected).abs().max() > 1e-4
        with adapters_off(run.module):
            assert torch.equal(predict(run.module), expected)
        assert torch.equal(predict(run.module), changed)


@pytest.mark.parametrize("name", FILES)
def test_what_was_learned_is_read_by_lycoris_itself(lycoris: Project, tiny_model: Path, name: str):
    """In a process that knows nothing of us."""
    told(lycoris, FILES[name]).train(validation_prompt=PROMPT, disable_benchmark=True, learning_rate=0.05)
    assert all(row["grad_norm"] > 0 for row in lycoris.rows())
    code = (lycoris.output / "README.md").read_text().partition("```python")[2].partition("```")[0]
    assert "create_lycoris_from_weights" in code
    command = [sys.executable, "-c", "import sys, torch\ntorch.set_num_threads(1)\nexec(sys.stdin.read())"]
    done = subprocess.run(command, input=code, cwd=lycoris.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (own,) = (lycoris.output / "validation" / "step-000002").glob("*.png")
    with Image.open(own) as one, Image.open(lycoris.folder / "image.png") as two:
        assert max(high for _, high in ImageChops.difference(one.convert("RGB"), two).getextrema()) <= 1
    with safe_open(lycoris.output / "pytorch_lora_weights.safetensors", framework="pt") as file:
        told_of_itself = json.loads(file.metadata()["lycoris_config"])
    bypasses = {"bypass_mode": True} if name in ("lokr", "lokr-everywhere", "loha", "locon") else {}
    assert told_of_itself == FILES[name] | bypasses


def test_small_changes_are_not_rounded_away_in_bf16(lycoris: Project):
    """As they are when LyCORIS adds them to the weights, which is what it does unless it is told otherwise."""
    changes: dict[bool, float] = {}
    for bypasses in (True, False):
        settings = FILES["lokr"] if bypasses else FILES["lokr"] | {"bypass_mode": False}
        run = told(lycoris, settings).build(mixed_precision="bf16")
        linear = (module for module in run.module.modules() if isinstance(module, torch.nn.Linear))
        layer = next(module for module in linear if hasattr(module, "_active_adapter"))
        adapter: Any = layer.forward._adapted.__self__
        x = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
        x[:, ::2] = -1  # so that the layer itself gives 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer.weight.fill_(1.0)  # whose next number in bf16 is 1.008
            adapter.lokr_w1.zero_()[0, 0] = 1.0
            adapter.lokr_w2.zero_()[0, 0] = 1e-3
            with adapters_off(run.module):
                plain = layer(x)
            changes[bypasses] = float((layer(x) - plain).abs().max())
    assert changes[False] == 0
    assert changes[True] == pytest.approx(1e-3, rel=0.01)


def test_a_resumed_run_is_the_straight_one(lycoris: Project, tmp_path: Path):
    options = {"checkpoint_step_interval": 1, "max_train_steps": 3}
    lycoris.train(**options)
    parted = told(lycoris.at(tmp_path / "parted"), FILES["lokr"])
    parted.train(**options | {"max_train_steps": 1})
    parted.train(**options)
    one, two = (load_file(each.output / "pytorch_lora_weights.safetensors") for each in (lycoris, parted))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert parted.rows() == lycoris.rows()


def test_recomputed_blocks_use_the_adapter_of_their_forward(lycoris: Project, tmp_path: Path):
    lycoris.train()
    other = told(lycoris.at(tmp_path / "other"), FILES["lokr"])
    other.train(gradient_checkpointing=True)
    for one, two in zip(lycoris.rows(), other.rows(), strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_two_processes_learn_what_one_does(lycoris: Project, tmp_path: Path):
    lycoris.train(train_batch_size=2)
    both = told(lycoris.at(tmp_path / "both"), FILES["lokr"])
    done = both.launch(2, train_batch_size=1)
    assert done.returncode == 0, done.stderr
    for one, two in zip(lycoris.rows(), both.rows(), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_it_is_drawn_with_and_merged(lycoris: Project, tiny_model: Path, tmp_path: Path):
    lycoris.train(validation_disable=True, learning_rate=0.05)
    list(sample(lycoris.output, Wishes([PROMPT], [1]), tmp_path / "drawn"))
    list(export(lycoris.output, "pipeline", tmp_path / "whole"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    adapted = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    base = predict(adapted)
    load_lycoris(adapted, lycoris.output / "pytorch_lora_weights.safetensors")
    with torch.no_grad():
        assert (predict(adapted) - base).abs().max() > 1e-4
        torch.testing.assert_close(predict(pipeline.unet), predict(adapted), rtol=1e-4, atol=1e-5)
    assert not any("lycoris" in name for name in pipeline.unet.state_dict())
    with pytest.raises(UserError, match="--to kohya: this adapter is LyCORIS's"):
        list(export(lycoris.output, "kohya", tmp_path / "k"))


def test_the_plan_says_it(lycoris: Project):
    assert "trains      LyCORIS lokr, linear_dim 10000, linear_alpha 1, factor 4: counted when" in plan_text(
        look_ahead(load(lycoris.write()))
    )
    notices = look_ahead(load(lycoris.write(lora_rank=8))).notices
    assert "lora_rank: has no effect: lycoris_config says it" in notices


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"algo": "lokrr"}, {}, "lycoris_config: algo: unknown value \"lokrr\" - did you mean 'lokr'?"),
        (
            {"algo": "lokr", "linear_dimm": 4},
            {},
            "lycoris_config: unknown key 'linear_dimm' - did you mean 'linear_dim'?",
        ),
        ({"algo": "lokr", "multiplier": 0.5}, {}, "lycoris_config: multiplier: an adapter is trained with 1"),
        ({"apply_preset": {"targets": []}}, {}, "lycoris_config: apply_preset: unknown key 'targets'"),
        (["lokr"], {}, "lycoris_config: '"),
        (FILES["lokr"], {"init_lora": "lycoris.json"}, "init_lora: it does not go with lora_type lycoris"),
        (FILES["lokr"], {"base_model_precision": "int8-quanto"}, "base_model_precision: it does not go with"),
        (FILES["lokr"], {"lycoris_config": None}, "lycoris_config: required by lora_type lycoris"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(
    lycoris: Project, settings: Any, options: dict[str, Any], said: str
):
    told(lycoris, settings)
    with pytest.raises(UserError) as caught:
        look_ahead(load(lycoris.write(**options)))
    assert [line for line in caught.value.lines if line.startswith(said)], caught.value.lines


def test_layers_that_are_not_there_are_one_line(lycoris: Project):
    told(lycoris, {"algo": "lokr", "apply_preset": {"target_module": ["Nothing"]}})
    with pytest.raises(UserError, match="apply_preset: no layer of the model is of these target_module"):
        lycoris.build()


def test_without_the_package_it_is_one_line(lycoris: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simpletuner.config.lycoris.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs its package: pip install "simpletuner\[lycoris\]"'):
        look_ahead(load(lycoris.write()))
