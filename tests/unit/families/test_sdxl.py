import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.config.errors import UserError
from simpletuner.families._source import ModelSource
from simpletuner.families._unet import guidance_embedding
from simpletuner.families.sdxl import SDXL

CPU = torch.device("cpu")
PROMPTS = ["a small red star at the top left", "x" * 300 + " and a ring", ""]


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> ModelSource:
    return ModelSource(str(tiny_model))


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path):
    from diffusers import StableDiffusionXLPipeline

    found = StableDiffusionXLPipeline.from_pretrained(tiny_model, use_safetensors=True, add_watermarker=False)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def encoders(source: ModelSource):
    return SDXL().load_encoders(source, CPU, torch.float32, frozenset({"vae", "text"}))


def test_encode_prompt_equals_the_pipeline(pipeline, encoders):
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device=CPU, do_classifier_free_guidance=False)
    cond = SDXL().encode_prompt(encoders, PROMPTS)
    assert torch.equal(cond["prompt_embeds"], tokens)
    assert torch.equal(cond["pooled_prompt_embeds"], pooled)
    assert (tokens[0] - tokens[2]).abs().max() > 1e-3


@pytest.mark.parametrize("zeros", [True, False])
def test_uncond_equals_the_pipeline(pipeline, encoders, tiny_model, tmp_path, zeros):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (copy / "model_index.json").write_text(json.dumps(index))
    family = SDXL().for_model(ModelSource(str(copy)))
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, tokens, _, pooled = pipeline.encode_prompt(PROMPTS, device=CPU)
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    uncond = family.uncond(family.encode_prompt(encoders, PROMPTS), family.encode_prompt(encoders, [""]))
    torch.testing.assert_close(uncond["prompt_embeds"], tokens, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(uncond["pooled_prompt_embeds"], pooled, rtol=1e-6, atol=1e-6)
    assert bool(uncond["prompt_embeds"].any()) is not zeros


def test_forward_is_the_pipelines_own_call(pipeline, encoders):
    """Portrait and cropped, so that swapped sides or a forgotten crop show."""
    family, calls = SDXL(), []

    def record(_module, args, kwargs, output):
        calls.append((args, kwargs, output[0]))

    handle = pipeline.unet.register_forward_hook(record, with_kwargs=True)
    pipeline(
        prompt=["a red star", "a blue ring"],
        height=96,
        width=64,
        original_size=(1365, 771),
        crops_coords_top_left=(5, 0),
        target_size=(96, 64),
        num_inference_steps=2,
        guidance_scale=5.0,
        output_type="latent",
    )
    handle.remove()
    cond = family.encode_prompt(encoders, ["a red star", "a blue ring"])
    both = {key: torch.cat([value, cond[key]]) for key, value in family.uncond(cond).items()}
    geometry = torch.tensor([[1365.0, 771, 5, 0, 96, 64]] * 4)
    ids = pipeline._get_add_time_ids((1365, 771), (5, 0), (96, 64), torch.float32, 64)
    assert torch.equal(geometry[:1], ids)
    assert len(calls) == 2
    for (sample, t), kwargs, output in calls:
        assert torch.equal(kwargs["added_cond_kwargs"]["time_ids"], geometry)
        ours = family.forward(pipeline.unet, sample, t.expand(4), both, geometry)
        torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-6)
        swapped = family.forward(pipeline.unet, sample, t.expand(4), both, geometry[:, [1, 0, 2, 3, 4, 5]])
        assert (swapped - output).abs().max() > 1e-5


def test_time_ids_are_float32_in_a_bf16_network(source):
    family, seen = SDXL(), []
    unet = family.load(source, dtype=torch.bfloat16)
    unet.add_time_proj.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    cond = {"prompt_embeds": torch.zeros(1, 77, 96), "pooled_prompt_embeds": torch.zeros(1, 64)}
    geometry = torch.tensor([[1365.0, 771, 0, 0, 1024, 1024]])
    out = family.forward(unet, torch.zeros(1, 4, 8, 8), torch.tensor([999]), cond, geometry)
    assert out.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], geometry.flatten())


def test_guidance_embedding_is_the_pipelines(pipeline):
    w = torch.tensor([0.0, 3.25, 14.0])
    expected = pipeline.get_guidance_scale_embedding(w, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w, 256), expected, rtol=0, atol=1e-6)


def test_a_network_that_embeds_w_refuses_to_run_without_it(source):
    family = SDXL()
    plain, embedding = family.load(source), family.load(source, guidance_embed_dim=256)
    assert embedding.config["time_cond_proj_dim"] == 256
    cond = {"prompt_embeds": torch.ones(2, 77, 96), "pooled_prompt_embeds": torch.ones(2, 64)}
    inputs = torch.ones(2, 4, 8, 8), torch.tensor([999, 19]), cond, torch.full((2, 6), 64.0)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        family.forward(embedding, *inputs)
    w = torch.tensor([3.0, 15.0])
    before = family.forward(embedding, *inputs, w)
    assert torch.equal(before, family.forward(plain, *inputs))  # cond_proj is zero: the student starts as its teacher
    torch.nn.init.normal_(embedding.time_embedding.cond_proj.weight)
    assert (family.forward(embedding, *inputs, w) - before).abs().max() > 1e-4


def test_latents_are_what_the_pipeline_decodes(pipeline, encoders):
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = SDXL().encode_image(encoders, pixels)
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean / pipeline.vae.config["scaling_factor"], posterior.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std / pipeline.vae.config["scaling_factor"], posterior.std, rtol=1e-6, atol=1e-6)


