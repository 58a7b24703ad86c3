import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.config.errors import UserError
from simpletuner.families._base import lora_metadata, lora_modules, lora_num_parameters
from simpletuner.families._source import ModelSource, read_shapes
from simpletuner.families.sdxl import SDXL

HUB_ID = "someone/tiny-sdxl"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty hub cache, on a machine without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def _cache_model(hub_cache: Path, folder: Path) -> Path:
    repository = hub_cache / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    return shutil.copytree(folder, repository / "snapshots/0123abc")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "pretrained_model_name_or_path: '/no/such/folder' does not exist"),
        ("model.safetensors", "'model.safetensors' does not exist"),
        ("no-slash", "'no-slash' does not exist"),
        ("../someone/model", "does not exist"),
        ("some..one/mo--del", "does not exist"),
    ],
)
def test_a_path_that_names_nothing(path, message):
    with pytest.raises(UserError, match=message):
        SDXL().facts(ModelSource(path))


def test_a_folder_that_is_no_model(tmp_path, tiny_model):
    with pytest.raises(UserError, match="is no diffusers model: it has no unet/config.json"):
        SDXL().facts(ModelSource(str(tmp_path)))
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "vae/diffusion_pytorch_model.safetensors").rename(copy / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="has no safetensors weights for its vae.*convert pickled weights"):
        SDXL().facts(ModelSource(str(copy)))
    with pytest.raises(UserError, match="no safetensors weights of the variant 'fp16' for its unet"):
        SDXL().facts(ModelSource(str(tiny_model), variant="fp16"))


def test_each_place_names_its_own_key(tiny_model):
    for key in ("vae", "unet"):
        with pytest.raises(UserError, match=f"^pretrained_{key}_model_name_or_path: '/nowhere' does not exist"):
            SDXL().facts(ModelSource(str(tiny_model), **{f"{key}_path": "/nowhere"}))


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="is no .safetensors file"):
        SDXL().facts(ModelSource(str(tmp_path / "model.ckpt")))


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="a.safetensors' is damaged"):
        read_shapes(tmp_path / "a.safetensors")


def test_sharded_weights_and_variant(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    whole = copy / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.unlink()
    names = sorted(state)
    shards = {"a.fp16.safetensors": names[::2], "b.fp16.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, copy / "unet" / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    path = copy / "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    path.write_text(json.dumps(index))
    source = ModelSource(str(copy), variant="fp16")
    assert source.shapes("unet") == read_shapes(tiny_model / "unet/diffusion_pytorch_model.safetensors")
    (copy / "unet/b.fp16.safetensors").unlink()
    assert source.shapes("unet") is None


def test_hub_model_in_the_cache_is_read_without_network(hub_cache, tiny_model):
    _cache_model(hub_cache, tiny_model)
    source, local = ModelSource(HUB_ID), ModelSource(str(tiny_model))
    assert SDXL().facts(source) == SDXL().facts(local)
    ours, theirs = (SDXL().load(place).state_dict() for place in (source, local))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert SDXL().fingerprint(source, "text") == SDXL().fingerprint(local, "text")


def test_hub_model_elsewhere_is_planned_and_not_downloaded(hub_cache):
    facts = SDXL().facts(ModelSource(HUB_ID))
    assert facts.shapes is None
    assert facts.scheduler_config is None
    assert facts.notices == (f"'{HUB_ID}' is no folder here: it will be downloaded from the hub",)
    assert not hub_cache.exists()


def test_hub_model_offline(hub_cache):
    with pytest.raises(UserError) as caught:
        SDXL().load(ModelSource(HUB_ID))
    assert len(caught.value.lines) == 1
    assert "\n" not in caught.value.lines[0]
    assert "could not be had from the hub" in caught.value.lines[0]
    assert "give a local folder" in caught.value.lines[0]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "could not be had from the hub .*`hf auth login`"),
        (403, "GatedRepo", f"is gated: accept its terms at https://huggingface.co/{HUB_ID}.*`hf auth login`"),
        (404, "RevisionNotFound", "^revision: .* has no revision 'v9'"),
        (500, "", "could not be had from the hub"),
    ],
)
def test_answers_of_the_hub(tmp_path, monkeypatch, status, code, expected):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(UserError, match=expected) as caught:
            SDXL().load(ModelSource(HUB_ID, revision="v9"))
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(caught.value)


def test_lora_counts():
    shapes = {
        "a.attn.to_q.weight": (10, 6),
        "a.attn.to_q.bias": (10,),
        "a.conv1.weight": (8, 4, 3, 3),
        "a.norm.weight": (10,),
        "b.not_to_q.weight": (10, 6),
        "to_q.weight": (5, 5),
    }
    modules = lora_modules(shapes, ["to_q", "conv1", "norm"])
    assert modules == {"a.attn.to_q": (10, 6), "a.conv1": (8, 4, 3, 3), "to_q": (5, 5)}
    assert lora_num_parameters(modules, 2) == 2 * (10 + 6) + 2 * (8 + 4 * 9) + 2 * (5 + 5)


def test_published_lcm_lora_has_its_published_size():
    """196.8M parameters on 788 layers (arXiv 2311.05556, table 1), counted from the shapes of the published UNet."""
    from diffusers import UNet2DConditionModel

    from simpletuner.distillers.lcm import LCM, LCMConfig

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_567_463_684
    modules = lora_modules(shapes, LCM.defaults(LCMConfig(), "lora").lora_targets or ())
    assert len(modules) == 788
    assert lora_num_parameters(modules, 64) == 196_751_360


def test_lora_metadata_is_what_any_peft_understands():
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_v", "to_q"], init_lora_weights="gaussian").to_dict()
    kept = lora_metadata(config)
    assert kept["target_modules"] == ["to_q", "to_v"]
    assert (kept["r"], kept["lora_alpha"]) == (4, 6)
    assert len(kept) == 9
    assert LoraConfig(**kept).lora_alpha == 6
