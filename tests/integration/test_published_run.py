"""The published quickstart run whole, as its reader would: the model from a hub, the result to it, wandb offline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from simpletuner.quickstart.model import TINY, make_pipeline
from tests.hub_server import WRITER, Repo, hub_server
from tests.integration.test_cli import PUBLISHED
from tests.integration.test_hub import environment
from tests.integration.test_trackers import wandb_history
from tests.tiny import image_folder

BASE = "stabilityai/stable-diffusion-xl-base-1.0"


def narrow_sdxl(folder: Path) -> Path:
    """Writes an SDXL so narrow that a core draws 1024 x 1024 px within a second: attention sees 32 x 32 places."""
    pipeline = make_pipeline(architecture=TINY)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 1, 1),
        norm_num_groups=4,
        use_linear_projection=True,
        cross_attention_dim=sum(TINY.text_widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=TINY.time_id_width,
        projection_class_embeddings_input_dim=TINY.text_widths[1] + 6 * TINY.time_id_width,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
        mid_block_add_attention=False,
    )
    pipeline.register_modules(unet=unet, vae=vae)
    pipeline.save_pretrained(folder)
    return folder


def test_the_published_quickstart_runs_whole(tmp_path: Path):
    """Changed are two paths, the user's name on the hub, and the number of steps; all else is as published.

    multidatabackend.json is in output_dir, where the guide puts it.
    """
    pytest.importorskip("wandb")
    model, output = narrow_sdxl(tmp_path / "model"), tmp_path / "output" / "sdxl-lcm"
    pictures = image_folder(tmp_path / "pictures", 3, [(1024, 1024), (1280, 800), (800, 1280)])
    changes = {"/home/user": str(tmp_path), "/path/to/your/dataset": str(pictures), "your-username": "ann"}
    changes['"max_train_steps": 10000'] = '"max_train_steps": 1'
    for name, folder in (("config.json", tmp_path / "config"), ("multidatabackend.json", output)):
        text = (PUBLISHED / name).read_text(encoding="utf8")
        for there, here in changes.items():
            text = text.replace(there, here)
        folder.mkdir(parents=True)
        (folder / name).write_text(text)

    with hub_server() as hub:
        files = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
        hub.repos[BASE] = Repo(private=False, files=files, card={"license": "openrail++"})
        environ = environment(tmp_path, hub, WRITER) | {"WANDB_MODE": "offline"}
        command = [sys.executable, "-m", "simpletuner", "train"]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        uploaded = hub.repos["ann/sdxl-lcm-distilled"]

    weights = "pytorch_lora_weights.safetensors"
    assert uploaded.private
    assert uploaded.files[weights] == (output / weights).read_bytes()
    assert json.loads(uploaded.files["scheduler/scheduler_config.json"])["_class_name"] == "LCMScheduler"
    with safe_open(output / weights, "pt") as stored:
        ranks = {stored.get_slice(name).get_shape()[0] for name in stored.keys() if ".lora_A." in name}  # noqa: SIM118
    assert ranks == {64}
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.load_lora_weights(str(output))
    sizes = {Image.open(path).size for path in (output / "validation" / "step-000001").glob("*.png")}
    assert sizes == {(1024, 1024), (1280, 768), (768, 1280)}
    (log,) = (output / "wandb").glob("offline-run-*/*.wandb")
    assert [row["_step"] for row in wandb_history(log)] == [0, 1]