def test_separate_vae_with_its_own_statistics(tiny_model, encoders, tmp_path):
    """A folder with the VAE at its root, as VAE repositories have it; with the pipeline's latents_mean and _std."""
    vae_folder = shutil.copytree(tiny_model / "vae", tmp_path / "other-vae")
    config = json.loads((vae_folder / "config.json").read_text())
    config |= {"latents_mean": [1.0, -2.0, 0.5, 0.0], "latents_std": [2.0, 1.0, 0.5, 4.0], "scaling_factor": 0.5}
    (vae_folder / "config.json").write_text(json.dumps(config))
    source = ModelSource(str(tiny_model), vae_path=str(vae_folder))
    other = SDXL().load_encoders(source, CPU, torch.float32, frozenset({"vae"}))
    assert other.text_encoders is None
    pixels = torch.zeros(1, 3, 64, 64)
    mean, std = SDXL().encode_image(other, pixels)
    raw_mean, raw_std = (value / 0.13025 for value in SDXL().encode_image(encoders, pixels))
    center, spread = (torch.tensor(config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(mean * spread / 0.5 + center, raw_mean)  # the pipeline's own line before decoding
    torch.testing.assert_close(std * spread / 0.5, raw_std)
    assert SDXL().fingerprint(source, "vae") != SDXL().fingerprint(ModelSource(str(tiny_model)), "vae")
    assert SDXL().fingerprint(source, "text") == SDXL().fingerprint(ModelSource(str(tiny_model)), "text")


def test_vae_that_overflows_in_fp16_is_refused(source):
    with pytest.raises(UserError, match="vae_dtype: .* fp16; use fp32 or bf16"):
        SDXL().load_encoders(source, CPU, torch.float16, frozenset({"vae"}))


def test_single_file_is_the_folder(source, tiny_model, tiny_file, encoders):
    family, single = SDXL(), ModelSource(str(tiny_file), single_file_config=str(tiny_model))
    ours, theirs = family.load(single).state_dict(), family.load(source).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    loaded = family.load_encoders(single, CPU, torch.float32, frozenset({"vae", "text"}))
    pixels = torch.ones(1, 3, 64, 64)
    assert torch.equal(family.encode_image(loaded, pixels)[0], family.encode_image(encoders, pixels)[0])
    ours, theirs = family.encode_prompt(loaded, PROMPTS), family.encode_prompt(encoders, PROMPTS)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    facts = family.facts(single)
    assert facts.encoder_numbers["vae"] == family.facts(source).encoder_numbers["vae"]
    assert facts.encoder_numbers["text"] == pytest.approx(family.facts(source).encoder_numbers["text"], rel=1e-2)
    assert facts.prediction_type == "epsilon"
    assert len(facts.notices) == 1


def test_single_files_beside_a_folder_take_its_configs(source, tiny_model, tiny_file):
    family = SDXL()
    mixed = ModelSource(str(tiny_model), vae_path=str(tiny_file), unet_path=str(tiny_file))
    ours, theirs = family.load(mixed).state_dict(), family.load(source).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    vae = family.load_encoders(mixed, CPU, torch.float32, frozenset({"vae"})).vae
    assert vae.config["scaling_factor"] == 0.13025
    assert family.fingerprint(mixed, "text") == family.fingerprint(source, "text")


def test_single_file_v_prediction_is_known_by_its_mark(tiny_model, tiny_file, tmp_path):
    state = load_file(tiny_file)
    save_file({**state, "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, tmp_path / "v.safetensors")
    facts = SDXL().facts(ModelSource(str(tmp_path / "v.safetensors"), single_file_config=str(tiny_model)))
    assert facts.prediction_type == "v_prediction"
    assert facts.scheduler_config["rescale_betas_zero_snr"] is True


def test_single_file_fingerprint_counts_its_own_tensors_only(tiny_model, tiny_file, tmp_path):
    state = load_file(tiny_file)

    def prints(changed: str) -> tuple[str, str]:
        path = tmp_path / "changed.safetensors"
        save_file({name: value + 1 if name == changed else value for name, value in state.items()}, path)
        source = ModelSource(str(path), single_file_config=str(tiny_model))
        return SDXL().fingerprint(source, "vae"), SDXL().fingerprint(source, "text")

    vae, text = prints("none")
    assert prints("model.diffusion_model.out.2.bias") == (vae, text)
    assert prints("first_stage_model.encoder.conv_out.bias")[0] != vae
    assert prints("first_stage_model.encoder.conv_out.bias")[1] == text
    assert prints("conditioner.embedders.1.model.text_projection")[0] == vae
    assert prints("conditioner.embedders.1.model.text_projection")[1] != text


def test_v_prediction_folder(tiny_model_v):
    assert SDXL().facts(ModelSource(str(tiny_model_v))).prediction_type == "v_prediction"


def test_other_models_are_refused(tiny_model, tiny_file, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = json.loads((copy / "unet/config.json").read_text()) | {"addition_embed_type": None}
    (copy / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is no SDXL text-to-image model"):
        SDXL().facts(ModelSource(str(copy)))
    state = load_file(tiny_file)
    no_text = {name: value for name, value in state.items() if not name.startswith("conditioner.")}
    save_file(no_text, tmp_path / "no-text.safetensors")
    with pytest.raises(UserError, match="holds no text_encoder"):
        SDXL().facts(ModelSource(str(tmp_path / "no-text.safetensors")))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no SDXL checkpoint"):
        SDXL().facts(ModelSource(str(tmp_path / "other.safetensors")))
